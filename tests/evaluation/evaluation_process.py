"""Script that `test_distributed.py` runs with torchrun: runs `conceptseg evaluate` and writes a note per process.

Usage: `torchrun --nproc_per_node N evaluation_process.py NOTES_DIR OPTION...`
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from conceptseg_hf import cli
from conceptseg_hf.evaluation.running import evaluator


def main(folder: Path, *options: str) -> int:
    segmented = 0
    segment_samples = evaluator.segment_samples

    def counting(model, processor, samples, *rest):
        nonlocal segmented
        segmented += len(samples)
        return segment_samples(model, processor, samples, *rest)

    evaluator.segment_samples = counting
    code = cli.main(["evaluate", *options])
    state = PartialState()
    note = {
        "world_size": state.num_processes,
        "samples": segmented,
        "joined": torch.distributed.is_initialized(),
    }
    (folder / f"{state.process_index}.json").write_text(json.dumps(note))
    return code


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
