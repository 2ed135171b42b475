"""Declares what a CUDA build of torchvision lacks beside a CPU torch, as soon as anything looks for torchvision.

`.ci/setup` puts this file and `conceptseg_hf/_compat.py` into environments where torchvision cannot be imported
otherwise, so that Transformers' classes may be imported there before `conceptseg_hf` is. It costs nothing until then.
"""

import sys


class TorchvisionHook:
    """A finder that finds nothing; it only notices that torchvision is wanted."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """Called by every import until torchvision's."""
        if name == "torchvision" and TorchvisionHook in sys.meta_path:
            sys.meta_path.remove(TorchvisionHook)
            from _torchvision_compat import declare_operators

            declare_operators()


sys.meta_path.insert(0, TorchvisionHook)
