"""`python -m mllmcl` is the program `mllmcl`."""

import sys

from .cli import main

sys.exit(main())
