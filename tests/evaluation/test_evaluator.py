"""The evaluation, on a random model: what is counted, what is written, and that a stopped run goes on."""

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

from conceptseg_hf import ConceptSegmentation, ShortcutRouter
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


def test_record_of_a_shortcut_a_rejection_and_a_failure():
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


def test_a_missing_box_counts_zero():
    result = ConceptSegmentation(None, "x", 0.0, route="reasoning", decode_presence=0.7, completion="")
    assert make_record(a_sample(), result)["box_iou"] == 0
    assert make_record(a_sample(box=None), result)["box_iou"] is None


def record_like(**changes):
    record = make_record(
        a_sample(), ConceptSegmentation(None, "x", 0.0, route="shortcut", decode_presence=0.9)
    )
    return record | changes


def test_report_counts_present_samples_and_negatives_apart():
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


def test_evaluate_counts_every_sample_once(model, processor, tmp_path):
    report = run(model, processor, output_dir=tmp_path)
    assert [record["sample_id"] for record in report.records] == [f"test-{i:06d}" for i in range(5)]
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(5))
    assert (tmp_path / "report.md").read_text().rstrip().endswith(report.summary())
    assert json.loads((tmp_path / "report.json").read_text())["table"] == report.table


def test_batches_and_single_samples_agree(model, processor):
    alone = run(model, processor, batch_size=1)
    together = run(model, processor, batch_size=5)
    for one, other in zip(alone.records, together.records, strict=True):
        assert one["route"] == other["route"]
        assert one["foreground_iou"] == pytest.approx(other["foreground_iou"], abs=0.02)


def test_a_killed_run_goes_on(model, processor, tmp_path, monkeypatch):
    whole = run(model, processor, output_dir=tmp_path / "whole")
    calls = []
    real = segment_samples

    def dies_in_the_second_batch(*arguments, **options):
        calls.append(len(arguments[2]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(evaluator_module, "segment_samples", dies_in_the_second_batch)
    with pytest.raises(KeyboardInterrupt):
        run(model, processor, output_dir=tmp_path / "killed")
    path = tmp_path / "killed" / "records.jsonl"
    assert len(path.read_text().splitlines()) == 2
    with path.open("a") as file:
        file.write('{"index": 2, "sample_')  # what a power cut leaves

    report = run(model, processor, output_dir=tmp_path / "killed")
    assert calls[2:] == [2, 1], "the two samples on disk are not run again"
    assert report.records == whole.records
    assert path.read_text() == (tmp_path / "whole" / "records.jsonl").read_text()


def test_a_larger_limit_goes_on_and_a_smaller_one_is_refused(model, processor, tmp_path):
    run(model, processor, output_dir=tmp_path, limit=2)
    longer = run(model, processor, output_dir=tmp_path, limit=4)
    assert len(longer.records) == 4
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds records of more samples than the 1 asked for; give a larger"):
        run(model, processor, output_dir=tmp_path, limit=1)
    assert contents(tmp_path) == before, "report and records are still of the same samples"


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture()
def own_data(tmp_path):
    """Makes a data set of one's own: pictures of one size, with equal names whatever they show."""

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


def counted(monkeypatch) -> list[list[str]]:
    """The ids of the samples of each batch that reaches the model from now on."""
    batches = []
    real = segment_samples

    def counting(*arguments, **options):
        batches.append([sample.sample_id for sample in arguments[2]])
        return real(*arguments, **options)

    monkeypatch.setattr(evaluator_module, "segment_samples", counting)
    return batches


COLORS = ("red", "blue", "lime")


@pytest.mark.parametrize(
    "other",
    [
        {"colors": ("red", "blue", "yellow")},
        {"colors": COLORS, "squares": (0, 9, 2)},
    ],
    ids=["pictures", "masks"],
)
def test_records_of_other_pictures_of_the_same_names_are_refused(model, processor, own_data, tmp_path, other):
    run_own(model, processor, own_data("a", COLORS), tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"records of another run \(other samples, such as '[12]'\)"):
        run_own(model, processor, own_data("b", **other), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_other_words_are_other_samples(model, processor, own_data, tmp_path):
    root = own_data("a", COLORS)
    run_own(model, processor, root, tmp_path / "out")
    (root / "prompt.txt").write_text("circle")
    with pytest.raises(ValueError, match="other samples"):
        run_own(model, processor, root, tmp_path / "out")


def test_a_data_set_may_move_and_its_old_records_are_taken(model, processor, own_data, tmp_path, monkeypatch):
    run_own(model, processor, own_data("a", COLORS), tmp_path / "out")
    before = contents(tmp_path / "out")
    batches = counted(monkeypatch)
    copy_of_it = own_data("b", COLORS)
    run_own(model, processor, copy_of_it, tmp_path / "out")
    assert contents(tmp_path / "out") == before and batches == []

    records = tmp_path / "out" / "records.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert all(line.pop("files") for line in lines)  # as records were made before there was this hash
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_own(model, processor, copy_of_it, tmp_path / "out")
    assert batches == []
    records.write_text("".join(json.dumps(line | {"sample_id": "x"}) + "\n" for line in lines))
    with pytest.raises(ValueError, match="other samples"):
        run_own(model, processor, copy_of_it, tmp_path / "out")


def test_other_samples_in_memory_are_refused(model, processor, tmp_path):
    samples = [a_sample(sample_id=str(index), box=(5, 5, 15, 10 + index)) for index in range(4)]
    options = {"processor": processor, "router": "sam_only", "output_dir": tmp_path}
    evaluate(model, samples[:2], **options)
    with pytest.raises(ValueError, match="other samples, such as '2'"):
        evaluate(model, samples[2:], **options)
    unnamed = [replace(sample, sample_id="0") for sample in samples]
    with pytest.raises(ValueError, match="other samples"):
        evaluate(model, unnamed[2:], **options)
    with pytest.raises(ValueError, match="other samples"):
        evaluate(model, Subset(samples, [1, 0]), **options)
    assert len(evaluate(model, Subset(samples, [0, 1, 3]), **options).records) == 3


def test_of_samples_that_must_be_read_only_the_first_is_compared(model, processor, tmp_path):
    def made_of(names):
        class Lazy(Sequence):
            def __len__(self):
                return len(names)

            def __getitem__(self, index):
                read.append(index)
                return a_sample(sample_id=names[index])

        return Lazy()

    read = []
    options = {"processor": processor, "router": "sam_only", "output_dir": tmp_path}
    evaluate(model, made_of("abc"), **options)
    with pytest.raises(ValueError, match="other samples, such as 'd'"):
        evaluate(model, made_of("def"), **options)
    read.clear()
    assert identify_sample(made_of("abc"), 1) == {} and read == []


def test_a_mended_file_is_tried_again_and_nothing_else(model, processor, own_data, tmp_path, monkeypatch):
    root = own_data("a", COLORS)
    run_own(model, processor, root, tmp_path / "whole")
    picture = root / "images" / "1.png"
    content = picture.read_bytes()
    picture.write_bytes(content[:30])
    first = run_own(model, processor, root, tmp_path / "out")
    assert [record["error"] is None for record in first.records] == [True, False, True]
    before = contents(tmp_path / "out")

    batches = counted(monkeypatch)
    run_own(model, processor, root, tmp_path / "out")
    assert contents(tmp_path / "out") == before and batches == []

    picture.write_bytes(content)
    report = run_own(model, processor, root, tmp_path / "out")
    assert batches == [["1"]] and not report.failed
    assert [record["sample_id"] for record in report.records] == ["0", "1", "2"]
    whole = json.loads((tmp_path / "whole" / "records.jsonl").read_text().splitlines()[1])
    mended = json.loads((tmp_path / "out" / "records.jsonl").read_text().splitlines()[1])
    assert mended["files"] == whole["files"]
    assert mended["foreground_iou"] == pytest.approx(whole["foreground_iou"], abs=0.02)


def test_records_of_another_run_are_refused(model, make_model, processor, tmp_path):
    run(model, processor, output_dir=tmp_path, limit=1)
    with pytest.raises(ValueError, match="other router"):
        run(model, processor, output_dir=tmp_path, limit=1, router="sam_only")
    other = make_model(seed=1)
    with pytest.raises(ValueError, match="other weights"):
        run(other, processor, output_dir=tmp_path, limit=1)
    changed = copy.copy(processor)
    changed.prompt_template = {**processor.prompt_template, "no_reference": "seek {problem}"}
    with pytest.raises(ValueError, match="other configuration"):
        run(model, changed, output_dir=tmp_path, limit=1)
    run(model, copy.deepcopy(processor), output_dir=tmp_path, limit=1)


def test_fingerprint_sees_an_update_of_the_weights(make_model):
    model = make_model()
    before = fingerprint(model)
    assert before == fingerprint(make_model())
    with torch.no_grad():
        model.ctm.queries.add_(1e-3)
    assert fingerprint(model) != before


def test_samples_of_ones_own_and_a_bad_one(model, processor):
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
def test_bad_arguments(model, processor, options, message):
    arguments = {"processor": processor} | options
    with pytest.raises(ValueError, match=message):
        evaluate(model, "concept-shapes", **arguments)
    with pytest.raises(ValueError, match="no benchmark"):
        evaluate(model, "other", processor=processor)


def test_a_path_is_loaded(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    given = run(model, processor, limit=2, router="sam_only")
    loaded = evaluate(tmp_path / "checkpoint", "concept-shapes", limit=2, router="sam_only")
    for one, other in zip(given.records, loaded.records, strict=True):
        assert one["foreground_iou"] == pytest.approx(other["foreground_iou"], abs=0.02)
    with pytest.raises(ValueError, match="cannot be used"):
        load_model_and_processor(tmp_path / "checkpoint", device="nonsense")


def test_negatives_occur_in_the_benchmark():
    assert any(not sample.present for sample in load_benchmark("concept-shapes", limit=12))


def test_routing_regret_is_what_the_other_route_would_have_given(model, processor):
    options = {"limit": 8, "batch_size": 4}
    router = ShortcutRouter(base=0.2)
    report = run(model, processor, router=router, routing_regret=True, **options)
    assert {record["route"] for record in report.records} == {"shortcut", "reasoning"}
    alone = {
        "shortcut": run(model, processor, router="sam_only", **options),
        "reasoning": run(model, processor, router="full_reasoning", **options),
    }
    for index, record in enumerate(report.records):
        assert list(record["route_ious"]) == ["shortcut", "reasoning"]
        assert record["route_ious"][record["route"]] == record["foreground_iou"]
        for route, iou in record["route_ious"].items():
            assert iou == pytest.approx(alone[route].records[index]["foreground_iou"], abs=0.02)
        assert record["routing_regret"] == max(record["route_ious"].values()) - record["foreground_iou"]
    assert report.settings["routing_regret"] is True
    assert {record["routing_regret"] for record in alone["shortcut"].records} == {None}


def test_failed_samples_have_no_regret(model, processor):
    report = evaluate(
        model, [a_sample(prompt=" ")], processor=processor, router="sam_only", routing_regret=True
    )
    assert report.records[0]["route_ious"] is None and report.records[0]["routing_regret"] is None


def test_the_papers_protocol_thresholds_logits_at_600_pixels(model, processor):
    (sample,) = load_benchmark("concept-shapes", limit=1)
    (result,) = segment_samples(model, processor, [sample], "sam_only")
    assert result.mask_logits.dtype == np.float32 and result.mask_logits.shape != (600, 600)
    logits = torch.from_numpy(result.mask_logits)[None, None]
    expected = torch.nn.functional.interpolate(logits, size=(600, 600), mode="bilinear")[0, 0].numpy() > 0
    scores = make_record(sample, result, "paper")["scores"]
    assert scores["tp"] + scores["fp"] == np.count_nonzero(expected)
    assert sum(scores[name] for name in ("tp", "fp", "fn", "tn")) == 600 * 600
    # Where a data set knows ignore regions, its own size counts, also for samples without one.
    ignoring = replace(sample, ignore=Image.new("L", sample.mask.size))
    scores = make_record(ignoring, result, "paper")["scores"]
    assert scores["tp"] + scores["fp"] == np.count_nonzero(np.asarray(result.mask))


def test_judgements_enter_the_report_and_not_the_records(model, processor, tmp_path):
    options = {"router": "full_reasoning", "output_dir": tmp_path, "limit": 3}
    plain = run(model, processor, **options)
    judged = run(model, processor, judgements=exact_rule, **options)
    assert [record["judgement"]["rule"] for record in judged.records] == [False] * 3
    assert judged.settings["judgements"] == "exact_rule" and judged.settings["prediction_threshold"] == 0.5
    assert run(model, processor, **options).records == plain.records
    with pytest.raises(ValueError, match="is no file"):
        run(model, processor, judgements="missing.csv", **options)


# -- the protocol "released" --


def box_masks(size, gt_box, found_box):
    """A true and a found mask of a size, (width, height), each a box; and the pixels of both and of either."""
    masks = []
    for x1, y1, x2, y2 in (gt_box, found_box):
        mask = np.zeros(size[::-1], dtype=bool)
        mask[y1:y2, x1:x2] = True
        masks.append(mask)
    ground_truth, found = masks
    return ground_truth, found, np.count_nonzero(ground_truth & found), np.count_nonzero(ground_truth | found)


def test_reasonseg_is_compared_at_the_images_own_size_as_released():
    """cIoU counts pixels: large images weigh more, unless all are resized to 600 x 600."""
    pairs = [
        box_masks((1200, 900), (100, 100, 700, 700), (100, 100, 700, 700)),
        box_masks((60, 40), (5, 5, 20, 20), (30, 20, 55, 38)),
        box_masks((300, 200), (10, 10, 120, 80), (60, 10, 170, 80)),
    ]
    scored = {}
    for protocol, dataset in (("released", "reasonseg-hf"), ("paper", "reasonseg-hf"), ("released", "DUTS")):
        metrics = MaskMetrics(protocol, metrics=("ciou",))
        for ground_truth, found, _, _ in pairs:
            picture = Image.fromarray(found.astype(np.uint8) * 255)
            sample = a_sample(
                image=Image.new("RGB", picture.size),
                mask=Image.fromarray(ground_truth.astype(np.uint8) * 255),
                dataset=dataset,
            )
            result = ConceptSegmentation(
                mask=picture, label="x", score=0.9, route="shortcut", decode_presence=0.9
            )
            metrics.merge([make_record(sample, result, protocol, ("ciou",))["scores"]])
        scored[protocol, dataset] = metrics.compute()["ciou"]
    wanted = 100 * sum(pair[2] for pair in pairs) / sum(pair[3] for pair in pairs)
    assert scored["released", "reasonseg-hf"] == pytest.approx(wanted)
    # At one size each image counts by the share of it: .333 of 1, none of .25, .06 of .19.
    fractions = [np.array(pair[2:]) / pair[0].size for pair in pairs]
    both, either = np.sum(fractions, axis=0)
    assert scored["paper", "reasonseg-hf"] == pytest.approx(100 * both / either, abs=0.5)
    assert scored["released", "DUTS"] == pytest.approx(100 * both / either, abs=0.5)
    assert wanted - 100 * both / either > 10


def test_pixels_to_ignore_count_in_released_scores_but_of_reasonseg():
    ground_truth, found, _, _ = box_masks((20, 20), (5, 5, 15, 10), (5, 5, 15, 20))
    ignored = Image.fromarray(np.repeat(np.arange(20) >= 10, 20).reshape(20, 20).astype(np.uint8) * 255)
    masks = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in (ground_truth, found)]
    result = ConceptSegmentation(mask=masks[1], label="x", score=0.9, route="shortcut", decode_presence=0.9)
    found = {
        (dataset, protocol): make_record(
            a_sample(mask=masks[0], ignore=ignored, dataset=dataset), result, protocol, ("giou",)
        )["foreground_iou"]
        for dataset in ("cityscapes", "reasonseg")
        for protocol in ("paper", "released")
    }
    assert found["cityscapes", "paper"] == found["reasonseg", "paper"] == found["reasonseg", "released"] == 1
    assert found["cityscapes", "released"] == pytest.approx(1 / 3, abs=0.01)


def test_reasonseg_is_resized_by_pillow_and_by_bicubic_logits_as_released(model, processor, monkeypatch):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 70, 3), dtype=np.uint8))
    ground_truth = Image.new("L", picture.size)
    samples = [
        a_sample(image=picture, mask=ground_truth, dataset=name, sample_id=name, prompt="star")
        for name in ("DUTS", "reasonseg-hf")
    ]
    seen = []
    encode = model.encode_image
    monkeypatch.setattr(model, "encode_image", lambda pixels: seen.append(pixels) or encode(pixels))
    released = processor.with_settings(shortcut_size=600)
    options = ("sam_only", None, "concept+text", None, "released")
    usual, own = segment_samples(model, released, samples, *options)
    side = processor.sam_image_processor.size["width"]

    def pixels(image):
        return processor.sam_image_processor(images=image, return_tensors="pt")["pixel_values"]

    theirs = pixels(picture.resize((side, side), Image.Resampling.BICUBIC))
    shortcut = pixels(picture.resize((600, 600), Image.Resampling.BICUBIC))
    assert len({tensor.numpy().tobytes() for tensor in (theirs, shortcut, pixels(picture))}) == 3
    assert [torch.equal(*pair) for pair in zip(seen, (theirs, shortcut), strict=True)] == [True, True]
    for result, mode in ((usual, "bilinear"), (own, "bicubic")):
        logits = torch.from_numpy(result.mask_logits)[None, None]
        wanted = torch.nn.functional.interpolate(logits, (90, 70), mode=mode)[0, 0] > 0
        assert np.array_equal(np.asarray(result.mask) > 0, wanted.numpy()), mode


def test_soft_truths_are_resized_once_as_released():
    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 11), dtype=np.uint8))
    soft = soft.resize((40, 30))
    hard = Image.fromarray((np.asarray(soft) >= 128).astype(np.uint8) * 255)
    wanted = np.asarray(soft.resize((600, 600), Image.Resampling.BICUBIC)) > 127
    found = Image.fromarray(wanted.astype(np.uint8) * 255)
    sample = a_sample(image=Image.new("RGB", (40, 30)), mask=hard, soft_mask=soft)
    logits = np.where(wanted, 1, -1).astype(np.float32)
    result = ConceptSegmentation(
        mask=found, label="x", score=0.9, route="shortcut", decode_presence=0.9, mask_logits=logits
    )
    assert make_record(sample, result, "released", ("giou",))["foreground_iou"] == 1
    assert make_record(replace(sample, soft_mask=None), result, "released", ("giou",))["foreground_iou"] < 1


# -- profiles --


def test_without_a_profile_nothing_is_said_of_one(model, processor):
    """Reports of before stay as they are to the byte."""
    report = run(model, processor, limit=1)
    assert set(report.settings) == {
        *("benchmark", "split", "seed", "protocol", "metrics", "router", "generation", "sam_prompt"),
        *("max_references", "model", "weights", "configuration", "dtype", "record_format", "environment"),
    }
    assert report.settings["protocol"] == "standard" and "profile" not in report.to_markdown()
    assert "profile" not in report.to_csv()


def test_a_profile_holds_for_one_evaluation(model, processor):
    before = model.config.to_dict(), processor.to_dict()
    usual = run(model, processor, limit=2)
    report = run(model, processor, limit=2, profile="released")
    assert (model.config.to_dict(), processor.to_dict()) == before
    assert (report.settings["profile"], report.settings["protocol"]) == ("released", "released")
    assert report.settings["configuration"] != usual.settings["configuration"]
    assert "protocol released" in report.to_markdown() and "profile released" in report.to_markdown()
    assert report.settings["mosaic"]["grid"] == 2
    compared = run(model, processor, limit=2, profile="released", protocol="standard")
    assert compared.settings["profile"] == "released but protocol standard"
    paper = run(model, processor, limit=2, profile="paper")
    assert paper.settings["profile"] == "paper"
    assert [record["scores"] for record in paper.records] == [record["scores"] for record in usual.records]
    with pytest.raises(ValueError, match="no profile is named 'theirs'; use paper or released"):
        run(model, processor, profile="theirs")


def test_a_checkpoint_brings_its_profile(model, processor, monkeypatch):
    monkeypatch.setattr(model.config, "profile", "released")
    monkeypatch.setattr(model.config, "end_of_turn_state", True)
    report = run(model, processor, limit=1)
    assert report.settings["protocol"] == "released"
    said = report.settings["profile"]
    assert said.startswith("released but router_drop_parentheses False, ") and "mosaic.grid None" in said


def test_groups_beside_table_1_are_reported_by_stratum(model, processor, tmp_path):
    options = {"limit": 6, "router": "sam_only", "output_dir": tmp_path}
    report = run(model, processor, groups=["saliency", "which one"], **options)
    assert report.settings["groups"] == ["saliency", "which one"]
    rows = {(row["level"], row["group"]): row for row in report.table}
    assert rows["CD", "saliency"]["samples"] == rows["all", "all"]["samples"] == 3  # sums are Table 1's
    assert rows["CR", "which one"]["samples"] == 3
    strata = [name for _, name in rows if name.startswith("which one: ")]
    assert strata and sum(rows["CR", name]["samples"] for name in strata) == 3
    chosen = [record["chosen"] for record in report.records if "chosen" in record]
    assert len(chosen) == 3 and all("chosen" in json.dumps(record) for record in report.records[1::2])
    assert rows["CR", "which one"]["chosen_right"] == chosen.count("target") / 3
    assert "Which object the mask overlaps most" in (tmp_path / "report.md").read_text()
    with pytest.raises(ValueError, match="stands for several benchmarks; leave groups out"):
        evaluate(model, "table1", processor=processor, groups=["saliency"])
    with pytest.raises(ValueError, match="cannot be divided into groups"):
        evaluate(model, "plain", processor=processor, groups=["saliency"])
