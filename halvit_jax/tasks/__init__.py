"""Tasks: what is learned. Batch in, loss and predictions out."""
