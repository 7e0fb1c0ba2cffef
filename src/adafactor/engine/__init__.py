"""The algorithm on arrays: one folder per array library."""
