"""Halving a trained ViT: two tied kernels for each block's six, fitted to what the block computes."""
