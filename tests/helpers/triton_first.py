"""Import this before Keras or TensorFlow: ``pages.triton_first`` says why."""

import pages

pages.triton_first()
