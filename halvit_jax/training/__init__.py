"""Training: loop, step, state, optimizer and evaluation of a `Task`; knows no models."""
