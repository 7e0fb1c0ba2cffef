"""Checkpoints of other implementations, read into this project's own state."""
