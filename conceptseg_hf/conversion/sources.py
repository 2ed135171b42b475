"""Weight files: their tensor shapes and dtypes without loading them, and reading of single tensors.

Only tensors are read from a file. Safetensors files cannot contain anything else; PyTorch files are read with
`weights_only=True`, which rejects pickles that would execute code.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from ..errors import first_line, one_line
from ..progress import progress_bar
from .errors import ConversionError

SAFETENSORS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Files that a conversion downloads from a Hub repository, which exclude pickles and code.
HUB_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.safetensors")

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class TensorInfo(NamedTuple):
    """Shape, dtype and file of a tensor. The dtype is None if it is not supported."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    file: Path

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes; 0 if the dtype is not supported."""
        return prod(self.shape) * (self.dtype.itemsize if self.dtype is not None else 0)


class WeightSource(ABC):
    """Tensors by name, in the order of the files.

    Attributes:
        files: The weight files.
        tensors: Shape, dtype and file of each tensor.
    """

    files: Sequence[Path]
    tensors: dict[str, TensorInfo]

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, memory-mapped if possible."""

    @abstractmethod
    def release(self) -> None:
        """Close the file that was read last. Its memory is freed with the tensors that were read from it."""


class SafetensorsSource(WeightSource):
    """One safetensors file, or the shards listed in an index.

    Args:
        folder: Folder with `model.safetensors` or `model.safetensors.index.json`.

    Raises:
        ConversionError: If files are missing or damaged, or the index and the files disagree.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX_NAME
        weight_map = None
        if index.is_file():
            weight_map = _read_weight_map(index)
            self.files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            self.files = [folder / SAFETENSORS_NAME]
        self.tensors = {}
        for file in self.files:
            for name, info in _read_header(file).items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    raise ConversionError(
                        f"{str(index)!r} does not map tensor {name!r} to {file.name!r}, which contains it; "
                        "download the index and all shards again."
                    )
                self.tensors[name] = info
        absent = sorted(set(weight_map or ()) - set(self.tensors))
        if absent:
            raise ConversionError(
                f"{str(index)!r} lists tensor {absent[0]!r} (and {len(absent) - 1} more) that its file does not "
                "contain; download the index and all shards again."
            )

        self._opened: tuple[Path, Any] | None = None

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor, memory-mapped from its file."""
        path = self.tensors[name].file
        if self._opened is None or self._opened[0] != path:
            self.release()
            self._opened = (path, _open_safetensors(path))
        return self._opened[1].get_tensor(name)

    def release(self) -> None:
        """Close the file that was read last."""
        self._opened = None


class TorchSource(WeightSource):
    """The tensors of a PyTorch file such as Meta's `sam3.pt`: a state dict, or one under the key "model".

    Raises:
        ConversionError: If the file is damaged or contains anything except tensors and plain data.
    """

    def __init__(self, file: Path) -> None:
        state = _load_torch_file(file)
        if isinstance(state, dict) and isinstance(state.get("model"), dict):
            state = state["model"]
        self._state = {
            name: value
            for name, value in (state.items() if isinstance(state, dict) else ())
            if isinstance(name, str) and isinstance(value, torch.Tensor)
        }
        if not self._state:
            raise ConversionError(f"{str(file)!r} contains no state dict; give the released sam3.pt.")
        self.files = [file]
        self.tensors = {
            name: TensorInfo(tuple(value.shape), value.dtype, file) for name, value in self._state.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, memory-mapped from the file."""
        return self._state[name]

    def release(self) -> None:
        """Do nothing, because the file is memory-mapped as a whole."""


def find_folder(name: str | os.PathLike, role: str) -> Path:
    """Return a local folder or file, or download a hub id (configurations, tokenizers and safetensors only).

    Args:
        name: Path or hub id.
        role: Description of the input in messages.

    Raises:
        ConversionError: If the name is neither an existing path nor a hub id, or the download fails.
    """
    path = Path(name)
    if path.exists():
        return path
    text = os.fspath(name)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ConversionError(
            f"{role} {text!r} is neither an existing file or folder nor a hub id; give one of these."
        )
    try:
        return Path(snapshot_download(text, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ConversionError(
            f"{role} {text!r} is not a local folder and cannot be downloaded from the Hub ({reason[:160]}); log in "
            "with `hf auth login` if it is gated, or give a local folder."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ConversionError: If the file is missing or does not contain a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(
            f"{str(path.parent)!r} contains no {path.name}; give the complete folder of a checkpoint."
        ) from error
    except (OSError, ValueError) as error:
        raise ConversionError(
            f"{str(path)!r} cannot be read as JSON ({error}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise ConversionError(f"{str(path)!r} does not contain a JSON object; download it again.")
    return content


def describe_files(files: Iterable[Path], title: str) -> dict[str, dict[str, Any]]:
    """Compute size and SHA-256 of each file, by file name, with a progress bar."""
    described = {}
    files = sorted(files)
    total = sum(file.stat().st_size for file in files)
    with progress_bar(total, "B", title, leave=False) as progress:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    progress.update(len(chunk))
            described[path.name] = {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    return described


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{str(index)!r} has no weight_map; download it again.")
    for name in set(weight_map.values()):
        if Path(name).name != name:
            raise ConversionError(
                f"{str(index)!r} lists a shard outside its folder ({name!r}); download it again."
            )
    return weight_map


def _read_header(file: Path) -> dict[str, TensorInfo]:
    with _open_safetensors(file) as content:
        infos = {}
        for name in content.offset_keys():
            view = content.get_slice(name)
            infos[name] = TensorInfo(tuple(view.get_shape()), _DTYPES.get(view.get_dtype()), file)
        return infos


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ConversionError(
            f"weight file {str(file)!r} does not exist; give a folder with {SAFETENSORS_NAME}, or with all shards "
            f"listed in its {INDEX_NAME}."
        ) from error
    except (SafetensorError, OSError) as error:
        raise ConversionError(
            f"weight file {str(file)!r} is damaged or truncated ({error}); download it again."
        ) from error


def _load_torch_file(file: Path) -> Any:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            return torch.load(file, map_location="cpu", weights_only=True)  # the format before PyTorch 1.6
    except FileNotFoundError as error:
        raise ConversionError(f"weight file {str(file)!r} does not exist; give an existing file.") from error
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"weight file {str(file)!r} contains objects other than tensors, which are not loaded because they could "
            "execute code; download the file from its publisher, or use the safetensors files."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        reason = first_line(error)
        raise ConversionError(
            f"weight file {str(file)!r} is damaged or truncated ({reason[:160]}); download it again."
        ) from error
