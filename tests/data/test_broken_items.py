"""An evaluation continues after samples that cannot be read, and lists them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from trees import save_image, save_mask

from conceptseg_hf import ConceptSegmentation
from conceptseg_hf.cli import main
from conceptseg_hf.data import ConceptSample, UnreadableSampleError, load_benchmark
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.records import make_record

SHORT = {"max_new_tokens": 4}


def break_image(root):
    (root / "Polyp/test/image/test_1.jpg").write_bytes(b"not an image")


def break_mask(root):
    (root / "Polyp/test/mask/test_1.png").write_bytes(b"not an image")


def resize_mask(root):
    save_mask(root / "Polyp/test/mask/test_1.png", size=(30, 30))


def truncate_image(root):
    path = save_image(root / "Polyp/test/image/test_1.jpg", size=(200, 200))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damage", "match", "gt_is_known"),
    [
        (break_image, "damaged or not an image", True),
        (truncate_image, "damaged or not an image", True),
        (break_mask, "mask .* cannot be read", False),
        (resize_mask, r"mask .*test_1.png. has 30 x 30 pixels, but its image has 24 x 16", True),
    ],
)
def test_unreadable_sample_is_reported(model, processor, polyp_root, tmp_path, damage, match, gt_is_known):
    root = polyp_root()
    damage(root)
    with pytest.raises(UnreadableSampleError, match=match) as raised:
        load_benchmark("Polyp", root)[1]
    message = str(raised.value)
    assert message.startswith("sample '000001-test_1': ") and "\n" not in message

    options = {"processor": processor, "root": root, "generation_config": SHORT, "batch_size": 2}
    report = evaluate(model, "Polyp", output_dir=tmp_path / "out", **options)
    assert [record["error"] is None for record in report.records] == [True, False, True]
    broken = report.records[1]
    assert broken["error"] == message and broken["prompt"] == "polyp colon segmentation"
    row = report.table[-1]
    assert (row["samples"], row["failed"]) == (3, 1)
    if gt_is_known:
        assert broken["scores"]["tp"] == 0 and broken["scores"]["fn"] == 64 and broken["foreground_iou"] == 0
    else:
        assert broken["scores"] is None and broken["foreground_iou"] is None and broken["present"] is None
        left = evaluate(model, [load_benchmark("Polyp", root)[i] for i in (0, 2)], **options | {"root": None})
        assert row["masks"] == pytest.approx(left.table[-1]["masks"], abs=1)
    markdown = report.to_markdown()
    assert f"- 000001-test_1: {message}" in markdown
    assert ("1 samples have no mask" in markdown) is not gt_is_known
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["errors"] == [{"sample_id": "000001-test_1", "error": message}]
    again = evaluate(model, "Polyp", output_dir=tmp_path / "out", **options)
    assert again.records == report.records and again.table == report.table


def test_only_unreadable_samples(model, processor, polyp_root, tmp_path):
    root = polyp_root(test=2)
    break_mask(root)
    (root / "Polyp/test/mask/test_0.png").write_bytes(b"not an image")
    report = evaluate(model, "Polyp", processor=processor, root=root, output_dir=tmp_path / "out")
    assert report.table[-1]["masks"]["miou"] is None and report.table[-1]["foreground_iou"] is None
    assert "| -" in report.to_markdown()


@pytest.mark.parametrize(("lost", "gt_is_known"), [("images/b.jpg", True), ("masks/b.png", False)])
def test_missing_file_of_custom_data_fails_one_sample(model, processor, tmp_path, capsys, lost, gt_is_known):
    for stem in "abc":
        save_image(tmp_path / f"images/{stem}.jpg", seed=ord(stem))
        save_mask(tmp_path / f"masks/{stem}.png")
    (tmp_path / "prompt.txt").write_text("the scratch")
    (tmp_path / lost).unlink()
    with pytest.warns(UserWarning, match="1 of 3 samples lack files"):
        report = evaluate(model, "plain", processor=processor, root=tmp_path, router="sam_only")
    assert [record["error"] is None for record in report.records] == [True, False, True]
    assert (report.records[1]["scores"] is not None) is gt_is_known
    assert "- b: sample 'b': " in report.to_markdown()


class CustomSamples(list):
    def __getitem__(self, index):
        if index == 0:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def test_custom_samples_may_fail(model, processor, polyp_root):
    root = polyp_root()
    samples = CustomSamples(load_benchmark("Polyp", root))
    report = evaluate(model, samples, processor=processor, router="sam_only")
    assert [record["error"] for record in report.records] == ["sample 0: the disk is gone", None, None]
    assert report.levels == ["CD", "?"]


def test_settings_contain_the_seed_of_the_references(model, processor, polyp_root, tmp_path):
    options = {
        "processor": processor,
        "root": polyp_root(),
        "router": "sam_only",
        "output_dir": tmp_path / "out",
    }
    report = evaluate(model, "Polyp", limit=1, **options)
    assert (report.settings["benchmark"], report.settings["split"], report.settings["seed"]) == (
        "Polyp",
        "test",
        42,
    )
    assert len(evaluate(model, "Polyp", limit=3, **options).records) == 3
    with pytest.raises(ValueError, match="different seed"):
        evaluate(model, "Polyp", limit=1, seed=7, **options)


def sample_with(**changes) -> ConceptSample:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:15] = 255
    values = {
        "image": Image.new("RGB", (20, 20)),
        "mask": Image.fromarray(mask),
        "prompt": "a",
        "level": "CR",
    }
    return ConceptSample(**values | {"group": "g", "family": "f", "box": (5, 5, 15, 10)} | changes)


def test_ignored_pixels_do_not_count():
    ignore = np.zeros((20, 20), dtype=np.uint8)
    ignore[:, 10:] = 255
    prediction = np.zeros((20, 20), dtype=np.uint8)
    prediction[5:10, 5:10] = 255
    prediction[15:, 15:] = 255
    result = ConceptSegmentation(Image.fromarray(prediction), "a", 0.5)
    for protocol in ("standard", "paper"):
        record = make_record(sample_with(ignore=Image.fromarray(ignore)), result, protocol)
        assert record["foreground_iou"] == 1
        assert sum(record["scores"][name] for name in ("tp", "fp", "fn", "tn")) == 200
    assert make_record(sample_with(), result)["foreground_iou"] < 0.5
    nothing = sample_with(mask=Image.new("L", (20, 20)), box=None, ignore=Image.fromarray(ignore))
    assert (
        make_record(nothing, ConceptSegmentation(Image.new("L", (20, 20)), "a", 0.5))["foreground_iou"] == 1
    )


def test_box_only_ground_truth_gives_no_mask_scores():
    result = ConceptSegmentation(None, "a", 0.5, route="reasoning", completion="", box=(5, 5, 15, 10))
    record = make_record(sample_with(box_only=True), result)
    assert (record["scores"], record["foreground_iou"], record["box_iou"]) == (None, None, 1)
    assert record["present"] is True
    json.dumps(record)


def test_command_reports_unreadable_samples_and_rejects_missing_files(polyp_root, tmp_path, capsys):
    root = polyp_root()
    break_image(root)
    out = tmp_path / "out"
    arguments = [
        "evaluate",
        "--benchmark",
        "Polyp",
        "--root",
        str(root),
        "--router",
        "sam_only",
        "--device",
        "cpu",
    ]
    assert main([*arguments, "--output-dir", str(out)]) == 0
    assert "- 000001-test_1: sample '000001-test_1'" in capsys.readouterr().out
    (root / "Polyp/test/mask/test_0.png").unlink()
    assert main([*arguments, "--output-dir", str(out)]) == 2
    assert "lacks 1 of its" in capsys.readouterr().err
