"""Entry point of `python -m conceptseg_hf.cli`."""

import sys

from . import main, run_in_utf8

run_in_utf8()
sys.exit(main())
