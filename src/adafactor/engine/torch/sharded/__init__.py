"""Combine: which axis is split over which devices, and the all-reduce that completes the sums (docs/algorithm.md)."""
