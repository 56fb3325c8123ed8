"""Tasks: losses, scores and metrics of a learning problem."""
