"""SAM's image features on disk, so that each image is encoded once (appendix B.1)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from conceptseg_hf.coprs.sam_decoder import PriorFeatures
from conceptseg_hf.hashing import weights_hash

from .from_scratch.loop import write_tensors


class FeatureStore:
    """Features by image; files are named by a hash of the pixels and of the encoder's weights.

    Args:
        folder: Folder of the files.
        encoder: The image encoder.
    """

    def __init__(self, folder: str | os.PathLike, encoder: nn.Module) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._encoder = weights_hash({"": encoder})

    def get(self, image: Image.Image, encode: Callable[[], PriorFeatures]) -> PriorFeatures:
        """Return the features of an image on the CPU or where `encode` computes them; damaged files are replaced."""
        digest = hashlib.sha256(f"{self._encoder} {image.mode} {image.size}".encode() + image.tobytes())
        path = self.folder / f"{digest.hexdigest()[:32]}.safetensors"
        try:
            tensors = load_file(path)
            return PriorFeatures(tuple(tensors[str(i)] for i in range(len(tensors))))
        except (OSError, SafetensorError, KeyError):
            features = encode()
        # Processes that encode the same image write different temporary files.
        write_tensors(
            path,
            {str(i): level.detach().cpu().contiguous() for i, level in enumerate(features.levels)},
            temporary=path.with_suffix(f".{os.getpid()}.tmp"),
        )
        return features


__all__ = ["FeatureStore"]
