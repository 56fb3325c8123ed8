"""Layers: mathematics with parameters, independent of task, data and mesh."""
