"""MIG-Bench and MGrounding as published by their owners, with boxes and without masks."""

from __future__ import annotations

import pytest
from trees import SIZE, save_image, save_json

from conceptseg_hf.data import MissingFilesError, load_benchmark
from conceptseg_hf.data.layouts.grounding import named_image


def mig_item(root, task="reasoning", **changes):
    images = [f"./MIG-Bench/images/{task}/case097_{number}.png" for number in (1, 2)]
    for number, image in enumerate(images):
        save_image(root / image.removeprefix("./MIG-Bench/"), seed=number)
    return {
        "task": task,
        "images": images,
        "question": "Which item shares the feature of Image-1? Find it in the second image. ",
        "answer": [0.25, 0.25, 0.5, 0.75],
        "additional_info": "Which item shares the feature of Image-1?",
        "need_format": True,
    } | changes


def test_mig_bench(tmp_path):
    root = tmp_path / "MIG-Bench"
    items = [mig_item(root), mig_item(root, "group_grounding"), mig_item(root, "diff")]
    save_json(root / "MIG_data.json", items)
    samples = load_benchmark("mig-bench", root)
    assert [sample.group for sample in samples] == ["rationality", "difference"]
    sample = samples[0]
    assert sample.box_only and sample.box == (6, 4, 12, 12)
    assert sample.mask.getbbox() == (6, 4, 12, 12)
    assert sample.prompt.endswith("second image.") and sample.image.size == SIZE
    assert [reference.image.name for reference in sample.references] == ["case097_1.png"]
    (tmp_path / "MIG_data.json").write_bytes((root / "MIG_data.json").read_bytes())
    assert len(load_benchmark("mig-bench", tmp_path)) == 2, "root may also be the parent of MIG-Bench"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "item 0 of MIG_data.json lacks"),
        ({"images": []}, "has no images"),
        ({"images": ["../../x.png"]}, "is outside of"),
    ],
)
def test_malformed_items_raise_an_error(tmp_path, change, message):
    save_json(tmp_path / "MIG_data.json", [mig_item(tmp_path, **change)])
    with pytest.raises(ValueError, match=message):
        load_benchmark("mig-bench", tmp_path)


def test_mgrounding(tmp_path):
    root = tmp_path / "MGrounding-630k"
    images = [f"./MGrounding-630k/Group_Grounding/SA-1B/sa_{number}.jpg" for number in range(3)]
    for number, image in enumerate(images):
        save_image(tmp_path / image, seed=number)
    turns = [
        ("<image>\n<image>\n<image>\nFind <|object_ref_start|>a statue<|object_ref_end|>.",
         "It's in the second image. <|box_start|>(250,250),(500,750)<|box_end|>"),
        ("Find both.", "<|box_start|>(1,1),(2,2)<|box_end|> <|box_start|>(3,3),(4,4)<|box_end|>"),
        ("Find the last.", "<|box_start|>(0,0),(1000,1000)<|box_end|>"),
    ]  # fmt: skip
    conversations = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    entry = {"id": "1", "images": images, "conversations": conversations, "type": "gg_train"}
    save_json(root / "MGrounding-630k.json", [entry])
    first, last = load_benchmark("mgrounding", root, split="train")
    assert first.prompt == "Find a statue." and first.box_only and first.box == (6, 4, 12, 12)
    assert [reference.image.name for reference in first.references] == ["sa_0.jpg", "sa_2.jpg"]
    assert [reference.image.name for reference in last.references] == ["sa_0.jpg", "sa_1.jpg"]
    with pytest.raises(ValueError, match="no split 'test'; use one of train"):
        load_benchmark("mgrounding", root)
    (tmp_path / images[1]).unlink()
    with pytest.raises(MissingFilesError, match="lacks 1 of its 3 files"):
        load_benchmark("mgrounding", root, split="train")


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("It's in the third image.", 2),
        ("Like Image-1, in image 2", 1),
        ("the last image", 2),
        ("the tenth image", None),
        ("somewhere", None),
    ],
)
def test_named_image(text, index):
    assert named_image(text, 3) == index
