"""Training: how a task is learned. Knows `Task`, not models."""
