"""The positional prior in records, reports and galleries, with a random CoPRS checkpoint."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image
from random_coprs import save_random_coprs

from conceptseg_hf import ConceptSegmentation
from conceptseg_hf.cli import main
from conceptseg_hf.data import ConceptSample, load_benchmark
from conceptseg_hf.data.sample import Candidate
from conceptseg_hf.evaluation import evaluate
from conceptseg_hf.evaluation.metrics.heatmaps import heatmap_auroc, heatmap_iou
from conceptseg_hf.evaluation.records import make_record
from conceptseg_hf.evaluation.records.prior import decode_heatmap, encode_heatmap
from conceptseg_hf.evaluation.reporting.prior_table import prior_rows, prior_section
from conceptseg_hf.loading import load_model_and_processor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("coprs")
    save_random_coprs(folder, "sam3_tracker")
    return str(folder)


def sample(**changes) -> ConceptSample:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:15, 5:15] = 255
    values = {
        "level": "CI",
        "group": "diverse classes",
        "family": "attribute",
        "prompt": "red circle",
        "sample_id": "one",
        **changes,
    }
    return ConceptSample(image=Image.new("RGB", (20, 20)), mask=Image.fromarray(mask), **values)


def result(heatmap: np.ndarray, completion: str = "<think>a</think><REF_POS>") -> ConceptSegmentation:
    return ConceptSegmentation(
        Image.new("L", (20, 20), 255),
        "red circle",
        1.0,
        route="reasoning",
        completion=completion,
        heatmap=heatmap,
    )


def test_records_have_the_quality_of_the_prior() -> None:
    heatmap = np.zeros((20, 20), dtype=np.float32)
    heatmap[5:15, 5:10] = 0.8  # half of the target
    heatmap[0:5, 0:5] = 0.4  # on a sibling
    roles = ("target", "sibling", "anchor")
    siblings = [Candidate(role, np.zeros((20, 20), dtype=bool)) for role in roles]
    siblings[0].mask[5:15, 5:15] = siblings[1].mask[0:5, 0:5] = siblings[2].mask[16:, 16:] = True
    record = make_record(sample(candidates=siblings, stratum="position"), result(heatmap), has_prior=True)
    prior = record["prior"]
    assert prior["iou"] == pytest.approx(0.5)
    assert prior["share"] == pytest.approx(0.8 * 50 / (0.8 * 50 + 0.4 * 25))
    # 50 pixels beat all 300 of the background; the others tie with 275 and lose to 25.
    assert prior["auroc"] == pytest.approx((50 * 300 + 50 * 275 / 2) / (100 * 300))
    assert record["format_valid"] is True and record["box_iou"] is None
    assert make_record(sample(), result(heatmap, "<REF_POS>"), has_prior=True)["format_valid"] is False
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_undefined_values_and_failures() -> None:
    absent = sample()
    absent.mask.paste(0, (0, 0, 20, 20))
    prior = make_record(absent, result(np.full((20, 20), 0.2, np.float32)), has_prior=True)["prior"]
    assert (prior["auroc"], prior["average_precision"], prior["share"], prior["iou"]) == (
        None,
        None,
        None,
        1.0,
    )
    failed = ConceptSegmentation.failed("broken.", "red circle")
    assert make_record(sample(), failed, has_prior=True)["prior"] is None
    assert "prior" not in make_record(sample(), failed)
    ignore = Image.new("L", (20, 20))
    ignore.paste(255, (0, 0, 20, 5))
    heatmap = np.zeros((20, 20), dtype=np.float32)
    heatmap[:15] = 0.9
    ignored = make_record(sample(ignore=ignore), result(heatmap), has_prior=True)["prior"]
    assert ignored["iou"] == pytest.approx(100 / 200)


def test_encoded_heatmaps_are_small_and_close() -> None:
    rows, columns = np.mgrid[:300, :400]
    heatmap = np.exp(-((rows - 90) ** 2 + (columns - 250) ** 2) / 5000).astype(np.float32)
    encoded = encode_heatmap(heatmap)
    assert encoded["size"] == [300, 400] and len(encoded["png"]) < 4000
    decoded = decode_heatmap(encoded)
    assert decoded.shape == heatmap.shape and np.abs(decoded - heatmap).max() < 0.03
    assert np.unravel_index(decoded.argmax(), decoded.shape) == pytest.approx((90, 250), abs=5)
    small = np.linspace(0, 1, 6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_allclose(decode_heatmap(encode_heatmap(small)), small, atol=0.5 / 255 + 1e-6)


def test_correlation_of_prior_and_mask_over_samples(record_like) -> None:
    rng = np.random.default_rng(0)
    quality = rng.random(60)
    mask = np.clip(0.7 * quality + 0.3 * rng.random(60), 0, 1)
    records = [
        record_like(
            foreground_iou=float(iou),
            prior={"iou": float(value), "auroc": 0.5, "average_precision": float(1 - value), "share": None},
        )
        for value, iou in zip(quality, mask, strict=True)
    ]
    hidden = [record_like(prior=None), record_like(present=False, prior={"iou": 0.0})]
    level, everything = prior_rows([*records, *hidden])
    assert (level["level"], level["samples"], everything["samples"]) == ("CI", 60, 60)
    found = everything["correlations"]["iou"]
    assert found.mean == pytest.approx(np.corrcoef(quality, mask)[0, 1], abs=1e-12) and found.samples == 60
    assert 0.8 < found.low < found.mean < found.high < 1
    assert everything["correlations"]["average_precision"].mean == pytest.approx(-found.mean)
    assert everything["correlations"]["auroc"] is None  # constant
    assert everything["intervals"]["iou"].mean == pytest.approx(quality.mean())
    text = "\n".join(prior_section(records))
    assert f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]" in text
    assert "share" not in text, "no sample has siblings"
    assert prior_section([record_like()]) == []


def test_evaluation_reports_and_draws_the_prior(checkpoint, tmp_path, capsys) -> None:
    arguments = ["evaluate", "--benchmark", "concept-shapes", "--limit", "4", "--model", checkpoint]
    assert main([*arguments, "--output-dir", str(tmp_path), "--device", "cpu"]) == 0
    assert "## Positional prior" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    model, processor = load_model_and_processor(checkpoint, "cpu")
    samples = load_benchmark("concept-shapes", limit=4)
    for record, item in zip(records, samples, strict=True):
        prepared = processor.prepare(item.image, item.prompt, item.references)
        (expected,) = model.segment([prepared], processor=processor)
        truth = np.asarray(item.mask) > 0
        assert record["prior"]["iou"] == pytest.approx(heatmap_iou(expected.heatmap, truth), abs=0.01)
        if truth.any():
            assert record["prior"]["auroc"] == pytest.approx(heatmap_auroc(expected.heatmap, truth), abs=0.01)
        assert record["completion"] == "<REF_POS>" and record["format_valid"] is False
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["prior"][-1]["level"] == "all"
    assert report["prior"][-1]["samples"] == sum(record["present"] for record in records)
    gallery = (tmp_path / "heatmaps.html").read_text()
    assert gallery.count("positional prior</figcaption>") == 8  # all four samples, in both sections
    assert re.findall("<h2>(.*?)</h2>", gallery) == ["A sample of the run", "Prior and mask differ"]
    assert "none given" in gallery and "prior IoU" in gallery
    assert "positional prior</figcaption>" in (tmp_path / "gallery.html").read_text()

    # A run that is resumed has the same files.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_text("".join(lines[:-1]))
    evaluate(checkpoint, "concept-shapes", limit=4, output_dir=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_evaluations_of_conceptseg_have_no_prior(tmp_path) -> None:
    report = evaluate(None, "concept-shapes", limit=1, router="sam_only", output_dir=tmp_path)
    assert "prior" not in report.records[0] and "prior" not in report.to_dict()
    assert not (tmp_path / "heatmaps.html").exists() and "Positional prior" not in report.to_markdown()
