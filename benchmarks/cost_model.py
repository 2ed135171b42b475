"""Estimates what a batch job costs at 7B, from the operations and bytes of each part; the model is not run.

    python benchmarks/cost_model.py                     # one H100: 989 TFLOP/s in bfloat16, 3.35 TB/s
    python benchmarks/cost_model.py --tflops 67         # the same in float32

Operations: two per parameter and token, and four per pair of tokens and channel in attention. Bytes: the language
model reads its weights once per generated token of a batch, and the keys and values of each sample. A part takes the
longer of its two times. Reading and preprocessing an image on the CPU is measured.
"""

from __future__ import annotations

import argparse
import io
import time
from dataclasses import dataclass

import torch
from PIL import Image

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.vlm_families import get_family

REASONING = 0.06
"""Share of images on which the model reasons; that of the embedded checkpoint in docs/concepts.md."""


@dataclass(frozen=True)
class Part:
    """Cost of a part of the work for one image.

    Attributes:
        name: Name in the table.
        operations: Floating-point operations.
        num_bytes: Bytes read from memory.
    """

    name: str
    operations: float
    num_bytes: float = 0.0


def count(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def dense(parameters: float, tokens: float) -> float:
    """Operations of linear layers."""
    return 2 * parameters * tokens


def attention(tokens: float, visible: float, channels: int, layers: int) -> float:
    """Operations of attention, where each token sees `visible` tokens."""
    return 4 * tokens * visible * channels * layers


def sam_parts(model: ConceptSegForSegmentation) -> list[Part]:
    """SAM 3's image encoder, and its decoding of one prompt."""
    config = model.config.sam_config
    backbone = config.vision_config.backbone_config
    side = backbone.image_size // backbone.patch_size
    tokens, width = side**2, backbone.hidden_size
    full = len(backbone.global_attn_indexes)
    encoder = dense(count(model.sam.vision_encoder), tokens)
    encoder += attention(tokens, tokens, width, full)
    encoder += attention(tokens, backbone.window_size**2, width, backbone.num_hidden_layers - full)
    detr = config.detr_encoder_config
    decoding = dense(count(model.sam.detr_encoder), tokens)
    decoding += attention(tokens, tokens, detr.hidden_size, detr.num_layers)
    decoding += dense(count(model.sam.mask_decoder), (4 * side) ** 2)
    return [Part("SAM 3: image", encoder), Part("SAM 3: one phrase", decoding)]


def vlm_parts(
    model: ConceptSegForSegmentation,
    canvas: int,
    text: int,
    completion: int,
    batch: int,
    has_references: bool,
) -> list[Part]:
    """The VLM's images, the prompt, and the generated tokens."""
    vision = model.config.vlm_config.vision_config
    language = model.config.vlm_config.get_text_config()
    merged = round(canvas / vision.patch_size / vision.spatial_merge_size)
    images = 2 if has_references else 1
    patches = images * (merged * vision.spatial_merge_size) ** 2
    prompt = images * merged**2 + text
    tower = get_family(model.vlm.config).vision_tower(model.vlm)
    decoder = model.vlm.model.language_model
    weights = count(decoder) - decoder.embed_tokens.weight.numel() + count(model.vlm.lm_head)
    per_token = 2 * 2 * language.num_hidden_layers * language.num_key_value_heads
    head_dim = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
    per_token *= head_dim  # bytes of keys and values in bfloat16
    prefill = dense(count(decoder) - decoder.embed_tokens.weight.numel(), prompt)
    prefill += attention(prompt, prompt / 2, language.hidden_size, language.num_hidden_layers)
    length = prompt + completion / 2
    return [
        Part("VLM: images", dense(count(tower), patches)),
        Part(f"VLM: prompt of {prompt:.0f} tokens", prefill),
        Part(
            f"VLM: {completion} generated tokens",
            dense(weights, completion),
            completion * (2 * weights / batch + per_token * length),
        ),
    ]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="7b")
    parser.add_argument(
        "--tflops", type=float, default=989, help="peak of the device in the dtype of the weights"
    )
    parser.add_argument("--bandwidth", type=float, default=3.35, help="terabytes per second")
    parser.add_argument("--compute-use", type=float, default=0.4, help="part of the peak that is reached")
    parser.add_argument("--bandwidth-use", type=float, default=0.6)
    parser.add_argument("--canvas", type=int, default=616, help="side of the VLM's images in pixels")
    parser.add_argument("--text", type=int, default=350, help="text tokens of the prompt")
    parser.add_argument("--completion", type=int, default=180, help="generated tokens")
    arguments = parser.parse_args()
    with torch.device("meta"):
        model = ConceptSegForSegmentation(ConceptSegConfig.from_preset(arguments.preset))
    operations = arguments.tflops * 1e12 * arguments.compute_use
    bandwidth = arguments.bandwidth * 1e12 * arguments.bandwidth_use

    def seconds(parts: list[Part]) -> float:
        return sum(max(part.operations / operations, part.num_bytes / bandwidth) for part in parts)

    sam = sam_parts(model)
    print("| part, per image | TFLOP | GB read | ms |\n|---|---|---|---|")
    batches = (1, 16, 64)
    rows = {
        batch: vlm_parts(model, arguments.canvas, arguments.text, arguments.completion, batch, True)
        for batch in batches
    }
    for part in (*sam, *rows[1][:2]):
        print(f"| {part.name} | {part.operations / 1e12:.1f} | - | {1000 * seconds([part]):.0f} |")
    for batch, parts in rows.items():
        part = parts[2]
        print(
            f"| {part.name}, batch {batch} | {part.operations / 1e12:.1f} | {part.num_bytes / 1e9:.0f} | "
            f"{1000 * seconds([part]):.0f} |"
        )
    concept = seconds(sam)
    share = f"{1 - REASONING:.0%} by concept, images/s"
    print(f"\n| batch | concept, images/s | reasoning, images/s | {share} |\n|---|---|---|---|")
    for batch in (1, 16, 64, 256):
        # Only the images of a batch whose concept is not accepted reach the VLM together.
        together = max(batch * REASONING, 1)
        always, sometimes = (
            seconds(vlm_parts(model, arguments.canvas, arguments.text, arguments.completion, size, True))
            for size in (batch, together)
        )
        mixed = concept + REASONING * sometimes
        print(f"| {batch} | {1 / concept:.1f} | {1 / (concept + always):.1f} | {1 / mixed:.1f} |")
    print(f"\nCPU: {preprocessing_seconds():.2f} s of one core per JPEG of 12 megapixels")


def preprocessing_seconds() -> float:
    """Median CPU seconds for reading a JPEG of 12 megapixels and preparing it for SAM 3 and the VLM."""
    from transformers import Sam3ImageProcessor

    torch.set_num_threads(1)
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    processor.sam_image_processor = Sam3ImageProcessor()
    small = Image.effect_noise((400, 300), 60).convert("RGB")
    buffer = io.BytesIO()
    small.resize((4000, 3000), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    times = []
    for _ in range(5):
        start = time.process_time()
        processor.prepare(buffer.getvalue(), "shadow", lazy=True)
        times.append(time.process_time() - start)
    return sorted(times)[2]


if __name__ == "__main__":
    main()
