"""Measure and apply, once per way of running. Kernels know layouts and hyperparameters, never a front end."""
