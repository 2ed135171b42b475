"""Split-reference datasets for Meta-GRPO (paper, section on split-reference training; App. D.3).

Each row contains a mosaic of references. One of them, the proxy query, is in the top left cell without its box: the
policy must locate its object (`<check>`) with the rule that it has induced from the other references.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from conceptseg_hf import ConceptSegProcessor, CoPRSProcessor, Reference, nano_checkpoint
from conceptseg_hf.data import ConceptSample
from conceptseg_hf.images import load_image
from conceptseg_hf.processing_conceptseg import CoordinateFrame

from .samples import ReadableSamples, check_sample

COLUMNS = (
    "prompt",
    "images",
    "target_image",
    "gt_mask",
    "gt_box",
    "gt_check_box",
    "sample_id",
    "problem",
)
IGNORE = "ignore_mask"
INDEX = "sample_index"
# TRL reads a row once per completion and once per step of a generation batch.
_CACHED_ROWS = 64


def split_reference_dataset(
    samples: Sequence[ConceptSample],
    grid: int = 2,
    seed: int = 42,
    processor: ConceptSegProcessor | CoPRSProcessor | None = None,
) -> datasets.Dataset:
    """Create a dataset for `MetaGRPOTrainer` in which references are composed at random in each epoch.

    Rows are computed on access and depend only on (seed, epoch, sample): all G copies of a prompt have the same mosaic
    in every process. `set_epoch` changes the epoch; the trainer calls it.

    Args:
        samples: Result of `load_benchmark`, or other indexable samples; unreadable ones are replaced by the next one.
        grid: Number of cells per side of the mosaic, K. At most K * K references of a sample are used.
        seed: Random seed of the composition.
        processor: Processor that formats prompts and boxes; by default that of the embedded nano checkpoint.
            `MetaGRPOTrainer` replaces it with its own.

    Returns:
        A dataset with the columns
        prompt: messages, text only (TRL inserts the images);
        images: images for the VLM, of canvas size: the mosaic (if there are references), then the target;
        target_image: the original target image, for SAM 3;
        gt_mask: ground-truth mask, mode "L", of the target's size;
        gt_box: box of the target in text units (x1, y1, x2, y2), None if the concept is absent;
        gt_check_box: box of the proxy query on the mosaic in text units, None without a proxy query; a list of boxes if
        there are several correct ones (see `ConceptSegProcessor.check_iou`);
        sample_id, problem (the user's prompt), sample_index;
        ignore_mask: mode "L", 255 for pixels to ignore, None without such pixels (the only optional column).

    Raises:
        ValueError: If there are no samples, or the grid is not between 1 and 3.
    """
    if not len(samples):
        raise ValueError("split_reference_dataset: there are no samples; pass at least one.")
    if grid not in (1, 2, 3):
        raise ValueError(f"split_reference_dataset: grid is {grid}; use 1, 2 or 3 cells per side.")
    # The table only contains row indices; the other columns are placeholders for their names.
    table = {INDEX: range(len(samples)), **{name: [None] * len(samples) for name in (*COLUMNS, IGNORE)}}
    dataset = datasets.Dataset.from_dict(table)
    dataset.set_transform(SplitReferences(samples, grid, seed, processor))
    return dataset


def set_epoch(dataset: Any, epoch: int) -> None:
    """Set the epoch of a split-reference dataset, for which its references are composed; ignore other datasets."""
    if (composer := find_composer(dataset)) is not None:
        composer.epoch = epoch


def find_composer(dataset: Any) -> SplitReferences | None:
    """Return the row transform of a dataset from `split_reference_dataset`, or None for other datasets."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    transform = dataset.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, SplitReferences) else None


class SplitReferences:
    """Transform that computes the rows of a split-reference dataset.

    Args:
        samples: The samples.
        grid: Number of cells per side of the mosaic.
        seed: Random seed of the composition.
        processor: See `split_reference_dataset`.

    Attributes:
        epoch: Index of the epoch, starting at 0.
    """

    def __init__(
        self,
        samples: Sequence[ConceptSample],
        grid: int,
        seed: int,
        processor: ConceptSegProcessor | CoPRSProcessor | None = None,
    ) -> None:
        self.samples = ReadableSamples(samples, self._check_prompt)
        self.grid = grid
        self.seed = seed
        self.epoch = 0
        self._processor = processor
        self._rows: OrderedDict[tuple[int, int], dict[str, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Pickles, and hashes of them, must not depend on the cached rows.
        return {**vars(self), "_rows": OrderedDict()}

    @property
    def processor(self) -> ConceptSegProcessor | CoPRSProcessor:
        """Processor that formats prompts and boxes."""
        if self._processor is None:
            self._processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
        return self._processor

    @processor.setter
    def processor(self, processor: ConceptSegProcessor | CoPRSProcessor) -> None:
        self._processor = processor
        self._rows.clear()
        self.samples.replacements.clear()  # another tokenizer may have other reserved tokens

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Return the rows with the indices in the batch, as columns."""
        rows = [self.row(index) for index in batch[INDEX]]
        return {name: [row[name] for row in rows] for name in (*COLUMNS, IGNORE, INDEX)}

    def row(self, index: int) -> dict[str, Any]:
        """Return one row.

        Raises:
            ValueError: If the sample cannot be used.
        """
        key = (self.epoch, index)
        if key not in self._rows:
            self._rows[key] = self._compose(index)
            if len(self._rows) > _CACHED_ROWS:
                self._rows.popitem(last=False)
        return self._rows[key]

    def _check_prompt(self, sample: ConceptSample) -> None:
        self.processor.check_prompt(sample.prompt)

    def _compose(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        sample_id = sample.sample_id or str(index)
        image = load_image(sample.image)
        check_sample(replace(sample, sample_id=sample_id), image.size)
        references = compose_references(sample.references, self.grid, [self.seed, self.epoch], sample_id)
        frame, vlm_images = self.processor.draw_images(image, references)
        return {
            "prompt": [
                {"role": "system", "content": self.processor.template.system},
                {"role": "user", "content": self.processor.instruction(sample.prompt, frame)},
            ],
            "images": list(vlm_images),
            "target_image": image,
            "gt_mask": sample.mask,
            IGNORE: sample.ignore,
            "gt_box": None if sample.box is None else list(frame.image_box_to_text(sample.box)),
            "gt_check_box": self._check_box(frame),
            "sample_id": sample_id,
            "problem": sample.prompt,
            INDEX: index,
        }

    def _check_box(self, frame: CoordinateFrame) -> list[Any] | None:
        boxes = [list(box) for box in frame.check_boxes]
        if not boxes:
            return None
        return boxes if len(boxes) > 1 else boxes[0]


def compose_references(
    references: Sequence[Reference], grid: int, seeds: Sequence[int], sample_id: str
) -> list[Reference]:
    """Return up to grid * grid references in random order; the first one with a box becomes the proxy query.

    If fewer than two references have a box or mask, there is no proxy query to choose, and the order is kept, as it may
    be meaningful (frames of a video).

    Args:
        references: All references of a sample; their roles are ignored.
        grid: Number of cells per side of the mosaic.
        seeds: Random seeds, to which the hash of the sample's id is added.
        sample_id: Id of the sample.
    """
    order: range | np.ndarray = range(len(references))
    if sum(reference.is_marked for reference in references) > 1:
        order = np.random.default_rng([*seeds, zlib.crc32(sample_id.encode())]).permutation(len(references))
    return [replace(references[index], role="auto") for index in order[: grid**2]]
