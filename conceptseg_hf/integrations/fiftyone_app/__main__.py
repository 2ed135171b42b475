"""`python -m conceptseg_hf.integrations.fiftyone_app`."""

import sys

from .app import main

if __name__ == "__main__":
    sys.exit(main())
