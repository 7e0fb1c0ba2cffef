"""The step on PyTorch tensors."""
