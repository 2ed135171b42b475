"""Launcher of the `conceptseg` command, installed as the top-level module `conceptseg_launcher`.

`import conceptseg_hf` registers models with Transformers and therefore imports torch, which takes seconds. Importing
any module of the package has the same cost. To keep `conceptseg --help` fast, this file loads `conceptseg_hf/cli`
under a separate name.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_NAME = "conceptseg_cli"


def main() -> int:
    """Run the command and return its exit code."""
    if _NAME not in sys.modules:
        package = importlib.util.find_spec("conceptseg_hf")  # locates the package without importing it
        # Never None, because this file is installed with the package.
        assert package is not None and package.submodule_search_locations is not None
        folder = Path(package.submodule_search_locations[0]) / "cli"
        spec = importlib.util.spec_from_file_location(
            _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None  # always set for a Python file
        sys.modules[_NAME] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    sys.modules[_NAME].run_in_utf8()
    return sys.modules[_NAME].main()
