"""Post-training pruning, step by step as in the paper: calibrate, search, rearrange, tune, shrink. See ../README.md."""
