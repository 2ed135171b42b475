"""Tests of the evaluation with a random model: records, output files, and resuming."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from conceptseg_hf import ConceptPrompt, ConceptSegmentation, ShortcutRouter
from conceptseg_hf.concept_prompt import CandidateScore
from conceptseg_hf.data import ConceptSample, load_benchmark
from conceptseg_hf.evaluation import EvaluationReport, MaskMetrics, evaluate
from conceptseg_hf.evaluation.records import make_record, segment_samples
from conceptseg_hf.evaluation.records.samples import identify_sample
from conceptseg_hf.evaluation.reporting.decomposition import exact_rule
from conceptseg_hf.evaluation.running import evaluator as evaluator_module
from conceptseg_hf.loading import fingerprint, load_model_and_processor

SHORT = {"max_new_tokens": 8}


def run(model, processor, **options):
    arguments = {"limit": 5, "batch_size": 2, "generation_config": SHORT} | options
    return evaluate(model, "concept-shapes", processor=processor, **arguments)


def a_sample(**changes) -> ConceptSample:
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:15] = 255
    values = {
        "image": Image.new("RGB", (20, 20)),
        "mask": Image.fromarray(mask),
        "prompt": "red circle",
        "level": "CI",
        "group": "diverse classes",
        "family": "attribute",
        "box": (5, 5, 15, 10),
        "sample_id": "one",
    }
    return ConceptSample(**(values | changes))


def test_record_of_a_reasoned_result():
    completion = "<think>a</think><rule>b</rule><bbox>[1,2,3,4]</bbox><answer>red circle</answer>"
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:10] = 255
    result = ConceptSegmentation(
        Image.fromarray(mask),
        "red circle",
        0.6,
        route="reasoning",
        decode_presence=0.7,
        completion=completion,
        box=(5.0, 5.0, 10.0, 10.0),
        check_iou=0.4,
    )
    record = make_record(a_sample(), result)
    assert record["foreground_iou"] == 0.5
    assert (record["scores"]["tp"], record["scores"]["fp"], record["scores"]["fn"]) == (25, 0, 25)
    assert record["box_iou"] == pytest.approx(0.5)
    assert record["format_valid"] is True
    assert record["rejected"] is False
    assert record["check_iou"] == 0.4
    json.dumps(record)


def test_records_of_a_shortcut_a_rejection_and_a_failure():
    empty = Image.new("L", (20, 20))
    shortcut = ConceptSegmentation(
        empty, "red circle", 0.0, route="shortcut", presence=0.3, decode_presence=0.3
    )
    record = make_record(a_sample(), shortcut)
    assert (record["box_iou"], record["format_valid"], record["foreground_iou"]) == (None, None, 0)

    absent = a_sample(mask=empty, box=None)
    record = make_record(absent, shortcut)
    assert (record["present"], record["rejected"], record["foreground_iou"]) == (False, True, 1)

    record = make_record(a_sample(), ConceptSegmentation.failed("broken.", "red circle"))
    assert (record["foreground_iou"], record["error"], record["route"]) == (0, "broken.", None)


def test_missing_box_has_an_iou_of_zero():
    result = ConceptSegmentation(None, "x", 0.0, route="reasoning", decode_presence=0.7, completion="")
    assert make_record(a_sample(), result)["box_iou"] == 0
    assert make_record(a_sample(box=None), result)["box_iou"] is None


def record_like(**changes):
    record = make_record(
        a_sample(), ConceptSegmentation(None, "x", 0.0, route="shortcut", decode_presence=0.9)
    )
    return record | changes


def test_report_separates_positive_and_negative_samples():
    records = [
        record_like(foreground_iou=0.5),
        record_like(foreground_iou=0.7, route="reasoning", format_valid=True, box_iou=0.2),
        record_like(foreground_iou=1.0, present=False, rejected=True, decode_presence=0.1),
        record_like(foreground_iou=0.0, present=False, rejected=False, decode_presence=0.95),
        record_like(
            level="CR", group="difference", foreground_iou=0.3, route="reasoning", format_valid=False
        ),
        record_like(
            level="CD", group="saliency", foreground_iou=0.0, route=None, error="x.", decode_presence=None
        ),
    ]
    report = EvaluationReport(records, {"benchmark": "b", "protocol": "standard", "metrics": ["miou"]})
    rows = {(row["level"], row["group"]): row for row in report.table}
    assert list(rows) == [
        ("CI", "diverse classes"),
        ("CI", "all"),
        ("CD", "saliency"),
        ("CD", "all"),
        ("CR", "difference"),
        ("CR", "all"),
        ("all", "all"),
    ]
    first = rows["CI", "diverse classes"]
    assert first["samples"] == 4
    assert first["foreground_iou"] == pytest.approx(0.6)
    assert first["rejection_rate"] == 0.5
    assert first["presence_auc"] == 0.5
    assert first["shortcut_share"] == 0.75
    assert (first["format_rate"], first["box_iou"]) == (1, 0.2)
    assert rows["CR", "all"]["format_rate"] == 0
    assert rows["CR", "all"]["rejection_rate"] is None
    assert rows["CD", "all"]["failed"] == 1
    assert rows["CD", "all"]["shortcut_share"] is None
    assert report.summary() == "foreground IoU: CI 0.600 | CD 0.000 | CR 0.300 | all 0.375"
    markdown = report.to_markdown()
    assert "| CI    | diverse classes | 4 " in markdown and "failed" in markdown


def test_evaluate_writes_every_sample_once(model, processor, tmp_path):
    report = run(model, processor, output_dir=tmp_path)
    assert [record["sample_id"] for record in report.records] == [f"test-{i:06d}" for i in range(5)]
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert (tmp_path / "report.md").read_text().rstrip().endswith(report.summary())
    assert json.loads((tmp_path / "report.json").read_text())["table"] == report.table


def test_batches_and_single_samples_agree(model, processor):
    single = run(model, processor, batch_size=1)
    batched = run(model, processor, batch_size=5)
    for one, other in zip(single.records, batched.records, strict=True):
        assert one["route"] == other["route"]
        assert one["foreground_iou"] == pytest.approx(other["foreground_iou"], abs=0.02)


def test_killed_run_is_resumed(model, processor, tmp_path, monkeypatch):
    expected = run(model, processor, output_dir=tmp_path / "expected")
    calls = []
    original = segment_samples

    def interrupted_in_the_second_batch(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(evaluator_module, "segment_samples", interrupted_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run(model, processor, output_dir=tmp_path / "killed")
    path = tmp_path / "killed" / "records.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"index": 2, "sample_')  # an incomplete line, as after a power cut

    report = run(model, processor, output_dir=tmp_path / "killed")
    assert calls[2:] == [2, 1], "the two samples on disk are not run again"
    assert report.records == expected.records
    assert path.read_text() == (tmp_path / "expected" / "records.jsonl").read_text()


def test_resumes_with_a_larger_limit_but_not_with_a_smaller_one(model, processor, tmp_path):
    run(model, processor, output_dir=tmp_path, limit=2)
    longer = run(model, processor, output_dir=tmp_path, limit=4)
    assert len(longer.records) == 4
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds records of more samples than the 1 requested; give a larger"):
        run(model, processor, output_dir=tmp_path, limit=1)
    assert contents(tmp_path) == before, "report and records must not change"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture()
def own_data(tmp_path):
    """Create a dataset of files with images of the same size and the same names."""

    def make(name, colors, squares=None):
        root = tmp_path / name
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True)
        for index, color in enumerate(colors):
            left = (squares or range(len(colors)))[index]
            mask = Image.new("L", (20, 20))
            mask.paste(255, (left, 5, left + 6, 15))
            Image.new("RGB", (20, 20), color).save(root / "images" / f"{index}.png")
            mask.save(root / "masks" / f"{index}.png")
        (root / "prompt.txt").write_text("square")
        return root

    return make


def run_own(model, processor, root, folder, **options):
    arguments = {"router": "sam_only", "batch_size": 2} | options
    return evaluate(model, "plain", processor=processor, root=root, output_dir=folder, **arguments)


def recorded_batches(monkeypatch) -> list[list[str]]:
    """Return a list to which the sample ids of each segmented batch are appended."""
    batches = []
    original = segment_samples

    def recording(*arguments, **options):
        batches.append([sample.sample_id for sample in arguments[2]])
        return original(*arguments, **options)

    monkeypatch.setattr(evaluator_module, "segment_samples", recording)
    return batches


COLORS = ("red", "blue", "lime")


@pytest.mark.parametrize(
    "other",
    [
        {"colors": ("red", "blue", "yellow")},
        {"colors": COLORS, "squares": (0, 9, 2)},
    ],
    ids=["images", "masks"],
)
def test_different_files_with_the_same_names_raise(model, processor, own_data, tmp_path, other):
    run_own(model, processor, own_data("a", COLORS), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"records of another run \(different samples, such as '[12]'\)"):
        run_own(model, processor, own_data("b", **other), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_different_prompts_raise(model, processor, own_data, tmp_path):
    root = own_data("a", COLORS)
    run_own(model, processor, root, tmp_path / "out")
    (root / "prompt.txt").write_text("circle")
    with pytest.raises(ValueError, match="different samples"):
        run_own(model, processor, root, tmp_path / "out")


def test_resumes_with_a_copied_dataset_and_records_without_hashes(
    model, processor, own_data, tmp_path, monkeypatch
):
    run_own(model, processor, own_data("a", COLORS), tmp_path / "out")
    before = contents(tmp_path / "out")
    batches = recorded_batches(monkeypatch)
    copied_root = own_data("b", COLORS)
    run_own(model, processor, copied_root, tmp_path / "out")
    assert contents(tmp_path / "out") == before and batches == []

    records = tmp_path / "out" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert all(line.pop("files") for line in lines)  # older records have no hash
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_own(model, processor, copied_root, tmp_path / "out")
    assert batches == []
    records.write_text("".join(json.dumps(line | {"sample_id": "x"}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="different samples"):
        run_own(model, processor, copied_root, tmp_path / "out")


def test_different_samples_in_memory_raise(model, processor, tmp_path):
    samples = [a_sample(sample_id=str(index), box=(5, 5, 15, 10 + index)) for index in range(4)]
    options = {"processor": processor, "router": "sam_only", "output_dir": tmp_path}
    evaluate(model, samples[:2], **options)
    with pytest.raises(ValueError, match="different samples, such as '2'"):
        evaluate(model, samples[2:], **options)
    same_ids = [replace(sample, sample_id="0") for sample in samples]
    with pytest.raises(ValueError, match="different samples"):
        evaluate(model, same_ids[2:], **options)
    with pytest.raises(ValueError, match="different samples"):
        evaluate(model, Subset(samples, [1, 0]), **options)
    assert len(evaluate(model, Subset(samples, [0, 1, 3]), **options).records) == 3


def test_only_the_first_sample_of_a_lazy_sequence_is_compared(model, processor, tmp_path):
    def lazy_samples(names):
        class Lazy(Sequence):
            def __len__(self):
                return len(names)

            def __getitem__(self, index):
                read_indices.append(index)
                return a_sample(sample_id=names[index])

        return Lazy()

    read_indices = []
    options = {"processor": processor, "router": "sam_only", "output_dir": tmp_path}
    evaluate(model, lazy_samples("abc"), **options)
    with pytest.raises(ValueError, match="different samples, such as 'd'"):
        evaluate(model, lazy_samples("def"), **options)
    read_indices.clear()
    assert identify_sample(lazy_samples("abc"), 1) == {} and read_indices == []


def test_only_samples_with_fixed_files_are_retried(model, processor, own_data, tmp_path, monkeypatch):
    root = own_data("a", COLORS)
    run_own(model, processor, root, tmp_path / "expected")
    image_path = root / "images" / "1.png"
    content = image_path.read_bytes()
    image_path.write_bytes(content[:30])
    first = run_own(model, processor, root, tmp_path / "out")
    assert [record["error"] is None for record in first.records] == [True, False, True]
    before = contents(tmp_path / "out")

    batches = recorded_batches(monkeypatch)
    run_own(model, processor, root, tmp_path / "out")
    assert contents(tmp_path / "out") == before and batches == []

    image_path.write_bytes(content)
    report = run_own(model, processor, root, tmp_path / "out")
    assert batches == [["1"]] and not report.failed
    assert [record["sample_id"] for record in report.records] == ["0", "1", "2"]
    expected = json.loads((tmp_path / "expected" / "records.jsonl").read_text().splitlines()[1])
    retried = json.loads((tmp_path / "out" / "records.jsonl").read_text().splitlines()[1])
    assert retried["files"] == expected["files"]
    assert retried["foreground_iou"] == pytest.approx(expected["foreground_iou"], abs=0.02)


def test_records_of_another_run_raise(model, make_model, processor, tmp_path):
    run(model, processor, output_dir=tmp_path, limit=1)
    with pytest.raises(ValueError, match="different router"):
        run(model, processor, output_dir=tmp_path, limit=1, router="sam_only")
    other = make_model(seed=1)
    with pytest.raises(ValueError, match="different weights"):
        run(other, processor, output_dir=tmp_path, limit=1)
    changed = copy.copy(processor)
    changed.prompt_template = {**processor.prompt_template, "no_reference": "seek {problem}"}
    with pytest.raises(ValueError, match="different configuration"):
        run(model, changed, output_dir=tmp_path, limit=1)
    run(model, copy.deepcopy(processor), output_dir=tmp_path, limit=1)


def test_fingerprint_depends_on_the_weights(make_model):
    model = make_model()
    before = fingerprint(model)
    assert before == fingerprint(make_model())
    with torch.no_grad():
        model.ctm.queries.add_(1e-3)
    assert fingerprint(model) != before


def test_evaluates_a_list_of_samples_with_an_invalid_one(model, processor):
    samples = [a_sample(), a_sample(prompt=" ", sample_id="bad")]
    report = evaluate(model, samples, processor=processor, router="sam_only")
    assert [record["error"] is None for record in report.records] == [True, False]
    assert report.table[-1]["failed"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "other"}, "no protocol"),
        ({"router": "other"}, "other"),
        ({"batch_size": 0}, "at least 1"),
        ({"limit": 0}, "at least 1"),
        ({"split": "other"}, "no split"),
        ({"processor": None}, "processor"),
    ],
)
def test_invalid_arguments_raise(model, processor, options, message):
    arguments = {"processor": processor} | options
    with pytest.raises(ValueError, match=message):
        evaluate(model, "concept-shapes", **arguments)
    with pytest.raises(ValueError, match="no benchmark"):
        evaluate(model, "other", processor=processor)


def test_evaluates_a_checkpoint_path(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    expected = run(model, processor, limit=2, router="sam_only")
    loaded = evaluate(tmp_path / "checkpoint", "concept-shapes", limit=2, router="sam_only")
    for one, other in zip(expected.records, loaded.records, strict=True):
        assert one["foreground_iou"] == pytest.approx(other["foreground_iou"], abs=0.02)
    with pytest.raises(ValueError, match="device 'nonsense'"):
        load_model_and_processor(tmp_path / "checkpoint", device="nonsense")


def test_benchmark_has_negative_samples():
    assert any(not sample.present for sample in load_benchmark("concept-shapes", limit=12))


def test_routing_regret_compares_with_the_other_route(model, processor):
    options = {"limit": 8, "batch_size": 4}
    router = ShortcutRouter(base=0.2)
    report = run(model, processor, router=router, routing_regret=True, **options)
    assert {record["route"] for record in report.records} == {"shortcut", "reasoning"}
    single_route = {
        "shortcut": run(model, processor, router="sam_only", **options),
        "reasoning": run(model, processor, router="full_reasoning", **options),
    }
    for index, record in enumerate(report.records):
        assert list(record["route_ious"]) == ["shortcut", "reasoning"]
        assert record["route_ious"][record["route"]] == record["foreground_iou"]
        for route, iou in record["route_ious"].items():
            assert iou == pytest.approx(single_route[route].records[index]["foreground_iou"], abs=0.02)
        assert record["routing_regret"] == max(record["route_ious"].values()) - record["foreground_iou"]
    assert report.settings["routing_regret"] is True
    assert {record["routing_regret"] for record in single_route["shortcut"].records} == {None}


def test_failed_samples_have_no_regret(model, processor):
    report = evaluate(
        model, [a_sample(prompt=" ")], processor=processor, router="sam_only", routing_regret=True
    )
    assert report.records[0]["route_ious"] is None and report.records[0]["routing_regret"] is None


def test_paper_protocol_thresholds_logits_at_600_pixels(model, processor):
    (sample,) = load_benchmark("concept-shapes", limit=1)
    (result,) = segment_samples(model, processor, [sample], "sam_only")
    assert result.mask_logits.dtype == np.float32 and result.mask_logits.shape != (600, 600)
    logits = torch.from_numpy(result.mask_logits)[None, None]
    expected = torch.nn.functional.interpolate(logits, size=(600, 600), mode="bilinear")[0, 0].numpy() > 0
    scores = make_record(sample, result, "paper")["scores"]
    assert scores["tp"] + scores["fp"] == np.count_nonzero(expected)
    assert sum(scores[name] for name in ("tp", "fp", "fn", "tn")) == 600 * 600
    # Samples with an ignore mask are compared at their own size, even if the mask is empty.
    with_ignore_mask = replace(sample, ignore=Image.new("L", sample.mask.size))
    scores = make_record(with_ignore_mask, result, "paper")["scores"]
    assert scores["tp"] + scores["fp"] == np.count_nonzero(np.asarray(result.mask))


def test_judgements_are_added_to_the_report_but_not_to_the_records(model, processor, tmp_path):
    options = {"router": "full_reasoning", "output_dir": tmp_path, "limit": 3}
    plain = run(model, processor, **options)
    judged = run(model, processor, judgements=exact_rule, **options)
    assert [record["judgement"]["rule"] for record in judged.records] == [False] * 3
    assert judged.settings["judgements"] == "exact_rule" and judged.settings["prediction_threshold"] == 0.5
    assert run(model, processor, **options).records == plain.records
    with pytest.raises(ValueError, match="is not a file"):
        run(model, processor, judgements="missing.csv", **options)


# -- protocol "released" --


def box_masks(size, gt_box, predicted_box):
    """Return box-shaped ground truth and predicted masks, and the pixel counts of their intersection and union."""
    masks = []
    for x1, y1, x2, y2 in (gt_box, predicted_box):
        mask = np.zeros(size[::-1], dtype=bool)
        mask[y1:y2, x1:x2] = True
        masks.append(mask)
    ground_truth, predicted = masks
    intersection, union = ground_truth & predicted, ground_truth | predicted
    return ground_truth, predicted, np.count_nonzero(intersection), np.count_nonzero(union)


def test_released_protocol_compares_reasonseg_at_the_image_size():
    """cIoU counts pixels, so large images have a higher weight unless all images are resized to 600 x 600."""
    pairs = [
        box_masks((1200, 900), (100, 100, 700, 700), (100, 100, 700, 700)),
        box_masks((60, 40), (5, 5, 20, 20), (30, 20, 55, 38)),
        box_masks((300, 200), (10, 10, 120, 80), (60, 10, 170, 80)),
    ]
    scored = {}
    for protocol, dataset in (("released", "reasonseg-hf"), ("paper", "reasonseg-hf"), ("released", "DUTS")):
        metrics = MaskMetrics(protocol, metrics=("ciou",))
        for ground_truth, predicted, _, _ in pairs:
            predicted_image = Image.fromarray(predicted.astype(np.uint8) * 255)
            sample = a_sample(
                image=Image.new("RGB", predicted_image.size),
                mask=Image.fromarray(ground_truth.astype(np.uint8) * 255),
                dataset=dataset,
            )
            result = ConceptSegmentation(
                mask=predicted_image, label="x", score=0.9, route="shortcut", decode_presence=0.9
            )
            metrics.merge([make_record(sample, result, protocol, ("ciou",))["scores"]])
        scored[protocol, dataset] = metrics.compute()["ciou"]
    pixel_ciou = 100 * sum(pair[2] for pair in pairs) / sum(pair[3] for pair in pairs)
    assert scored["released", "reasonseg-hf"] == pytest.approx(pixel_ciou)
    # At the same size, the intersection and union of an image count by their fraction of the image.
    fractions = [np.array(pair[2:]) / pair[0].size for pair in pairs]
    intersection, union = np.sum(fractions, axis=0)
    assert scored["paper", "reasonseg-hf"] == pytest.approx(100 * intersection / union, abs=0.5)
    assert scored["released", "DUTS"] == pytest.approx(100 * intersection / union, abs=0.5)
    assert pixel_ciou - 100 * intersection / union > 10


def test_released_protocol_ignores_pixels_only_in_reasonseg():
    ground_truth, predicted, _, _ = box_masks((20, 20), (5, 5, 15, 10), (5, 5, 15, 20))
    ignored = Image.fromarray(np.repeat(np.arange(20) >= 10, 20).reshape(20, 20).astype(np.uint8) * 255)
    masks = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in (ground_truth, predicted)]
    result = ConceptSegmentation(mask=masks[1], label="x", score=0.9, route="shortcut", decode_presence=0.9)
    ious = {
        (dataset, protocol): make_record(
            a_sample(mask=masks[0], ignore=ignored, dataset=dataset), result, protocol, ("giou",)
        )["foreground_iou"]
        for dataset in ("cityscapes", "reasonseg")
        for protocol in ("paper", "released")
    }
    assert ious["cityscapes", "paper"] == ious["reasonseg", "paper"] == ious["reasonseg", "released"] == 1
    assert ious["cityscapes", "released"] == pytest.approx(1 / 3, abs=0.01)


def test_released_protocol_resizes_reasonseg_images_and_logits_bicubically(model, processor, monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8))
    ground_truth = Image.new("L", image.size)
    samples = [
        a_sample(image=image, mask=ground_truth, dataset=name, sample_id=name, prompt="star")
        for name in ("DUTS", "reasonseg-hf")
    ]
    encoded = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: encoded.append(pixels) or encode(pixels))
    released = processor.with_settings(shortcut_size=600)
    options = ("sam_only", None, "concept+text", None, "released")
    duts_result, reasonseg_result = segment_samples(model, released, samples, *options)
    side = processor.sam_image_processor.size["width"]

    def pixels(image):
        return processor.sam_image_processor(images=image, return_tensors="pt")["pixel_values"]

    bicubic = pixels(image.resize((side, side), Image.Resampling.BICUBIC))
    shortcut = pixels(image.resize((600, 600), Image.Resampling.BICUBIC))
    assert len({tensor.numpy().tobytes() for tensor in (bicubic, shortcut, pixels(image))}) == 3
    assert [torch.equal(*pair) for pair in zip(encoded, (bicubic, shortcut), strict=True)] == [True, True]
    for result, mode in ((duts_result, "bilinear"), (reasonseg_result, "bicubic")):
        logits = torch.from_numpy(result.mask_logits)[None, None]
        expected = torch.nn.functional.interpolate(logits, (90, 70), mode=mode)[0, 0] > 0
        assert np.array_equal(np.asarray(result.mask) > 0, expected.numpy()), mode


def test_released_protocol_resizes_soft_ground_truths_once():
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8))
    soft = soft.resize((40, 30))
    hard = Image.fromarray((np.asarray(soft) >= 128).astype(np.uint8) * 255)
    resized = np.asarray(soft.resize((600, 600), Image.Resampling.BICUBIC)) > 127
    predicted = Image.fromarray(resized.astype(np.uint8) * 255)
    sample = a_sample(image=Image.new("RGB", (40, 30)), mask=hard, soft_mask=soft)
    logits = np.where(resized, 1, -1).astype(np.float32)
    result = ConceptSegmentation(
        mask=predicted, label="x", score=0.9, route="shortcut", decode_presence=0.9, mask_logits=logits
    )
    assert make_record(sample, result, "released", ("giou",))["foreground_iou"] == 1
    assert make_record(replace(sample, soft_mask=None), result, "released", ("giou",))["foreground_iou"] < 1


# -- profiles --


def test_report_without_a_profile_does_not_mention_profiles(model, processor):
    """Reports without a profile must not change."""
    report = run(model, processor, limit=1)
    assert set(report.settings) == {
        *("benchmark", "split", "seed", "protocol", "metrics", "router", "generation", "sam_prompt"),
        *("max_references", "model", "weights", "configuration", "dtype", "record_format", "environment"),
    }
    assert report.settings["protocol"] == "standard" and "profile" not in report.to_markdown()
    assert "profile" not in report.to_csv()


def test_profile_applies_to_one_evaluation_only(model, processor):
    before = model.config.to_dict(), processor.to_dict()
    default = run(model, processor, limit=2)
    report = run(model, processor, limit=2, profile="released")
    assert (model.config.to_dict(), processor.to_dict()) == before
    assert (report.settings["profile"], report.settings["protocol"]) == ("released", "released")
    assert report.settings["configuration"] != default.settings["configuration"]
    assert "protocol released" in report.to_markdown() and "profile released" in report.to_markdown()
    assert report.settings["mosaic"]["grid"] == 2
    deviating = run(model, processor, limit=2, profile="released", protocol="standard")
    assert deviating.settings["profile"] == "released but protocol standard"
    paper = run(model, processor, limit=2, profile="paper")
    assert paper.settings["profile"] == "paper"
    assert [record["scores"] for record in paper.records] == [record["scores"] for record in default.records]
    with pytest.raises(ValueError, match="unknown profile 'theirs'; use paper or released"):
        run(model, processor, profile="theirs")


def test_profile_of_the_checkpoint_is_used_by_default(model, processor, monkeypatch):
    monkeypatch.setattr(model.config, "profile", "released")
    monkeypatch.setattr(model.config, "end_of_turn_state", True)
    report = run(model, processor, limit=1)
    assert report.settings["protocol"] == "released"
    profile = report.settings["profile"]
    assert profile.startswith("released but router_drop_parentheses False, ")
    assert "mosaic.grid None" in profile


def test_groups_outside_table_1_are_reported_by_stratum(model, processor, tmp_path):
    options = {"limit": 6, "router": "sam_only", "output_dir": tmp_path}
    report = run(model, processor, groups=["saliency", "which one"], **options)
    assert report.settings["groups"] == ["saliency", "which one"]
    rows = {(row["level"], row["group"]): row for row in report.table}
    # Summary rows only cover the groups of Table 1.
    assert rows["CD", "saliency"]["samples"] == rows["all", "all"]["samples"] == 3
    assert rows["CR", "which one"]["samples"] == 3
    strata = [name for _, name in rows if name.startswith("which one: ")]
    assert strata and sum(rows["CR", name]["samples"] for name in strata) == 3
    chosen = [record["chosen"] for record in report.records if "chosen" in record]
    assert len(chosen) == 3 and all("chosen" in json.dumps(record) for record in report.records[1::2])
    assert rows["CR", "which one"]["chosen_right"] == chosen.count("target") / 3
    assert "Which object the mask overlaps most" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="stands for several benchmarks; leave groups out"):
        evaluate(model, "table1", processor=processor, groups=["saliency"])
    with pytest.raises(ValueError, match="has no groups"):
        evaluate(model, "plain", processor=processor, groups=["saliency"])


def test_evaluation_with_a_concept_reports_its_tiers(model, processor, tmp_path):
    scores = (CandidateScore("circle", 0.8, (0.8, 0.8)),)
    good = ConceptPrompt("circle", ("circle",), score=0.8, scores=scores, threshold=0.0)
    poor = replace(good, rule="the red circle", rule_score=0.9, score=0.2)
    path = good.save(tmp_path / "c.safetensors")
    reports = {
        name: run(model, processor, concept=concept, output_dir=tmp_path / name)
        for name, concept in (("good", path), ("poor", poor), ("none", None))
    }
    for name, tier in (("good", "concept"), ("poor", "rule")):
        report = reports[name]
        assert {record["route"] for record in report.records} == {tier}
        (row,) = report.to_dict()["tiers"]
        ious = [record["foreground_iou"] for record in report.records if record["present"]]
        assert (row["tier"], row["samples"], row["share"]) == (tier, 5, 1.0)
        assert row["foreground_iou"] == pytest.approx(np.mean(ious))
        assert "## Tiers of the concept" in report.to_markdown()
        assert report.settings["concept"]["phrases"] == ["circle"]
    assert "tiers" not in reports["none"].to_dict() and "concept" not in reports["none"].settings
    with pytest.raises(ValueError, match=r"other settings|another"):
        run(model, processor, concept=poor, output_dir=tmp_path / "good")
