"""Import this before anything imports TensorFlow: once that is loaded, importing Triton ends the process.

It is a segmentation fault (tensorflow-cpu 2.21, triton 3.7.1), and PyTorch imports Triton by itself. The other way
round both work.
"""

import contextlib

with contextlib.suppress(ImportError):
    import triton  # noqa: F401
