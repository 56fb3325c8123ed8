"""Layers: mathematics with parameters. They know no task, no data and no mesh."""
