"""Training recipes that compose: a function of this package returns a config."""
