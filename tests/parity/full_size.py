"""The comparison of test_meta_sam3.py at full size: 840 million random weights, images of 1008 pixels.

Requires about 12 GB of memory and 15 minutes on two cores:

    PYTHONPATH=tests python -m parity.full_size
"""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import torch

from conceptseg_hf.conversion.processors import BPE_NAME, read_bpe

from . import meta_sam3


def main() -> None:
    """Build and convert Meta's model, run both models and print the relative errors."""
    prompts = ["the striped cat"]
    pixels = torch.randn(1, 3, 1008, 1008, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    concepts = torch.randn(1, 8, 256, generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name, meta_sam3.on_cpu():
        folder = Path(name)
        meta = meta_sam3.build(meta_sam3.write_vocabulary(folder / BPE_NAME), small=False)
        meta_sam3.save(meta, folder / "sam3.pt")
        text = read_bpe(folder / BPE_NAME)(
            prompts, padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        expected = meta_sam3.run_theirs(meta, pixels, prompts, concepts)
        del meta
        gc.collect()
        ours = meta_sam3.load_ours(folder / "sam3.pt")
        actual = meta_sam3.run_ours(ours, pixels, text["input_ids"], text["attention_mask"], concepts)
    mask = text["attention_mask"].bool()
    print("text features equal:", torch.equal(actual["text"][mask], expected["text"][mask]))
    for name in ("semantic_seg", "presence", "boxes", "masks"):
        error = meta_sam3.relative_error(actual[name], expected[name])
        print(f"{name}: relative error {error:.1e}, largest value {expected[name].abs().max():.3g}")


if __name__ == "__main__":
    main()
