"""Starts the `conceptseg` command. Installed beside the package, as `conceptseg_launcher`, not in it.

`import conceptseg_hf` registers models with Transformers and so imports torch, which takes seconds; a module
inside the package cannot be imported without that. `conceptseg --help` should answer at once, so this file
loads `conceptseg_hf/cli` under a name of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "conceptseg_cli"


def main() -> int:
    """Runs the command line and returns its exit code."""
    if _NAME not in sys.modules:
        package = importlib.util.find_spec("conceptseg_hf")  # finds it, does not import it
        # None where the package is not there, but this file comes with it.
        assert package is not None and package.submodule_search_locations is not None
        folder = Path(package.submodule_search_locations[0]) / "cli"
        spec = importlib.util.spec_from_file_location(
            _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None  # a Python file has both
        sys.modules[_NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules[_NAME].run_in_utf8()
    return sys.modules[_NAME].main()
