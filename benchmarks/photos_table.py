"""Foreground IoU of several evaluations of the benchmark "photos", by dataset, with 95 % bootstrap intervals.

    python benchmarks/photos_table.py otsu=baselines/otsu unet=unet/evaluation mini=evaluation_output/photos
    python benchmarks/photos_table.py otsu=baselines/otsu --exclude duplicates.csv
    python benchmarks/photos_table.py mini=evaluation_output/photos unet=unet/evaluation --differences

Each evaluation is NAME=FOLDER, where FOLDER is an output folder of `conceptseg evaluate` or `evaluate_masks`.
`--exclude` takes a file of `conceptseg data check photos --duplicates FILE`; `--differences` adds the paired
differences of the first evaluation to the others. A dataset with two levels has two rows; CamVid also has rows for its
classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from conceptseg_trainers.mini.results import dataset_table, named_folder, read_ious

from conceptseg_hf.data.duplicates import read_sample_ids


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("evaluations", nargs="+", type=named_folder, metavar="NAME=FOLDER")
    parser.add_argument("--exclude", metavar="FILE", help="samples to leave out")
    parser.add_argument(
        "--differences",
        action="store_true",
        help="add the paired differences of the first evaluation to the others",
    )
    arguments = parser.parse_args(argv)
    excluded = frozenset(() if arguments.exclude is None else read_sample_ids(arguments.exclude))
    columns = {name: read_ious(folder, excluded) for name, folder in arguments.evaluations}
    print("\n".join(dataset_table(columns, arguments.differences)))


if __name__ == "__main__":
    main()
