"""`python -m mimlet`."""

import sys

from mimlet.cli import main

sys.exit(main())
