"""Tests of metrics against values computed by hand, reference implementations and other libraries."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptseg_hf.evaluation import MaskMetrics, box_iou, foreground_iou, presence_auc, score_masks
from conceptseg_hf.evaluation.metrics import LIBRARY_METRICS, METRICS
from conceptseg_hf.evaluation.metrics.s_measure import load_library, s_measure


def mask(*rows: str) -> np.ndarray:
    """A mask from rows such as "#..#"."""
    return np.array([[character == "#" for character in row] for row in rows])


EMPTY, FULL, LEFT, TOP = mask("..", ".."), mask("##", "##"), mask("#.", "#."), mask("##", "..")


def test_foreground_iou():
    assert foreground_iou(LEFT, LEFT) == 1
    assert foreground_iou(LEFT, TOP) == pytest.approx(1 / 3)
    assert foreground_iou(EMPTY, LEFT) == 0
    assert foreground_iou(EMPTY, EMPTY) == 1
    with pytest.raises(ValueError, match="differ"):
        foreground_iou(LEFT, mask("#.."))


def test_box_iou():
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert box_iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert box_iou((0, 0, 1, 1), (1, 1, 2, 2)) == 0


def test_presence_auc_examples():
    assert presence_auc([0.9, 0.8, 0.2], [True, True, False]) == 1
    assert presence_auc([0.1, 0.9], [True, False]) == 0
    assert presence_auc([0.5, 0.5, 0.5], [True, False, False]) == 0.5
    assert presence_auc([0.5, 0.7], [True, True]) is None
    assert presence_auc([], []) is None
    with pytest.raises(ValueError, match="one score per label"):
        presence_auc([0.5], [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_presence_auc_is_the_probability_that_a_positive_ranks_higher(pairs):
    positives = [score for score, present in pairs if present]
    negatives = [score for score, present in pairs if not present]
    auc = presence_auc([score for score, _ in pairs], [present for _, present in pairs])
    if not positives or not negatives:
        assert auc is None
    else:
        wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
        assert auc == pytest.approx(wins / (len(positives) * len(negatives)))


def test_scores_match_manual_calculation():
    scores = score_masks([LEFT, FULL], [TOP, LEFT])
    # Image 1: one pixel of each of tp, fp, fn, tn. Image 2: 2 tp, 2 fp.
    assert scores["giou"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)
    assert scores["miou"] == pytest.approx(100 * ((1 / 3 + 1 / 2) / 2 + (1 / 3 + 0) / 2) / 2)
    assert scores["ciou"] == pytest.approx(100 * (1 + 2) / (3 + 4))
    assert scores["mae"] == pytest.approx(100 * (2 / 4 + 2 / 4) / 2)
    assert scores["ber"] == pytest.approx(100 * (0.5 + 0.5) / 2)
    assert scores["mdice"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_empty_prediction_of_an_empty_ground_truth_is_perfect():
    scores = score_masks([EMPTY], [EMPTY])
    assert scores == {"miou": 100, "giou": 100, "ciou": 100, "mae": 0, "ber": 0, "mdice": 100}


def test_nonempty_prediction_of_an_empty_ground_truth():
    scores = score_masks([LEFT], [EMPTY])
    assert (scores["giou"], scores["mdice"], scores["ber"]) == (0, 0, 50)


def test_ignored_pixels_do_not_count():
    labels = np.array([[1, 255], [0, 0]])
    assert score_masks([TOP], [labels])["giou"] == 100
    assert score_masks([TOP], [labels])["mae"] == 0
    # Without `ignore_index`, 255 is an unknown label.
    with pytest.raises(ValueError, match="labels"):
        score_masks([TOP], [labels], ignore_index=None)
    mostly_ignored = np.array([[1, 255], [255, 255]])
    assert score_masks([TOP], [mostly_ignored])["giou"] == 100


def test_masks_of_0_and_255_are_rejected_as_label_maps():
    with pytest.raises(ValueError, match="bool array"):
        score_masks([LEFT], [LEFT.astype(np.uint8) * 255])
    assert score_masks([LEFT], [Image.fromarray(LEFT.astype(np.uint8) * 255)])["giou"] == 100


@pytest.mark.parametrize("top", [1, 255])
@pytest.mark.parametrize("mode", ["L", "P", "I"])
def test_images_are_read_as_masks_of_0_and_1_or_255(top, mode):
    left, above = (Image.fromarray(array.astype(np.uint8) * top) for array in (LEFT, TOP))
    if mode == "P":
        left.putpalette([0, 0, 0] * 256)
    left = left.convert(mode)
    assert score_masks([left], [above])["giou"] == pytest.approx(100 / 3)
    assert score_masks([above], [left]) == score_masks([TOP], [LEFT])
    with pytest.raises(ValueError, match="prediction 0 has shape"):
        score_masks([left], [Image.new("L", (3, 2), top)])
    assert MaskMetrics().update(TOP, LEFT, ignore=left)["tn"] == 1


def test_paper_protocol_compares_masks_of_any_size():
    small, large = (np.zeros(size, dtype=bool) for size in ((20, 30), (41, 59)))
    small[:, :15], large[:, 30:] = True, True
    assert score_masks([small], [small], "paper")["giou"] == 100
    assert score_masks([small], [~large], "paper")["giou"] == pytest.approx(100, abs=2)
    assert score_masks([small], [large], "paper")["giou"] < 2
    with pytest.raises(ValueError, match="prediction 0 has shape"):
        # With ignored pixels, the ground truth is not resized.
        score_masks([small], [np.where(large, 1, 255)], "paper")


def test_f_w_of_an_empty_ground_truth_is_0_as_in_pysodmetrics():
    pytest.importorskip("scipy")
    assert score_masks([EMPTY], [EMPTY], metrics=("f_w", "giou")) == {"f_w": 0, "giou": 100}


def test_mae_is_computed_on_probabilities_without_threshold():
    probabilities = np.where(LEFT, 0.75, 0.25).astype(np.float32)
    scores = score_masks([probabilities], [LEFT])
    assert scores["giou"] == 100
    assert scores["mae"] == pytest.approx(25)
    assert score_masks([np.full((2, 2), 0.5)], [EMPTY])["giou"] == 100, "0.5 is not above 0.5"


def test_accepts_generators_and_a_selection_of_metrics():
    assert list(score_masks((m for m in [LEFT]), iter([LEFT]), metrics=("ber", "giou"))) == ["ber", "giou"]


@pytest.mark.parametrize(
    ("predictions", "ground_truths", "options", "message"),
    [
        ([], [], {}, "no masks"),
        ([LEFT], [LEFT, TOP], {}, "one prediction per ground truth"),
        ([LEFT, TOP], [LEFT], {}, "one prediction per ground truth"),
        ([LEFT], [mask("#..")], {}, "size"),
        ([LEFT.astype(np.uint8)], [LEFT], {}, "bool, or probabilities"),
        ([np.full((2, 2), 1.5)], [LEFT], {}, "bool, or probabilities"),
        ([LEFT], [np.full((2, 2), 7)], {}, "labels"),
        ([LEFT[None]], [LEFT[None]], {}, r"ground truth 0 has shape \(1, 2, 2\); give \(H, W\)"),
        ([LEFT[..., None]], [LEFT], {}, r"prediction 0 has shape \(2, 2, 1\); give \(H, W\)"),
        ([LEFT], [LEFT], {"protocol": "other"}, "no protocol is named 'other'"),
        ([LEFT], [LEFT], {"metrics": ("iou",)}, "no metric is named 'iou'"),
    ],
)
def test_errors_are_one_sentence(predictions, ground_truths, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        score_masks(predictions, ground_truths, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("metric", "module"), [("s_measure", "py_sod_metrics"), ("f_w", "scipy")])
def test_missing_library_raises_on_construction(monkeypatch, metric, module):
    load_library.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match="pip install"):
        MaskMetrics(metrics=(metric,))


def test_s_measure_of_bool_masks_equals_that_of_probabilities():
    """Compares our counts with the library, also for centroids at the border, where the library itself returns NaN."""
    pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    for prediction, ground_truth in pairs(300):
        assert s_measure(prediction, ground_truth) == pytest.approx(
            s_measure(prediction.astype(float), ground_truth), abs=1e-9
        )


def test_library_metrics():
    pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    disk = np.hypot(*np.mgrid[-20:20, -20:20]) < 8
    perfect = score_masks([disk], [disk], metrics=("f_w", "s_measure", "giou"))
    assert perfect["f_w"] == pytest.approx(100, abs=1e-3)
    assert perfect["s_measure"] == pytest.approx(100, abs=1)
    # With floats, misses near the border lower the score; with integers, the smoothed errors would be truncated to 0.
    eroded = np.hypot(*np.mgrid[-20:20, -20:20]) < 5
    assert 40 < score_masks([eroded], [disk], metrics=("f_w",))["f_w"] < 90


_KINDS = ("empty", "full", "pixel", "line", "noise", "sparse", "disk", "stripes")


def draw(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a random mask of a kind that is an edge case for metrics."""
    kind = _KINDS[int(rng.integers(len(_KINDS)))]
    mask = np.zeros((height, width), dtype=bool)
    if kind == "full":
        mask[:] = True
    elif kind == "pixel":
        mask[rng.integers(height), rng.integers(width)] = True
    elif kind == "line":
        mask[rng.integers(height)] = True
    elif kind in ("noise", "sparse"):
        mask = rng.random((height, width)) < (0.5 if kind == "noise" else 0.02)
    elif kind == "disk":
        y, x = np.mgrid[:height, :width]
        mask = np.hypot(y - rng.integers(height), x - rng.integers(width)) < rng.integers(1, height + 2)
    elif kind == "stripes":
        mask[:, :: int(rng.integers(2, 6))] = True
    return mask


def pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    result = []
    for _ in range(count):
        height, width = rng.integers(1, 48, 2)
        result.append((draw(rng, height, width), draw(rng, height, width)))
    return result


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # raised by the library for empty regions
def test_scores_of_500_pairs_equal_pysodmetrics():
    """Up to 1e-6. A ratio with a denominator of 0 is 0 in the library (BER: 0.5), but 1 here."""
    sod = pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    options = {"with_dynamic": False, "with_adaptive": False, "with_binary": True, "sample_based": True}
    empty_unions = missing_classes = empty_regions = 0
    for prediction, ground_truth in pairs(500):
        scores = score_masks(
            [prediction], [ground_truth], metrics=("giou", "mdice", "ber", "mae", "f_w", "s_measure")
        )
        handlers = {
            "giou": sod.IOUHandler(**options),
            "mdice": sod.DICEHandler(**options),
            "ber": sod.BERHandler(**options),
        }
        tables = sod.FmeasureV2(metric_handlers=handlers)
        other_metrics = {"f_w": sod.WeightedFmeasure(beta=1), "s_measure": sod.Smeasure(), "mae": sod.MAE()}
        for metric in (tables, *other_metrics.values()):
            metric.step(pred=prediction.astype(np.float64), gt=ground_truth, normalize=False)
        expected = {name: float(value["binary"]) for name, value in tables.get_results().items()}
        keys = {"f_w": "wfm", "s_measure": "sm", "mae": "mae"}
        expected |= {name: float(metric.get_results()[keys[name]]) for name, metric in other_metrics.items()}
        if not (prediction | ground_truth).any():
            empty_unions += 1
            assert (expected["giou"], expected["mdice"]) == (0, 0)
            expected |= {"giou": 1, "mdice": 1}
        if ground_truth.all() or not ground_truth.any():
            missing_classes += 1
            # The library counts a class without pixels with a recall of 0; we exclude the class.
            expected["ber"] = 2 * expected["ber"] - 1
        if np.isnan(expected["s_measure"]):  # the centroid is at the border; see `load_library`
            empty_regions += 1
            assert 0 <= scores["s_measure"] <= 100
            del expected["s_measure"]
        for name, value in expected.items():
            assert scores[name] / 100 == pytest.approx(value, abs=1e-6), (name, prediction.shape)
    assert empty_unions > 5 and missing_classes > 50 and empty_regions < 100, (
        "the random pairs must include the edge cases"
    )


def test_ciou_equals_torchmetrics():
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch

    metric = torchmetrics.classification.BinaryJaccardIndex(ignore_index=255)
    rng = np.random.default_rng(1)
    predictions, ground_truths = [], []
    for prediction, ground_truth in pairs(120):
        labels = ground_truth.astype(np.uint8)
        labels[rng.random(labels.shape) < 0.2] = 255
        if not (labels == 1).any():
            continue
        predictions.append(prediction)
        ground_truths.append(labels)
        metric.update(
            torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))
        )
    assert score_masks(predictions, ground_truths)["ciou"] == pytest.approx(
        100 * float(metric.compute()), abs=1e-4
    )


def test_giou_is_the_mean_over_images_and_1_for_an_empty_union():
    """Follows the definition in LISA's evaluation."""
    total = 0.0
    for prediction, ground_truth in pairs(200):
        intersection, union = (prediction & ground_truth).sum(), (prediction | ground_truth).sum()
        total += 1.0 if union == 0 else intersection / union
    assert score_masks(*zip(*pairs(200)))["giou"] == pytest.approx(100 * total / 200)


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_results_do_not_depend_on_order_or_number_of_processes(rng: random.Random, processes: int):
    all_pairs = pairs(40)
    single = MaskMetrics()
    for pair in all_pairs:
        single.update(*pair)
    rng.shuffle(all_pairs)
    accumulators = [MaskMetrics() for _ in range(processes)]
    for pair in all_pairs:
        rng.choice(accumulators).update(*pair)
    merged = accumulators[0]
    for accumulator in accumulators[1:]:
        merged.merge(accumulator)
    assert merged.compute() == single.compute()


def test_returned_scores_can_be_merged():
    """The return values of `update` are sufficient for another process to compute the metrics."""
    local, remote = MaskMetrics(), MaskMetrics()
    remote.merge([local.update(*pair) for pair in pairs(20)])
    assert remote.compute() == local.compute()
    with pytest.raises(ValueError, match="no masks"):
        MaskMetrics().compute()


def test_paper_protocol_compares_at_600_pixels_with_thresholded_predictions():
    ground_truth = np.zeros((60, 40), dtype=bool)
    ground_truth[20:40, 10:30] = True
    probability = np.where(ground_truth, 0.9, 0.1)
    paper = score_masks([probability], [ground_truth], protocol="paper", metrics=("giou", "mae"))
    assert paper == {"giou": 100, "mae": 0}, "MAE is computed on the thresholded mask"
    assert score_masks([probability], [ground_truth])["mae"] == pytest.approx(10)
    metrics = MaskMetrics("paper")
    score = metrics.update(probability, ground_truth)
    assert score["tp"] + score["tn"] == 600 * 600
    assert score["tp"] == pytest.approx(600 * 600 * 400 / 2400, rel=0.01)
    labels = ground_truth.astype(np.uint8)
    labels[0] = 255
    metrics = MaskMetrics("paper")
    score = metrics.update(probability, labels)
    assert score["tp"] + score["tn"] == 59 * 40, "with ignored pixels, the ground truth keeps its size"


def test_whole_number_errors_ignore_misses_near_the_border():
    """The prediction is a disk of radius 8, eroded by 3 pixels."""
    y, x = np.mgrid[:64, :64]
    disk, eroded = np.hypot(y - 32, x - 32) < 8, np.hypot(y - 32, x - 32) < 5
    pytest.importorskip("scipy")
    from conceptseg_hf.evaluation.metrics.weighted_f import weighted_f_measure

    assert weighted_f_measure(eroded, disk, integer_errors=True) == pytest.approx(1, abs=1e-6)
    assert 0.6 < weighted_f_measure(eroded, disk) < 0.8
    with pytest.raises(ValueError, match="bool prediction"):
        weighted_f_measure(eroded.astype(float), disk, integer_errors=True)
    with pytest.raises(ValueError, match="same size"):
        weighted_f_measure(eroded, disk[1:])


def test_whole_number_errors_equal_pysodmetrics_with_integer_masks():
    sod = pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    from conceptseg_hf.evaluation.metrics.weighted_f import weighted_f_measure

    y, x = np.mgrid[:64, :64]
    disk = np.hypot(y - 32, x - 30) < 20
    assert weighted_f_measure(np.zeros_like(disk), disk, integer_errors=True) < 0.3, (
        "a missed object must have a low score"
    )
    for prediction, ground_truth in [*pairs(300), (np.zeros_like(disk), disk), (np.roll(disk, 9, 0), disk)]:
        if ground_truth.any():
            expected = sod.WeightedFmeasure(beta=1).cal_wfm(prediction.astype(np.int64), ground_truth)
            score = weighted_f_measure(prediction, ground_truth, integer_errors=True)
            assert score == pytest.approx(expected, abs=1e-6), prediction.shape


def test_paper_protocol_computes_f_w_with_and_without_ignored_pixels():
    pytest.importorskip("scipy")
    ground_truth = np.hypot(*np.mgrid[-30:30, -30:30]) < 20
    labels = ground_truth.astype(np.uint8)
    labels[:9] = 255
    for target in (ground_truth, labels):
        scores = score_masks([ground_truth], [target], protocol="paper", metrics=("f_w", "giou"))
        assert scores == pytest.approx({"f_w": 100, "giou": 100}, abs=1e-3)
    empty = ground_truth & False
    assert score_masks([empty], [ground_truth], protocol="paper", metrics=("f_w",))["f_w"] < 30


def test_every_metric_is_a_percentage():
    scores = score_masks(*zip(*pairs(60)), metrics=(*METRICS, *LIBRARY_METRICS))
    assert list(scores) == [*METRICS, *LIBRARY_METRICS] and all(
        0 <= value <= 100 for value in scores.values()
    )


# -- protocol "released" --


def disk(size: int, radius: float) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return x**2 + y**2 < radius**2


def s_measure_by_definition(prediction: np.ndarray, ground_truth: np.ndarray) -> float:
    """Compute the S-measure of Fan et al. with epsilons of 1e-8, population deviations and sample covariances."""

    def of_region(values: np.ndarray) -> float:
        return 2 * values.mean() / (values.mean() ** 2 + 1 + values.std() + 1e-8)

    fraction = ground_truth.mean()
    objects = fraction * of_region(prediction[ground_truth]) + (1 - fraction) * of_region(
        1 - prediction[~ground_truth]
    )
    rows, columns = np.nonzero(ground_truth)
    middle = round(rows.mean()) + 1, round(columns.mean()) + 1
    regions = 0.0
    for block in np.ndindex(2, 2):
        part = tuple(slice(None, m) if side == 0 else slice(m, None) for side, m in zip(block, middle))
        x, y = prediction[part].astype(float), ground_truth[part].astype(float)
        covariance = ((x - x.mean()) * (y - y.mean())).sum() / (x.size - 1)
        numerator = 4 * x.mean() * y.mean() * covariance
        denominator = (x.mean() ** 2 + y.mean() ** 2) * (x.var() + y.var())
        similarity = numerator / (denominator + 1e-8) if numerator else float(denominator == 0)
        regions += similarity * x.size / ground_truth.size
    return 0.5 * objects + 0.5 * regions


@pytest.mark.parametrize("area", [0.0005, 0.002, 0.01, 0.2])
@pytest.mark.parametrize("shift", [0, 2, 40])
def test_released_s_measure_matches_its_definition(area, shift):
    ground_truth = disk(600, 600 * (area / np.pi) ** 0.5)
    prediction = np.roll(disk(600, 580 * (area / np.pi) ** 0.5), shift, axis=1)
    expected = s_measure_by_definition(prediction.astype(float), ground_truth)
    assert s_measure(prediction, ground_truth, released=True) == pytest.approx(expected, abs=1e-9)


def test_released_s_measure_is_lower_for_small_objects():
    """For an object of 0.2 % of the image; the authors' toolkit gave 0.836 instead of 0.941 for a similar pair."""
    ground_truth, prediction = disk(600, 15.139), disk(600, 13.7)
    assert ground_truth.mean() == pytest.approx(0.002, abs=2e-5)
    assert s_measure(prediction, ground_truth) == pytest.approx(0.9399, abs=1e-4)
    assert s_measure(prediction, ground_truth, released=True) == pytest.approx(0.8089, abs=1e-4)
    large, smaller = disk(600, 200), disk(600, 198)
    assert s_measure(smaller, large, True) == pytest.approx(s_measure(smaller, large), abs=1e-4)
    assert s_measure(large, large, True) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="released needs a bool prediction"):
        s_measure(large.astype(float), large, True)


def test_released_protocol_resizes_ground_truths_with_pillow_and_soft_edges():
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (37, 41), dtype=np.uint8)).resize((123, 97))
    resized_soft = np.asarray(soft.resize((600, 600), Image.Resampling.BICUBIC)) > 127
    hard = np.asarray(soft) >= 128
    mask = Image.fromarray(hard.astype(np.uint8) * 255)
    resized_hard = np.asarray(mask.resize((600, 600), Image.Resampling.BICUBIC)) > 127
    bilinear = torch.nn.functional.interpolate(
        torch.from_numpy(hard.astype(np.float32))[None, None], size=(600, 600), mode="bilinear"
    )[0, 0].numpy()
    ground_truths = {"soft": resized_soft, "hard": resized_hard, "paper": bilinear > 0.5}
    assert len({ground_truth.tobytes() for ground_truth in ground_truths.values()}) == 3
    for (name, ground_truth), stored in zip(ground_truths.items(), (soft, mask, mask), strict=True):
        protocol = "paper" if name == "paper" else "released"
        score = MaskMetrics(protocol, metrics=("miou",)).update(ground_truth, stored)
        assert score["fp"] == score["fn"] == 0 and score["tp"] == np.count_nonzero(ground_truth)


def test_released_ber_counts_an_absent_class_as_wrong():
    """The recall of a class without pixels is 0 and counts as half of the mean."""
    assert score_masks([EMPTY], [EMPTY], protocol="released", metrics=["ber"])["ber"] == 50
    assert score_masks([FULL], [FULL], protocol="released", metrics=["ber"])["ber"] == 50
    assert score_masks([FULL], [EMPTY], protocol="released", metrics=["ber"])["ber"] == 100
    assert score_masks([LEFT], [LEFT], protocol="released", metrics=["ber"])["ber"] == 0
    assert score_masks([EMPTY], [EMPTY], protocol="paper", metrics=["ber"])["ber"] == 0
