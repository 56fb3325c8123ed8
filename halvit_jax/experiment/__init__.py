"""From a config to the objects of a run, and back from a workdir to a trained model."""
