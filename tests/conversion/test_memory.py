"""A conversion keeps at most one shard in memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from conceptseg_hf import ConceptSegConfig

from .conftest import NUM_QUERIES, old_config, original_tensors, save_sharded

SHARDS = 5

# Increase of the peak resident memory, including heap and memory-mapped files.
MEASURE = """
import sys
from pathlib import Path
from conceptseg_hf.conversion import convert

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

warm_up, checkpoint, sam, out = sys.argv[1:]
convert(warm_up, sam, out + "-warm")  # imports and allocator
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = resident("VmRSS")
convert(checkpoint, sam, out, shard_bytes=30_000_000)
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_is_below_one_shard(parts, processor, tmp_path, fresh_python):
    content = ConceptSegConfig.from_preset("nano").vlm_config.to_dict()
    content["text_config"] |= {"intermediate_size": 16384, "num_hidden_layers": 8, "layer_types": None}
    config = Qwen2_5_VLConfig(**content)
    vlm = Qwen2_5_VLForConditionalGeneration(config)
    folder = tmp_path / "large"
    folder.mkdir()
    save_sharded(original_tensors(vlm, parts.ctm), folder, SHARDS)
    (folder / "config.json").write_text(json.dumps({**old_config(config), "num_of_query": NUM_QUERIES}))
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)

    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    assert len(sizes) == SHARDS and max(sizes) > 40_000_000
    arguments = (parts.checkpoint, folder, parts.sam_folder, tmp_path / "out")
    peak = int(fresh_python(MEASURE, *map(str, arguments)).splitlines()[-1])
    assert peak < 1.2 * max(sizes) < 0.4 * sum(sizes), f"{peak / max(sizes):.2f} of the largest shard"
    assert len(list(Path(tmp_path, "out").glob("*.safetensors"))) > SHARDS
