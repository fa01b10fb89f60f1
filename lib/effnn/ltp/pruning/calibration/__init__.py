"""The calibration pass: the loss that pruning follows, Fisher information of the masks, and held-out rows."""
