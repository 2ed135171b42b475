"""RefCOCO, RefCOCO+ and RefCOCOg in the layout of their owners' REFER API.

- `refcoco/refs(unc).p`, `refcoco+/refs(unc).p`, `refcocog/refs(umd).p`, `refcocog/refs(google).p`: the expressions,
- `instances.json` in the same folders: COCO's annotations of their objects,
- `images/mscoco/images/train2014/`, `images/train2014/` or `train2014/`: the images of COCO 2014.

Each expression is a sample, as in LISA's evaluation. The training splits leave out all images that occur in another
split of any of the three datasets that are in the folder, as in the CoPRS paper (section 4.1).

The expressions are pickles of lists, dictionaries, numbers and strings. They are read without executing code: a pickle
that refers to any class or function is rejected.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import FileItem, Index
from ..ground_truths import GroundTruth, Size
from ..paths import inside, read_json, required_file
from ..suite import Source

_FILES = {
    "refcoco": "refcoco/refs(unc).p",
    "refcoco+": "refcoco+/refs(unc).p",
    "refcocog": "refcocog/refs(umd).p",
    "refcocog-google": "refcocog/refs(google).p",
}
_IMAGE_FOLDERS = ("images/mscoco/images/train2014", "images/train2014", "train2014")


@dataclass(frozen=True, eq=False)
class CocoSegmentation(GroundTruth):
    """A segmentation of COCO's annotations: polygons, which are united, or a run-length encoding.

    Attributes:
        path: The file of annotations.
        segmentation: Polygons or a run-length encoding.
        annotation_id: Id of the annotation.
        stored_size: (width, height) of the image in the file.
    """

    path: Path
    segmentation: Any
    annotation_id: int
    stored_size: Size

    def read(self, size: Size | None, orientation: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
        """See `GroundTruth.read`.

        Raises:
            ImportError: If pycocotools is not installed.
        """
        try:
            from pycocotools import mask as coco_masks
        except ImportError as error:
            raise ImportError(
                "masks of RefCOCO need pycocotools; install it with: pip install pycocotools"
            ) from error
        width, height = self.stored_size
        try:
            codes = self.segmentation
            if isinstance(codes, list):
                codes = coco_masks.merge(coco_masks.frPyObjects(codes, height, width))
            elif isinstance(codes.get("counts"), list):
                codes = coco_masks.frPyObjects(codes, height, width)
            mask = coco_masks.decode(codes).astype(bool)
        except Exception as error:  # pycocotools raises many kinds of exceptions
            raise ValueError(
                f"annotation {self.annotation_id} of {str(self.path)!r} has no valid segmentation; download it again."
            ) from error
        return mask, None


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the expressions of a split; see `Index`."""
    name = source.name
    expressions = _read_refs(required_file(root / _FILES[name], name))
    path = required_file((root / _FILES[name]).with_name("instances.json"), name)
    content = read_json(path)
    folder = next((root / sub for sub in _IMAGE_FOLDERS if (root / sub).is_dir()), root / _IMAGE_FOLDERS[0])
    excluded = _evaluated_images(root) if split == "train" else frozenset()
    try:
        images = {image["id"]: image for image in content["images"]}
        annotations = {annotation["id"]: annotation for annotation in content["annotations"]}
        items = [
            item
            for ref in expressions
            if ref["split"] == split and ref["image_id"] not in excluded
            for item in _items_of(
                ref, images[ref["image_id"]], annotations[ref["ann_id"]], folder, path, source
            )
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} does not belong to the expressions of {name!r} ({type(error).__name__}: {error}); download "
            "both again."
        ) from error
    return Index(items)


def _items_of(
    ref: Mapping[str, Any],
    image: Mapping[str, Any],
    annotation: Mapping[str, Any],
    folder: Path,
    path: Path,
    source: Source,
) -> Iterator[FileItem]:
    size = (int(image["width"]), int(image["height"]))
    ground_truth = CocoSegmentation(path, annotation["segmentation"], int(annotation["id"]), size)
    for sentence in ref["sentences"]:
        yield FileItem(
            sample_id=f"{ref['ref_id']}-{sentence['sent_id']}",
            image=inside(folder, str(image["file_name"])),
            ground_truth=ground_truth,
            prompt=str(sentence["sent"]).strip(),
            level=source.level,
            group=source.group,
            family="expression",
        )


def _evaluated_images(root: Path) -> frozenset[int]:
    """Return the ids of the images in splits other than "train" of all datasets in the folder."""
    return frozenset(
        ref["image_id"]
        for file in _FILES.values()
        if (root / file).is_file()
        for ref in _read_refs(root / file)
        if ref["split"] != "train"
    )


class _DataUnpickler(pickle.Unpickler):
    """Reads only data types that need no class or function."""

    def find_class(self, module: str, name: str) -> Any:
        """Reject every class and function."""
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _read_refs(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            refs = _DataUnpickler(file, encoding="latin1").load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(
            f"{str(path)!r} is not a file of expressions ({error}); download it from the owners of RefCOCO again."
        ) from error
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "split" in ref for ref in refs):
        raise ValueError(
            f"{str(path)!r} holds no list of expressions; download it from the owners of RefCOCO again."
        )
    return refs
