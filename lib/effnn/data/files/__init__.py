"""Reading files by path: what a file holds, its text, its rows, and the clear error where it is not what was asked."""
