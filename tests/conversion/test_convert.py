"""A converted checkpoint gives the same outputs as its parts."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from parity.reference_ctm import translate
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from conceptseg_hf import ConceptSegConfig, ConceptSegForSegmentation, ConceptSegProcessor, cli, sam_prompt
from conceptseg_hf.conversion import MANIFEST_NAME, convert, to_original
from conceptseg_hf.profiles import profile_changes
from conceptseg_hf.prompt_template import OFFICIAL_TEMPLATE, PromptTemplate

from .conftest import NUM_QUERIES


@pytest.fixture(scope="module")
def converted(parts, tmp_path_factory):
    return convert(parts.checkpoint, parts.sam_folder, tmp_path_factory.mktemp("out") / "model")


def test_auto_classes_load_the_converted_checkpoint(converted):
    model = AutoModel.from_pretrained(converted)
    processor = AutoProcessor.from_pretrained(converted)
    assert type(model) is ConceptSegForSegmentation and type(processor) is ConceptSegProcessor
    assert model.config.ctm_config.num_queries == NUM_QUERIES
    assert model.config.ctm_config.num_attention_heads == 16
    assert (processor.canvas_size, processor.coordinate_scale, processor.sam_text_length) == (600, 600, 32)
    assert processor.template.system == "You are a helpful assistant. "
    assert model.config.profile == "released" and model.config.end_of_turn_state
    assert profile_changes("released", model.config, processor) == {}
    assert "{reference_box_list}" in processor.template.with_proxy


def test_profile_and_custom_prompt_template(parts, tmp_path):
    instructions = dict.fromkeys(
        ("with_proxy", "support_only", "single_reference", "no_reference"), "{problem} in my words"
    )
    template = PromptTemplate(system="Short.", **instructions)
    folders = {
        profile: convert(parts.checkpoint, parts.sam_folder, tmp_path / profile, profile=profile)
        for profile in ("paper", "released")
    }
    custom = convert(parts.checkpoint, parts.sam_folder, tmp_path / "custom", prompt_template=template)
    config, processor = ConceptSegConfig.from_pretrained(custom), AutoProcessor.from_pretrained(custom)
    assert processor.template == template and config.profile == "released"
    config = ConceptSegConfig.from_pretrained(folders["paper"])
    processor = AutoProcessor.from_pretrained(folders["paper"])
    assert config.non_default_fields == {"profile": "paper"} and processor.mosaic is None
    assert processor.template == replace(OFFICIAL_TEMPLATE, system="You are a helpful assistant. ")
    with pytest.raises(ValueError, match="unknown profile 'theirs'"):
        convert(parts.checkpoint, parts.sam_folder, tmp_path / "none", profile="theirs")

    # A round trip through the authors' layout keeps the settings, unless another profile is given.
    original = to_original(custom, tmp_path / "original")
    for profile, kept in ((None, "released"), ("paper", "paper")):
        again = convert(original, parts.sam_folder, tmp_path / f"again-{profile}", profile=profile)
        config, processor = ConceptSegConfig.from_pretrained(again), AutoProcessor.from_pretrained(again)
        assert config.profile == kept and profile_changes(kept, config, processor) == {}
        assert processor.template == template


@torch.no_grad()
def test_outputs_match_the_parts(converted, parts, picture):
    model = AutoModel.from_pretrained(converted).eval()
    processor = AutoProcessor.from_pretrained(converted)
    processor.canvas_size, processor.sam_text_length = 64, 8  # sizes of the nano model
    sample = processor.prepare(picture(1), "red circle", [{"image": picture(2), "box": (4, 4, 30, 30)}])
    inputs = dict(processor.collate([sample]))
    prompt_length = inputs["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

    # Reference: the VLM generates and encodes the completion, the reference CTM translates, SAM 3 decodes.
    ids = parts.vlm.generate(**inputs, **options)
    token_types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, ids.shape[1] - prompt_length))
    parts.vlm.model.rope_deltas = None
    states = parts.vlm.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=token_types,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    ).last_hidden_state[0, prompt_length:]
    concepts = translate(parts.ctm, states)[None]
    text_ids, text_mask = processor.sam_text(["red circle"])
    pixels = sample.sam_pixel_values[None]
    features = sam_prompt.encode_image(parts.sam, pixels)
    text, mask = sam_prompt.encode_text(parts.sam, text_ids, text_mask)
    expected = sam_prompt.decode(parts.sam, features, text, mask, concepts)

    assert torch.equal(model.generate(**inputs, **options), ids)
    completion_mask = torch.zeros_like(ids, dtype=torch.bool)
    completion_mask[:, prompt_length:] = True
    output = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=token_types,
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
        completion_mask=completion_mask,
        sam_pixel_values=pixels,
        sam_input_ids=text_ids,
        sam_attention_mask=text_mask,
    )
    torch.testing.assert_close(output.concept_embeds, concepts, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.mask_logits, expected.semantic_seg, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.presence_logits, expected.presence_logits, atol=1e-5, rtol=0)
    assert concepts.std() > 0.05 and expected.semantic_seg.std() > 0.05  # outputs are not trivial


def test_manifest_and_card(converted, parts):
    text = (converted / MANIFEST_NAME).read_text()
    manifest = json.loads(text)
    assert str(parts.checkpoint.parent) not in text  # names and hashes, but no local paths
    sources = manifest["sources"]
    assert {role: source["name"] for role, source in sources.items()} == {
        "checkpoint": parts.checkpoint.name,
        "sam": parts.sam_folder.name,
    }
    for folder, source in ((parts.checkpoint, sources["checkpoint"]), (parts.sam_folder, sources["sam"])):
        assert {name for name in source["files"] if name.endswith(".safetensors")} == {
            path.name for path in folder.glob("*.safetensors")
        }
        for name, file in source["files"].items():
            content = (folder / name).read_bytes()
            assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert not manifest["missing"] and not manifest["unexpected"] and not manifest["misshapen"]
    assert "6 concept queries" in (converted / "README.md").read_text()
    assert not [path for path in converted.parent.iterdir() if path != converted]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(make_parts, tmp_path, dtype):
    parts = make_parts(tied=False, dtype=dtype)
    model = AutoModel.from_pretrained(convert(parts.checkpoint, parts.sam_folder, tmp_path / "out"))
    assert {value.dtype for value in model.vlm.parameters()} == {dtype}
    assert {value.dtype for value in (*model.sam.parameters(), *model.ctm.parameters())} == {torch.float32}
    assert torch.equal(model.vlm.lm_head.weight, parts.tensors["lm_head.weight"])
    kv = parts.tensors["connector.blocks.1.attn.kv.weight"]
    assert torch.equal(model.ctm.blocks[1].attn.kv.weight, kv.float())
    low = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert low.vlm.dtype == torch.bfloat16 and low.sam.dtype == low.ctm.queries.dtype == torch.float32


def test_current_transformers_layout_is_read(parts, tmp_path):
    """Since 4.52, Transformers uses the prefixes `model.language_model` and `model.visual`."""
    folder = tmp_path / "newer"
    shutil.copytree(parts.checkpoint, folder, ignore=shutil.ignore_patterns("model*"))
    tensors = {
        name: value.clone() for name, value in parts.vlm.state_dict().items() if name != "lm_head.weight"
    }
    save_file({**tensors, **parts.ctm}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    section = config["rope_scaling"]["mrope_section"]  # as saved by newer releases after loading "mrope"
    config["rope_scaling"] = {"type": "default", "rope_type": "default", "mrope_section": section}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(convert(folder, parts.sam_folder, tmp_path / "out"))
    for name, value in parts.vlm.state_dict().items():
        assert torch.equal(model.vlm.state_dict()[name], value), name
    rope, expected = (
        config.text_config.rope_parameters for config in (model.config.vlm_config, parts.vlm.config)
    )
    assert {name: rope[name] for name in expected} == expected


def test_shards(parts, tmp_path):
    out = convert(parts.checkpoint, parts.sam_folder, tmp_path / "out", shard_bytes=1_000_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 5 and files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    largest = max(value.nbytes for value in parts.tensors.values())
    assert all(file.stat().st_size < max(1_000_000, largest) + 50_000 for file in files)
    model = AutoModel.from_pretrained(out)
    assert torch.equal(model.sam.text_projection.weight, parts.sam.text_projection.weight)


def test_command_line(parts, tmp_path, capsys):
    arguments = ["convert", "--checkpoint", str(parts.checkpoint), "--sam", str(parts.sam_folder)]
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "fits" and list(tmp_path.iterdir()) == []
    out = str(tmp_path / "out")
    assert cli.main([*arguments, "--out", out]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert cli.main(["info", out, "--hashes"]) == 0
    output = capsys.readouterr().out
    for text in ("6 concept tokens", "ctm on disk", "float32", "sam from", "unchanged since", "preset"):
        assert text in output
    with (tmp_path / "out" / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"abcd")
    assert cli.main(["info", out, "--hashes"]) == 0
    assert "CHANGED since conversion" in capsys.readouterr().out
    assert "profile" in output and "released" in output
    assert cli.main(["info", out, "--model", out]) == 2
    back = ["convert", "--to-original", "--checkpoint", out, "--out", f"{out}-back"]
    assert cli.main([*back, "--profile", "paper"]) == 2
    assert "--profile cannot be combined with --to-original" in capsys.readouterr().err
    (tmp_path / "template.json").write_text(json.dumps(OFFICIAL_TEMPLATE.to_dict()))
    options = ["--profile", "paper", "--prompt-template", str(tmp_path / "template.json")]
    assert cli.main([*arguments, "--out", f"{out}-paper", *options]) == 0
    assert AutoProcessor.from_pretrained(f"{out}-paper").template == OFFICIAL_TEMPLATE
    assert cli.main(["convert", "--to-original", "--checkpoint", out, "--out", f"{out}-back"]) == 0
