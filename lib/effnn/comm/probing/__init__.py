"""Every collective of torch.distributed, run on every backend, and timed."""
