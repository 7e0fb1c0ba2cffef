"""Combine: which axis of a parameter is split over which processes, and the sums that make it whole again."""
