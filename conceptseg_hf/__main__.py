"""`python -m conceptseg_hf`."""

import sys

from .cli import main

sys.exit(main())
