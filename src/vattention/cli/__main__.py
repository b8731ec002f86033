"""`python -m vattention.cli`, where the console script is not installed."""

import sys

from vattention.cli import main

sys.exit(main())
