"""The step as an op of TensorFlow, in graphs and eagerly."""
