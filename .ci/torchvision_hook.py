"""Import hook that declares the missing operators of torchvision (a CUDA build) with a CPU build of torch.

`.ci/setup` installs this file and `conceptseg_hf/_compat.py` in environments where torchvision cannot be imported, so
that Transformers' classes can be imported before `conceptseg_hf`. Nothing is imported until torchvision is requested.
"""

import sys


class TorchvisionHook:
    """A finder that finds no modules, and only detects the import of torchvision."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Declare the operators at the first import of torchvision; return None for every module."""
        if name == "torchvision" and TorchvisionHook in sys.meta_path:
            sys.meta_path.remove(TorchvisionHook)
            from _torchvision_compat import declare_operators

            declare_operators()


sys.meta_path.insert(0, TorchvisionHook)
