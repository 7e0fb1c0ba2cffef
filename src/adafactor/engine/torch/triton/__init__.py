"""The Triton kernels, and what is between them and `cuda.py`: forms, tables, what is uploaded, and launches."""
