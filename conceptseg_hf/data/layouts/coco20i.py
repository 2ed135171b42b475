"""COCO-20i in the layout of the few-shot literature (HSNet, Matcher): a folder `COCO2014`, or its contents.

- `train2014/`, `val2014/`: the images of COCO 2014,
- `annotations/instances_train2014.json`, `annotations/instances_val2014.json`: COCO's own annotations,
- `annotations/train2014/`, `annotations/val2014/`: PNG label maps, 0 for background and 1 to 80 for the classes in
  COCO's order.

The classes in an image are read from COCO's annotations: the lists that come with that layout are pickles, which can
execute code. Each class in an image is a sample. Fold i contains the classes with zero-based index % 4 == i. Objects
that are completely occluded in a label map give an empty mask; such an image is not used as a reference.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

from ..files import FileItem, FileReference, Index, ReferencePool, reference_count
from ..ground_truths import LabelFile
from ..paths import inside, read_json, required_file
from ..suite import Source

FOLDS = 4


class CocoPool(ReferencePool):
    """Draws training images of a class.

    Args:
        root: Folder of the dataset.
        labels: Label of each class.
        names: File names of the images that show each label.
    """

    def __init__(self, root: Path, labels: dict[str, int], names: dict[int, list[str]]) -> None:
        self._root, self._labels, self._names = root, labels, names

    def draw(self, concept: str, rng: random.Random, exclude: Path) -> list[FileReference]:
        """See `ReferencePool.draw`."""
        label = self._labels[concept]
        names = self._names.get(label, [])
        count = reference_count(len(names))
        drawn = rng.sample(names, min(count + 1, len(names)))  # one more, because one may be the target
        references = [FileReference(*_paths(self._root, "train", name, label)) for name in drawn]
        return [reference for reference in references if reference.image != exclude][:count]

    def spares(
        self, concept: str, rng: random.Random, exclude: Path, drawn: Collection[FileReference]
    ) -> Iterator[FileReference]:
        """See `ReferencePool.spares`."""
        label = self._labels[concept]
        names = self._names.get(label, [])
        for name in rng.sample(names, len(names)):
            reference = FileReference(*_paths(self._root, "train", name, label))
            if reference.image != exclude and reference not in drawn:
                yield reference

    def references(self, concept: str) -> Iterator[FileReference]:
        """See `ReferencePool.references`."""
        label = self._labels[concept]
        for name in self._names.get(label, []):
            yield FileReference(*_paths(self._root, "train", name, label))

    def has_reference(self, concept: str, exclude: Path) -> bool:
        """See `ReferencePool.has_reference`."""
        names = self._names.get(self._labels[concept], [])
        return len(names) > 1 or (len(names) == 1 and _paths(self._root, "train", names[0], 1)[0] != exclude)


def index_files(root: Path, source: Source, split: str) -> Index:
    """List the samples of a split; the name of the source contains the fold; see `Index`."""
    root = root / "COCO2014" if (root / "COCO2014").is_dir() else root
    _, _, fold = source.name.partition("-")
    labels, labels_by_name = _read_annotations(root, source, split)
    concepts = {label: concept for concept, label in labels.items()}
    items = []
    for name, present in sorted(labels_by_name.items()):
        for label in sorted(present):
            if fold and (label - 1) % FOLDS != int(fold):
                continue
            image, ground_truth = _paths(root, split, name, label)
            items.append(
                FileItem(
                    sample_id=f"{Path(name).stem}-{label:02d}",
                    image=image,
                    ground_truth=ground_truth,
                    prompt=concepts[label],
                    level=source.level,
                    group=source.group,
                    family=source.name,
                    concept=concepts[label],
                )
            )
    train = labels_by_name if split == "train" else _read_annotations(root, source, "train")[1]
    names = defaultdict(list)
    for name, present in sorted(train.items()):
        for label in present:
            names[label].append(name)
    return Index(items, CocoPool(root, labels, dict(names)))


def _paths(root: Path, split: str, name: str, label: int) -> tuple[Path, LabelFile]:
    image = inside(root / f"{split}2014", name)
    folder = root / "annotations" / f"{split}2014"
    return image, LabelFile(inside(folder, name).with_suffix(".png"), label)


def _read_annotations(root: Path, source: Source, split: str) -> tuple[dict[str, int], dict[str, set[int]]]:
    """Return the label of each class name, and the labels in each image."""
    path = required_file(root / "annotations" / f"instances_{split}2014.json", source.name)
    content = read_json(path)
    try:
        categories = sorted((category["id"], category["name"]) for category in content["categories"])
        labels = {coco_id: label for label, (coco_id, _) in enumerate(categories, start=1)}
        names = {image["id"]: image["file_name"] for image in content["images"]}
        labels_by_name = defaultdict(set)
        for annotation in content["annotations"]:
            labels_by_name[names[annotation["image_id"]]].add(labels[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not a COCO instances file ({type(error).__name__}: {error}); download it again."
        ) from error
    return {name: labels[coco_id] for coco_id, name in categories}, dict(labels_by_name)
