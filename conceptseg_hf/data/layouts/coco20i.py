"""COCO-20i as the few-shot literature lays it out (HSNet, Matcher): a folder `COCO2014`, or what is in it.

- `train2014/`, `val2014/`: the images of COCO 2014,
- `annotations/instances_train2014.json`, `annotations/instances_val2014.json`: COCO's own annotations,
- `annotations/train2014/`, `annotations/val2014/`: PNG maps of labels, 0 background, 1 to 80 the classes in COCO's
  order.

Which class an image shows is read from COCO's annotations: the lists that come with that layout are pickles, which are
programs. Each class that an image shows is a sample; fold i holds the classes whose place among the 80 leaves i when it
is divided by 4. Objects that others hide completely in a map give an empty mask; such an image is no reference.
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
    """Draws train images of a class.

    Args:
        root: The folder.
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
        drawn = rng.sample(names, min(count + 1, len(names)))  # one more, as one may be the target
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
        """See `ReferencePool.knows`."""
        names = self._names.get(self._labels[concept], [])
        return len(names) > 1 or (len(names) == 1 and _paths(self._root, "train", names[0], 1)[0] != exclude)


def index_files(root: Path, source: Source, split: str) -> Index:
    """Lists the samples of a split; the name of the source says which fold; see `Index`."""
    root = root / "COCO2014" if (root / "COCO2014").is_dir() else root
    _, _, fold = source.name.partition("-")
    labels, shown = _read_annotations(root, source, split)
    concepts = {label: concept for concept, label in labels.items()}
    items = []
    for name, present in sorted(shown.items()):
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
    train = shown if split == "train" else _read_annotations(root, source, "train")[1]
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
    """Label of each class name, and the labels that each image shows."""
    path = required_file(root / "annotations" / f"instances_{split}2014.json", source.name)
    content = read_json(path)
    try:
        categories = sorted((category["id"], category["name"]) for category in content["categories"])
        labels = {identity: label for label, (identity, _) in enumerate(categories, start=1)}
        names = {image["id"]: image["file_name"] for image in content["images"]}
        shown = defaultdict(set)
        for annotation in content["annotations"]:
            shown[names[annotation["image_id"]]].add(labels[annotation["category_id"]])
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is not COCO's file of instances ({type(error).__name__}: {error}); fetch it again."
        ) from error
    return {name: labels[identity] for identity, name in categories}, dict(shown)
