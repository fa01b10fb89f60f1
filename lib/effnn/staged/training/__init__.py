"""Training in stages: steps, batches, checkpoints."""
