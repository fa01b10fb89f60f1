"""A run that can be interrupted anywhere: what is saved, and what ties a folder to its run."""
