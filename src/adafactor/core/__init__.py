"""The algorithm on plain data: numbers, shapes, the oracle, and the native library through ctypes. NumPy at most."""
