"""Notebook 06: the support matrix of the backends and their times."""
