"""Split-reference data for Meta-GRPO (paper, section on split-reference training; App. D.3).

Each row shows a mosaic of references, one of which, the proxy query, lies in the top left cell without its box: the
policy must locate it (`<check>`) with the rule that it induced from the others.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np

from conceptseg_hf import ConceptSegProcessor, Reference, nano_checkpoint
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
# Rows that are kept: TRL reads a row once per completion and once per step of a generation batch.
_CACHED_ROWS = 64


def split_reference_dataset(
    samples: Sequence[ConceptSample],
    grid: int = 2,
    seed: int = 42,
    processor: ConceptSegProcessor | None = None,
) -> datasets.Dataset:
    """A data set for `MetaGRPOTrainer`, whose references are composed at random, anew in each epoch.

    Rows are made when they are read, from (seed, epoch, sample) alone: all G copies of a prompt see one mosaic, in
    any process. `set_epoch` changes the epoch; the trainer calls it.

    Args:
        samples: What `load_benchmark` gives, or any indexable samples; one that cannot be read gives way to the next.
        grid: Cells per side of the mosaic, K. Where a sample has more than K * K references, so many are drawn.
        seed: Of the composition.
        processor: Writes prompts and boxes. `MetaGRPOTrainer` puts its own in place; None, until then: that of the
            embedded nano checkpoint.

    Returns:
        A data set with the columns
        prompt: messages, text only (TRL inserts the images);
        images: what the VLM sees, of canvas size: the mosaic (if there are references), then the target;
        target_image: the target as it is, for SAM 3;
        gt_mask: its mask, "L", of its size;
        gt_box: box of the target in text units (x1, y1, x2, y2), None where the concept is absent;
        gt_check_box: box of the proxy query on the mosaic in text units, None where there is none; where several count
        (see `ConceptSegProcessor.check_iou`), a list of them;
        sample_id, problem (the user's words), sample_index;
        ignore_mask: "L", 255 where pixels do not count, None where all do (the one column that may be missing).

    Raises:
        ValueError: If there are no samples, or the grid is not between 1 and 3.
    """
    if not len(samples):
        raise ValueError("split_reference_dataset: there are no samples; give at least one.")
    if grid not in (1, 2, 3):
        raise ValueError(f"split_reference_dataset: grid is {grid}; use 1, 2 or 3 cells per side.")
    # The table holds row numbers alone; its other columns are there to be named.
    table = {INDEX: range(len(samples)), **{name: [None] * len(samples) for name in (*COLUMNS, IGNORE)}}
    dataset = datasets.Dataset.from_dict(table)
    dataset.set_transform(SplitReferences(samples, grid, seed, processor))
    return dataset


def set_epoch(dataset: Any, epoch: int) -> None:
    """Recomposes the references of a split-reference data set for an epoch; other data sets stay as they are."""
    if (composer := find_composer(dataset)) is not None:
        composer.epoch = epoch


def find_composer(dataset: Any) -> SplitReferences | None:
    """What makes the rows of a data set, if `split_reference_dataset` made it."""
    if not isinstance(dataset, datasets.Dataset):
        return None
    transform = dataset.format["format_kwargs"].get("transform")
    return transform if isinstance(transform, SplitReferences) else None


class SplitReferences:
    """Makes the rows of a split-reference data set.

    Args:
        samples: The samples.
        grid: Cells per side of the mosaic.
        seed: Of the composition.
        processor: See `split_reference_dataset`.

    Attributes:
        epoch: The epoch, from 0.
    """

    def __init__(
        self,
        samples: Sequence[ConceptSample],
        grid: int,
        seed: int,
        processor: ConceptSegProcessor | None = None,
    ) -> None:
        self.samples = ReadableSamples(samples, self._check_words)
        self.grid = grid
        self.seed = seed
        self.epoch = 0
        self._processor = processor
        self._rows: OrderedDict[tuple[int, int], dict[str, Any]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_rows": OrderedDict(),
        }  # what is pickled, or hashed, is not what was read so far

    @property
    def processor(self) -> ConceptSegProcessor:
        """Writes prompts and boxes."""
        if self._processor is None:
            self._processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
        return self._processor

    @processor.setter
    def processor(self, processor: ConceptSegProcessor) -> None:
        self._processor = processor
        self._rows.clear()
        self.samples.replacements.clear()  # another tokenizer, other reserved tokens

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The rows whose numbers are in the batch, as columns."""
        rows = [self.row(index) for index in batch[INDEX]]
        return {name: [row[name] for row in rows] for name in (*COLUMNS, IGNORE, INDEX)}

    def row(self, index: int) -> dict[str, Any]:
        """One row.

        Raises:
            ValueError: If the sample cannot be used.
        """
        key = (self.epoch, index)
        if key not in self._rows:
            self._rows[key] = self._compose(index)
            if len(self._rows) > _CACHED_ROWS:
                self._rows.popitem(last=False)
        return self._rows[key]

    def _check_words(self, sample: ConceptSample) -> None:
        self.processor.check_prompt(sample.prompt)

    def _compose(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        sample_id = sample.sample_id or str(index)
        image = load_image(sample.image)
        check_sample(replace(sample, sample_id=sample_id), image.size)
        references = compose_references(sample.references, self.grid, [self.seed, self.epoch], sample_id)
        frame, pictures = self.processor.draw_images(image, references)
        return {
            "prompt": [
                {"role": "system", "content": self.processor.template.system},
                {"role": "user", "content": self.processor.instruction(sample.prompt, frame)},
            ],
            "images": list(pictures),
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
    """Up to grid * grid references, drawn in random order: the first with a box becomes the proxy query.

    Where fewer than two have a box or mask there is no proxy query to choose, and the order may mean something
    (frames of a video): it stays.

    Args:
        references: All references of a sample; their roles are not regarded.
        grid: Cells per side of the mosaic.
        seeds: Numbers that, with the sample's id, decide what is drawn.
        sample_id: The sample's id.
    """
    order: range | np.ndarray = range(len(references))
    if sum(reference.is_marked for reference in references) > 1:
        order = np.random.default_rng([*seeds, zlib.crc32(sample_id.encode())]).permutation(len(references))
    return [replace(references[index], role="auto") for index in order[: grid**2]]
