"""Conversion plans for the released model sizes, with real names and shapes in sparse files without weights."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import pytest
import torch
from parity.reference_ctm import ctm_shapes
from transformers import Sam3Config, Sam3Model

from conceptseg_hf import cli
from conceptseg_hf.conversion import plan_conversion

# hidden size, intermediate size, layers, width of keys and values, vocabulary size, tied embeddings
SIZES = {"3b": (2048, 11008, 36, 256, 151936, True), "7b": (3584, 18944, 28, 512, 152064, False)}
# Total bytes of all tensors in bfloat16, from the published index files of Qwen2.5-VL.
PUBLISHED_BYTES = {"3b": 7_509_245_952, "7b": 16_584_333_312}


def qwen_shapes(hidden, intermediate, layers, kv_width, vocabulary, tied) -> dict[str, tuple[int, ...]]:
    """Shapes of Qwen2.5-VL in the published layout."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    shapes["visual.patch_embed.proj.weight"] = (1280, 3, 2, 14, 14)
    for i in range(32):
        block = f"visual.blocks.{i}"
        shapes[f"{block}.norm1.weight"] = shapes[f"{block}.norm2.weight"] = (1280,)
        linear(f"{block}.attn.qkv", 1280, 3840)
        linear(f"{block}.attn.proj", 1280, 1280)
        linear(f"{block}.mlp.gate_proj", 1280, 3420)
        linear(f"{block}.mlp.up_proj", 1280, 3420)
        linear(f"{block}.mlp.down_proj", 3420, 1280)
    shapes["visual.merger.ln_q.weight"] = (1280,)
    linear("visual.merger.mlp.0", 5120, 5120)
    linear("visual.merger.mlp.2", 5120, hidden)

    shapes["model.embed_tokens.weight"] = (vocabulary, hidden)
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        linear(f"{layer}.self_attn.q_proj", hidden, hidden)
        linear(f"{layer}.self_attn.k_proj", hidden, kv_width)
        linear(f"{layer}.self_attn.v_proj", hidden, kv_width)
        linear(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
        linear(f"{layer}.mlp.gate_proj", hidden, intermediate, bias=False)
        linear(f"{layer}.mlp.up_proj", hidden, intermediate, bias=False)
        linear(f"{layer}.mlp.down_proj", intermediate, hidden, bias=False)
    shapes["model.norm.weight"] = (hidden,)
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def published_config(
    hidden, intermediate, layers, kv_width, vocabulary, tied, model_type="qwen2_5_vl"
) -> dict:
    vision = {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": hidden,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    }
    if model_type == "qwen2_vl":  # in Qwen2-VL, `hidden_size` is the width of the language model
        vision |= {"hidden_size": hidden, "embed_dim": 1280, "mlp_ratio": 4}
    return {
        "architectures": ["ConceptSegR1ForConditionalGeneration_qwen2p5"],
        "model_type": model_type,
        "num_of_query": 16,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": kv_width // 128,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "max_position_embeddings": 128000,
        "max_window_layers": layers,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_config": vision,
    }


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int) -> int:
    """Write a safetensors file with a valid header and a hole instead of data, and return the data size."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + offset)
    return offset


def write_sharded(folder: Path, shapes: dict[str, tuple[int, ...]], count: int) -> int:
    weight_map, total, names = {}, 0, list(shapes)
    for number in range(count):
        part = {name: shapes[name] for name in names[number::count]}
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        total += write_sparse(folder / file, part, "BF16", 2)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory):
    """SAM 3 in the layout of facebook/sam3: the video model, which contains the detector."""
    folder = tmp_path_factory.mktemp("sam3")
    with torch.device("meta"):
        sam = Sam3Model(Sam3Config())
    shapes = {f"detector_model.{name}": tuple(value.shape) for name, value in sam.state_dict().items()}
    shapes |= {"tracker_model.memory.weight": (8, 8), "tracker_neck.fpn_layers.0.proj1.bias": (256,)}
    write_sparse(folder / "model.safetensors", shapes, "F32", 4)
    config = {"model_type": "sam3_video", "detector_config": Sam3Config().to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "model_type"), [("3b", "qwen2_5_vl"), ("7b", "qwen2_5_vl"), ("7b", "qwen2_vl")]
)
def test_all_released_tensors_are_converted(tmp_path, sam_folder, name, model_type, capsys):
    size = SIZES[name]
    vlm, ctm = qwen_shapes(*size), ctm_shapes(size[0], 256, 8, 4)
    assert 2 * sum(map(prod, vlm.values())) == PUBLISHED_BYTES[name]
    (tmp_path / "config.json").write_text(json.dumps(published_config(*size, model_type)))
    written = write_sharded(tmp_path, {**vlm, **ctm}, 5)

    conversion = plan_conversion(tmp_path, sam_folder)
    plan, config = conversion.plan, conversion.config
    assert plan.fits, plan.mismatches()
    assert plan.ignored == ["tracker_model.memory.weight", "tracker_neck.fpn_layers.0.proj1.bias"]
    assert config.ctm_config.num_queries == 8 and config.ctm_config.num_layers == 4  # from the tensor shapes
    assert config.tie_word_embeddings is size[5] and config.hidden_size == size[0]
    assert (config.vlm_config.vision_config.hidden_size, config.vlm_config.vision_config.depth) == (1280, 32)

    def part(prefix):
        return [step for step in plan.steps if step.target.startswith(prefix)]

    assert len(part("vlm.")) == len(vlm) and {step.dtype for step in part("vlm.")} == {torch.bfloat16}
    assert sum(step.nbytes for step in part("vlm.")) == PUBLISHED_BYTES[name]
    assert len(part("ctm.")) == len(ctm) and {step.dtype for step in part("ctm.")} == {torch.float32}
    assert sum(step.nbytes for step in part("ctm.")) == 4 * sum(map(prod, ctm.values()))
    assert written == PUBLISHED_BYTES[name] + 2 * sum(map(prod, ctm.values()))
    assert len(part("sam.")) == 1468 and {step.dtype for step in part("sam.")} == {torch.float32}

    arguments = ["convert", "--checkpoint", str(tmp_path), "--sam", str(sam_folder), "--dry-run"]
    assert cli.main(arguments) == 0 and capsys.readouterr().out.splitlines()[-1] == "fits"
