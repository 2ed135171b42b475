"""Entry point of `python -m conceptseg_hf`."""

import sys

from .cli import main, run_in_utf8

run_in_utf8()
sys.exit(main())
