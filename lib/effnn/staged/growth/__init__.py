"""Growing a model and its optimizer, such that loss and training dynamics stay where they are."""
