"""What the experiments of several notebooks need: training, worker processes, measured ratios."""
