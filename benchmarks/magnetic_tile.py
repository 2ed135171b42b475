"""A split of the magnetic tile defects in which no tile is in both parts.

    python benchmarks/magnetic_tile.py ../shared/data/photos/magnetic-tile tiles
    python examples/finetune_on_your_data.py --root tiles
    python benchmarks/magnetic_tile.py ../shared/data/photos/magnetic-tile tiles-unseen --unseen    # for mini

The data has up to six exposures of each tile ("exp1" to "exp6" in the file names), and its own split separates
exposures, not tiles. The numbers in the file names ascend in time, so images whose numbers are less than 1300 apart are
taken to be of the same tile. A quarter of these groups is held out, drawn by seed. Images and masks are linked, not
copied.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Sequence
from pathlib import Path

from conceptseg_trainers.mini.leaks import groups_of, tile_number, training_items

from conceptseg_hf.writing import write_file

HELD_OUT = 0.25


def main(argv: Sequence[str] | None = None) -> None:
    """Write the folder and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the set, with samples.csv")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--unseen",
        action="store_true",
        help="leave out the images that the checkpoint mini was trained with; SOURCE is in the folder of all sets",
    )
    arguments = parser.parse_args(argv)
    with (arguments.source / "samples.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if arguments.unseen:
        source = arguments.source.resolve()
        seen = {item.image for item in training_items(source.parent)}
        rows = [row for row in rows if source / row["image"] not in seen]
    numbers = [number for row in rows if (number := tile_number(row["image"])) is not None]
    if not rows or len(numbers) < len(rows):
        parser.error(f"{str(arguments.source)!r} has other file names than the magnetic tile defects")
    groups = groups_of(numbers)
    names = sorted(set(groups))
    held_out = set(random.Random(arguments.seed).sample(names, round(HELD_OUT * len(names))))
    lines = ["id,image,mask,prompt,split"]
    for row, group in zip(rows, groups, strict=True):
        split = "test" if group in held_out else "train"
        lines.append(",".join((row["id"], row["image"], row["mask"], row["prompt"], split)))
    arguments.target.mkdir(parents=True, exist_ok=True)
    for folder in ("images", "masks"):
        link = arguments.target / folder
        if not link.exists():
            link.symlink_to((arguments.source / folder).resolve())
    write_file(arguments.target / "samples.csv", "\n".join(lines) + "\n")
    count = sum(group in held_out for group in groups)
    print(
        f"{len(names)} groups, {len(held_out)} held out: {len(rows) - count} training and {count} held-out images"
    )


if __name__ == "__main__":
    main()
