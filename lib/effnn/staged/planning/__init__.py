"""When to grow: loss curves, compute, slopes."""
