"""A latency target: a measured table of what each layer costs, and the search for the best masks within it."""
