"""Notebook 01: post-training pruning of text and image encoders."""
