"""Reading files by path: what kind of file it is, its text, its rows, and one clear error for what cannot be read."""
