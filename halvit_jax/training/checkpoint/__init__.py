"""Verified checkpoints: Orbax, digests of every array and file, and fallback to the newest good step."""
