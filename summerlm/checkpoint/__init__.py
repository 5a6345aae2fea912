"""Checkpoints: the state of a run on disk, whole or absent."""
