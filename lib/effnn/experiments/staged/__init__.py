"""Notebook 03: staged training of GPT-2."""
