"""The step on immutable arrays, for XLA."""
