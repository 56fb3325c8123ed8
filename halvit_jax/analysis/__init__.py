"""Counting and compiling without running: parameters, MACs, HLO, TPU topologies, rooflines."""
