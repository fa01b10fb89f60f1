"""Checkpoints: their files, and the fingerprint that ties a folder to its run."""
