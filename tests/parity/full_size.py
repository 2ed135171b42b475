"""The comparison of test_meta_sam3.py once at full size: 840 million random weights, images of 1008 pixels.

Takes some 12 GB of memory and a quarter of an hour on two cores:

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
    """Builds, converts, runs both, and says how far they are apart."""
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
        wanted = meta_sam3.run_theirs(meta, pixels, prompts, concepts)
        del meta
        gc.collect()
        ours = meta_sam3.load_ours(folder / "sam3.pt")
        got = meta_sam3.run_ours(ours, pixels, text["input_ids"], text["attention_mask"], concepts)
    mask = text["attention_mask"].bool()
    print("text features equal:", torch.equal(got["text"][mask], wanted["text"][mask]))
    for name in ("semantic_seg", "presence", "boxes", "masks"):
        error = meta_sam3.relative_error(got[name], wanted[name])
        print(f"{name}: relative error {error:.1e}, largest value {wanted[name].abs().max():.3g}")


if __name__ == "__main__":
    main()
