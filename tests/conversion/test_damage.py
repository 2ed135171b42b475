"""Damaged and malicious inputs raise one-sentence errors, leave no output and execute no code."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conceptseg_hf import cli
from conceptseg_hf.conversion import ConversionError, convert, to_original

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture()
def checkpoint(parts, tmp_path):
    """A copy of the checkpoint that tests may damage."""
    return shutil.copytree(parts.checkpoint, tmp_path / "authors")


@pytest.fixture()
def sam_folder(parts, tmp_path):
    return shutil.copytree(parts.sam_folder, tmp_path / "sam")


def change_shard(folder, change) -> None:
    tensors = load_file(folder / FIRST)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    save_file(tensors, folder / FIRST, metadata={"format": "pt"})


def change_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def index_name(folder, shard, name) -> None:
    change_json(folder / INDEX, lambda content: content["weight_map"].update({name: shard}))


def cut_short(folder):
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: len(content) // 2])


def cut_in_header(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:40])


def lose_shard(folder):
    (folder / FIRST).unlink()


def lose_index(folder):
    (folder / INDEX).unlink()


def lose_index_entry(folder):
    change_json(folder / INDEX, lambda content: content["weight_map"].pop("model.norm.weight"))


def promise_too_much(folder):
    index_name(folder, FIRST, "model.layers.99.mlp.up_proj.weight")


def point_outside(folder):
    index_name(folder, "../../etc/passwd", "model.norm.weight")


def break_index(folder):
    (folder / INDEX).write_text("{")


def lose_config(folder):
    (folder / "config.json").unlink()


def wrong_config(folder):
    change_json(folder / "config.json", lambda content: content.update(hidden_size="wide"))


def wrong_family(folder):
    change_json(folder / "config.json", lambda content: content.update(model_type="llama"))


def add_tensor(folder):
    change_shard(folder, lambda tensors: tensors.update({"optimizer.step": torch.ones(1)}))
    index_name(folder, FIRST, "optimizer.step")


def add_twice(folder):
    name = "model.language_model.norm.weight"  # the current name of model.norm.weight
    change_shard(folder, lambda tensors: tensors.update({name: torch.ones(128)}))
    index_name(folder, FIRST, name)


def lose_tensor(folder):
    name = "model.norm.weight"
    shard = json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(folder / shard)
    tensors = {key: value.clone() for key, value in tensors.items() if key != name}
    save_file(tensors, folder / shard)
    lose_index_entry(folder)


def wrong_number_of_queries(folder):
    shard = json.loads((folder / INDEX).read_text())["weight_map"]["connector.pos_embed"]
    tensors = {key: value.clone() for key, value in load_file(folder / shard).items()}
    tensors["connector.pos_embed"] = tensors["connector.pos_embed"][:, :-1].contiguous()
    save_file(tensors, folder / shard)


def put_nan(folder):
    def change(tensors):
        next(value for value in tensors.values() if value.ndim == 2)[0, 0] = float("nan")

    change_shard(folder, change)


def put_infinity(folder):
    change_shard(folder, lambda tensors: next(iter(tensors.values())).view(-1)[-1:].fill_(float("inf")))


def quantize(folder):
    def change(tensors):
        name = next(name for name, value in tensors.items() if value.ndim == 2)
        tensors[name] = tensors[name].to(torch.int8)

    change_shard(folder, change)


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def break_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, f"{FIRST}' is damaged or truncated"),
        (cut_in_header, f"{FIRST}' is damaged or truncated"),
        (lose_shard, f"{FIRST}' does not exist"),
        (lose_index, "model.safetensors' does not exist"),
        (lose_index_entry, "does not map tensor 'model.norm.weight' to"),
        (promise_too_much, "lists tensor 'model.layers.99"),
        (point_outside, "lists a shard outside its folder"),
        (break_index, "cannot be read as JSON"),
        (lose_config, "contains no config.json"),
        (wrong_config, "does not describe a model"),
        (wrong_family, "has model_type 'llama'"),
        (add_tensor, r"1 unexpected \(optimizer.step\)"),
        (add_twice, "would both become 'vlm.model.language_model.norm.weight'"),
        (lose_tensor, r"1 missing \(vlm.model.language_model.norm.weight\)"),
        (
            wrong_number_of_queries,
            r"1 of another shape \(connector.pos_embed: \(1, 5, 128\) instead of \(1, 6, 128\)\)",
        ),
        (put_nan, "contains NaN or infinite values"),
        (put_infinity, "contains NaN or infinite values"),
        (quantize, "does not have a floating-point dtype"),
        (lose_tokenizer, "contains no tokenizer"),
        (break_tokenizer, "cannot be combined in a processor"),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_damaged_checkpoints_are_rejected_in_one_sentence(
    checkpoint, parts, tmp_path, capsys, damage, message
):
    damage(checkpoint)
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "new" / "out"
    arguments = [
        "convert",
        "--checkpoint",
        str(checkpoint),
        "--sam",
        str(parts.sam_folder),
        "--out",
        str(out),
    ]
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in lines if line.startswith("conceptseg convert: ")]
    assert len(errors) == 1 and errors[0].endswith(".")
    with pytest.raises(ConversionError, match=message):
        convert(checkpoint, parts.sam_folder, out)
    assert set(tmp_path.rglob("*")) == before


class Bomb:
    """An object whose pickle executes code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_pickles_execute_no_code(parts, tmp_path, save):
    (tmp_path / "sam").mkdir()
    save(
        {"model": {"detector.x": torch.ones(2), "bomb": Bomb(tmp_path / "exploded")}},
        tmp_path / "sam" / "sam3.pt",
    )
    for sam in (tmp_path / "sam", tmp_path / "sam" / "sam3.pt"):
        with pytest.raises(ConversionError, match="not loaded because they could execute code"):
            convert(parts.checkpoint, sam, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"sam"}


def test_pickles_next_to_safetensors_are_not_opened(parts, sam_folder, checkpoint, tmp_path):
    torch.save(Bomb(tmp_path / "exploded"), sam_folder / "sam3.pt")
    torch.save(Bomb(tmp_path / "exploded"), checkpoint / "pytorch_model.bin")
    convert(checkpoint, sam_folder, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()


def test_remote_code_is_not_executed(checkpoint, parts, tmp_path):
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'exploded')!r}, 'w')\nclass Evil: pass\n")
    automap = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"), "evil.Evil")
    change_json(checkpoint / "config.json", lambda content: content.update(auto_map=automap))
    change_json(
        checkpoint / "tokenizer_config.json",
        lambda content: content.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    )
    out = convert(checkpoint, parts.sam_folder, tmp_path / "out")
    assert not (tmp_path / "exploded").exists()
    assert not list(out.glob("*.py")) and "auto_map" not in (out / "config.json").read_text()


def test_damaged_sam3_pt(parts, tmp_path):
    torch.save({"model": {"detector.x": torch.ones(10_000)}}, tmp_path / "sam3.pt")
    (tmp_path / "sam3.pt").write_bytes((tmp_path / "sam3.pt").read_bytes()[:5000])
    with pytest.raises(ConversionError, match="is damaged or truncated"):
        convert(parts.checkpoint, tmp_path / "sam3.pt", tmp_path / "out")
    torch.save([1, 2], tmp_path / "sam3.pt")
    with pytest.raises(ConversionError, match="contains no state dict"):
        convert(parts.checkpoint, tmp_path / "sam3.pt", tmp_path / "out")


def test_sam_of_another_type_is_rejected(sam_folder, checkpoint, tmp_path):
    change_json(sam_folder / "config.json", lambda content: content.update(model_type="sam2"))
    with pytest.raises(ConversionError, match="has model_type 'sam2'"):
        convert(checkpoint, sam_folder, tmp_path / "out")


def test_existing_folder_is_not_overwritten(parts, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for run in (
        lambda: convert(parts.checkpoint, parts.sam_folder, tmp_path / "out"),
        lambda: to_original("nowhere", tmp_path / "out"),
    ):
        with pytest.raises(ConversionError, match="exists and is not empty"):
            run()
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_empty_output_folder_is_accepted(parts, tmp_path):
    (tmp_path / "out").mkdir()
    assert (convert(parts.checkpoint, parts.sam_folder, tmp_path / "out") / "model.safetensors").is_file()


def test_mismatched_tensors_can_be_skipped(checkpoint, parts, tmp_path):
    add_tensor(checkpoint)
    out = convert(checkpoint, parts.sam_folder, tmp_path / "out", allow_mismatch=True)
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["unexpected"] == ["optimizer.step"] and manifest["missing"] == []
    with safe_open(out / "model.safetensors", "pt") as file:
        assert len(file.keys()) == manifest["tensors"]


def test_failed_write_is_explained(parts, tmp_path, limited_files):
    with (
        limited_files(200_000),
        pytest.raises(ConversionError, match=r"'model\.safetensors' cannot be written"),
    ):
        convert(parts.checkpoint, parts.sam_folder, tmp_path / "a" / "out")
    assert not (tmp_path / "a").exists()


def test_tied_embeddings_must_be_equal(checkpoint, parts, tmp_path):
    change_json(checkpoint / "config.json", lambda content: content.update(tie_word_embeddings=True))
    weight = parts.tensors["model.embed_tokens.weight"]

    def add_head(value):
        change_shard(checkpoint, lambda tensors: tensors.update({"lm_head.weight": value.clone()}))
        index_name(checkpoint, FIRST, "lm_head.weight")

    add_head(weight + 1)
    with pytest.raises(
        ConversionError, match=r"'lm_head\.weight' differs from 'model\.embed_tokens\.weight'"
    ):
        convert(checkpoint, parts.sam_folder, tmp_path / "out")
    add_head(weight)  # an equal tied tensor is accepted
    out = convert(checkpoint, parts.sam_folder, tmp_path / "out")
    with safe_open(out / "model.safetensors", "pt") as file:
        assert "vlm.lm_head.weight" not in file.keys()  # noqa: SIM118


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "/no/such/folder", "a/b/c"])
def test_names_that_do_not_exist_are_rejected(name, parts, tmp_path):
    with pytest.raises(ConversionError, match="neither an existing file or folder nor a hub id"):
        convert(name, parts.sam_folder, tmp_path / "out")


def test_failed_download_is_explained(parts, tmp_path):
    with pytest.raises(ConversionError, match="cannot be downloaded from the Hub"):  # the tests are offline
        convert("owner/name", parts.sam_folder, tmp_path / "out")


def test_plain_vlm_is_rejected_with_a_hint(parts, checkpoint, tmp_path):
    shutil.rmtree(checkpoint)
    parts.vlm.save_pretrained(checkpoint)
    with pytest.raises(ConversionError, match="from_backbones"):
        convert(checkpoint, parts.sam_folder, tmp_path / "out")


def test_to_original_requires_a_converted_checkpoint(parts, tmp_path):
    with pytest.raises(ConversionError, match="requires a converted checkpoint"):
        to_original(parts.checkpoint, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x", "--out", "y"], "--sam is missing"),
        (["--checkpoint", "x", "--sam", "z"], "--out is missing"),
        (["--checkpoint", "x", "--sam", "z", "--out", "y", "--to-original"], "--sam cannot be combined"),
        (["--checkpoint", "x", "--to-original", "--dry-run"], "--dry-run cannot be combined"),
    ],
)
def test_invalid_options(arguments, message, capsys):
    assert cli.main(["convert", *arguments]) == 2
    assert message in capsys.readouterr().err
