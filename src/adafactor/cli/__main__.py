"""``python -m adafactor.cli``, where the console script is not on the path."""

import sys

from adafactor.cli import main

sys.exit(main())
