"""Growing a model and its optimizer without a change of loss and training dynamics."""
