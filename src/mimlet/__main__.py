"""`python -m mimlet`."""

import sys

from mimlet.cli import run

sys.exit(run())
