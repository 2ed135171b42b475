"""ConceptShapes as a sequence of samples, with conversion to a `datasets.Dataset` and export to PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...boxes import mask_to_box
from ...images import mask_to_image
from ...references import Reference
from ...suggestions import did_you_mean
from ...writing import image_bytes, json_text, open_new, write_file
from ..generated import GeneratedBenchmark
from ..sample import ConceptSample
from .families import FURTHER_GROUPS, GROUPS, TABLE_1_GROUPS, VARIANTS, Family, Task, TaskRng

if TYPE_CHECKING:
    import datasets

NAME = "concept-shapes"
# The number of a split is part of the seed of its samples; its length only limits iteration.
SPLITS = {"train": 0, "val": 1, "test": 2, "test-compositional": 3, "test-rules": 4}
SEED = 42
"""Default seed, which gives the references that are part of the benchmark."""

_LENGTHS = {"train": 1_000_000} | dict.fromkeys(("val", "test", "test-compositional", "test-rules"), 1_200)
_RULES_SPLIT, _RULES_GROUP = "test-rules", "hidden rule"
# Part of the seeds of the groups outside Table 1, so that no two groups share random numbers.
_FURTHER_SEEDS = {name: 1_000_000_007 + i for i, name in enumerate(FURTHER_GROUPS)}


@dataclass(frozen=True)
class Slot:
    """What is generated at an index of the benchmark.

    Attributes:
        level: "CI", "CD" or "CR".
        group: The group.
        stratum: Part of the group, if the group is divided.
        family: Function that generates the task.
        sample_id: Unique within the split.
        seeds: Random seeds of the task, in addition to that of the split.
        options: Additional arguments of the family.
    """

    level: str
    group: str
    stratum: str
    family: Family
    sample_id: str
    seeds: tuple[int, ...]
    options: dict[str, Any]


class ConceptShapes(GeneratedBenchmark):
    """Scenes of shapes with one concept to segment in each; identical on every machine.

    Samples cycle through the groups of the paper's Table 1, so any prefix of a split is balanced. In the split
    `test-compositional`, the concept always combines a color and a shape that no other split draws together, in all
    families with a colored target.

    Args:
        split: `"train"`, `"val"`, `"test"`, `"test-compositional"`, or `"test-rules"`, which has only the group
            "hidden rule", with rules that no other split draws.
        length: Number of samples; defaults to the length of the split.
        size: Side length of the target images in pixels.
        seed: Random seed of the references. Seeds other than `SEED` draw different references for the same targets, in
            families with examples of a concept as references; first frames and views, which are part of the question,
            do not change.
        groups: Groups to cycle through instead: groups of Table 1 (with the same samples as in the whole split),
            "which one" (objects that the noun of the answer does not distinguish) and "hidden rule" (the references
            follow an unstated rule).

    Raises:
        ValueError: If the split or a group does not exist, or the size is less than 32 pixels.
    """

    def __init__(
        self,
        split: str = "test",
        length: int | None = None,
        size: int = 128,
        seed: int = SEED,
        groups: Sequence[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(
                f"ConceptShapes: no split is named {split!r}{did_you_mean(split, SPLITS)}; use one of "
                f"{', '.join(SPLITS)}."
            )
        if size < 32:
            raise ValueError(f"ConceptShapes: size is {size}, which is too small; use at least 32 pixels.")
        if groups is None:
            groups = (_RULES_GROUP,) if split == _RULES_SPLIT else TABLE_1_GROUPS
        unknown = [group for group in groups if group not in (*TABLE_1_GROUPS, *FURTHER_GROUPS)]
        if unknown or not groups:
            raise ValueError(
                f"ConceptShapes: groups is {list(groups)}; use some of {', '.join((*TABLE_1_GROUPS, *FURTHER_GROUPS))}."
            )
        if split == _RULES_SPLIT and tuple(groups) != (_RULES_GROUP,):
            raise ValueError(
                f"ConceptShapes: the split {split!r} has only the group {_RULES_GROUP!r}; leave groups out."
            )
        self.name = NAME
        self.split = split
        self.size = size
        self.seed = seed
        self.groups = tuple(groups)
        self.length = _LENGTHS[split] if length is None else length
        # One round: the selected positions in the round of Table 1, and one position for each additional group.
        self._round: list[int | str] = [i for i, (_, group, _) in enumerate(GROUPS) if group in groups]
        self._round += [group for group in FURTHER_GROUPS if group in groups]

    @property
    def is_whole(self) -> bool:
        """Whether the samples cycle through all groups of Table 1 and no others."""
        return self._round == list(range(len(GROUPS)))

    def generate(self, index: int) -> ConceptSample:
        """Generate the sample at an index of 0 or more."""
        slot = self.slot(index)
        task = self.task(index)
        return ConceptSample(
            image=Image.fromarray(task.scene.pixels),
            mask=mask_to_image(task.mask),
            prompt=task.prompt,
            level=slot.level,
            group=slot.group,
            family=slot.family.__name__,
            references=[Reference(Image.fromarray(scene.pixels), box=box) for scene, box in task.references],
            dataset=NAME,
            sample_id=slot.sample_id,
            box=mask_to_box(task.mask),
            think=task.think,
            rule=task.rule,
            answer=task.answer,
            split=self.split,
            candidates=task.candidates,
            stratum=slot.stratum,
        )

    def task(self, index: int) -> Task:
        """Return the task of a sample, with its scenes."""
        slot = self.slot(index)
        rng = TaskRng([SPLITS[self.split], *slot.seeds], None if self.seed == SEED else self.seed)
        return slot.family(rng, self.size, self.split == "test-compositional", **slot.options)

    def slot(self, index: int) -> Slot:
        """Return what is generated at an index."""
        number, position = divmod(index, len(self._round))
        group = self._round[position]
        if isinstance(group, int):
            index = number * len(GROUPS) + group
            level, name, family = family_at(index)
            return Slot(level, name, "", family, f"{self.split}-{index:06d}", (index,), {})
        level, strata = FURTHER_GROUPS[group]
        families = [(stratum, family) for stratum, members in strata.items() for family in members]
        occurrence, family_index = divmod(number, len(families))
        stratum, family = families[family_index]
        options: dict[str, Any] = {"new": True} if self.split == _RULES_SPLIT else {}
        seeds: tuple[int, ...] = (_FURTHER_SEEDS[group], number)
        if family in VARIANTS:
            occurrence, variant = divmod(occurrence, VARIANTS[family])
            seeds, options = (*seeds[:1], family_index, occurrence), {"variant": variant}
        return Slot(
            level,
            group,
            stratum,
            family,
            f"{self.split}-{group.replace(' ', '-')}-{number:06d}",
            seeds,
            options,
        )

    def to_dataset(self) -> datasets.Dataset:
        """Convert the split to a `datasets.Dataset`; see `as_dataset`."""
        from ..tables import as_dataset

        return as_dataset(self)

    def export(self, folder: str | Path) -> Path:
        """Write the split as PNG files and `samples.jsonl`.

        Args:
            folder: Output folder, created if missing. Images are written to `images/`, masks to `masks/`, references to
                `references/`.

        Returns:
            The path of `samples.jsonl`, with one JSON object per line and paths relative to the folder.
        """
        folder = Path(folder)
        index_path = folder / "samples.jsonl"
        with open_new(index_path) as index_file:
            for sample in self:
                row: dict[str, Any] = {
                    "sample_id": sample.sample_id,
                    "image": f"images/{sample.sample_id}.png",
                    "mask": f"masks/{sample.sample_id}.png",
                    **{
                        key: getattr(sample, key)
                        for key in ("prompt", "level", "group", "family", "box", "think", "rule", "answer")
                    },
                    "references": [],
                }
                write_file(folder / row["image"], image_bytes(sample.image))
                write_file(folder / row["mask"], image_bytes(sample.mask))
                for number, reference in enumerate(sample.references):
                    path = f"references/{sample.sample_id}-{number}.png"
                    write_file(folder / path, image_bytes(reference.image))
                    row["references"].append({"image": path, "box": reference.box})
                index_file.write(json_text(row) + "\n")
        return index_path


def family_at(index: int) -> tuple[str, str, Family]:
    """Return the level, group and family of the sample at an index of any split."""
    round_number, slot = divmod(index, len(GROUPS))
    level, group, families = GROUPS[slot]
    return level, group, families[round_number % len(families)]
