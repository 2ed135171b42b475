"""Metrics against numbers worked out by hand, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conceptseg_hf.evaluation import box_iou, foreground_iou, presence_auc, score_masks


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
    with pytest.raises(ValueError, match="one each"):
        presence_auc([0.5], [])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30))
def test_presence_auc_is_the_probability_that_a_positive_ranks_higher(pairs):
    positives = [score for score, present in pairs if present]
    negatives = [score for score, present in pairs if not present]
    found = presence_auc([score for score, _ in pairs], [present for _, present in pairs])
    if not positives or not negatives:
        assert found is None
    else:
        wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
        assert found == pytest.approx(wins / (len(positives) * len(negatives)))


def test_scores_by_hand():
    scores = score_masks([LEFT, FULL], [TOP, LEFT])
    # Image 1: one pixel of each of tp, fp, fn, tn. Image 2: 2 tp, 2 fp.
    assert scores["giou"] == pytest.approx(100 * (1 / 3 + 1 / 2) / 2)
    assert scores["miou"] == pytest.approx(100 * ((1 / 3 + 1 / 2) / 2 + (1 / 3 + 0) / 2) / 2)
    assert scores["ciou"] == pytest.approx(100 * (1 + 2) / (3 + 4))
    assert scores["mae"] == pytest.approx(100 * (2 / 4 + 2 / 4) / 2)
    assert scores["ber"] == pytest.approx(100 * (0.5 + 0.5) / 2)
    assert scores["mdice"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 2)


def test_nothing_found_where_nothing_is_is_perfect():
    scores = score_masks([EMPTY], [EMPTY])
    assert scores == {"miou": 100, "giou": 100, "ciou": 100, "mae": 0, "ber": 0, "mdice": 100}


def test_something_found_where_nothing_is():
    scores = score_masks([LEFT], [EMPTY])
    assert (scores["giou"], scores["mdice"], scores["ber"]) == (0, 0, 50)


def test_ignored_pixels_do_not_count():
    labels = np.array([[1, 255], [0, 0]])
    assert score_masks([TOP], [labels])["giou"] == 100
    assert score_masks([TOP], [labels])["mae"] == 0
    # Without an ignored label 255 would be an unknown one.
    with pytest.raises(ValueError, match="labels"):
        score_masks([TOP], [labels], ignore_index=None)
    everything = np.array([[1, 255], [255, 255]])
    assert score_masks([TOP], [everything])["giou"] == 100


def test_a_mask_of_0_and_255_is_no_label_map():
    with pytest.raises(ValueError, match="bool array"):
        score_masks([LEFT], [LEFT.astype(np.uint8) * 255])
    assert score_masks([LEFT], [Image.fromarray(LEFT.astype(np.uint8) * 255)])["giou"] == 100


def test_probabilities_are_thresholded_but_mae_is_not():
    probabilities = np.where(LEFT, 0.75, 0.25).astype(np.float32)
    scores = score_masks([probabilities], [LEFT])
    assert scores["giou"] == 100
    assert scores["mae"] == pytest.approx(25)
    assert score_masks([np.full((2, 2), 0.5)], [EMPTY])["giou"] == 100, "0.5 is not above 0.5"


def test_accepts_generators_and_chosen_metrics():
    assert list(score_masks((m for m in [LEFT]), iter([LEFT]), metrics=("ber", "giou"))) == ["ber", "giou"]


@pytest.mark.parametrize(
    ("predictions", "truths", "options", "message"),
    [
        ([], [], {}, "no masks"),
        ([LEFT], [LEFT, TOP], {}, "one prediction per truth"),
        ([LEFT, TOP], [LEFT], {}, "one prediction per truth"),
        ([LEFT], [mask("#..")], {}, "size"),
        ([LEFT.astype(np.uint8)], [LEFT], {}, "bool, or probabilities"),
        ([np.full((2, 2), 1.5)], [LEFT], {}, "bool, or probabilities"),
        ([LEFT], [np.full((2, 2), 7)], {}, "labels"),
        ([LEFT], [LEFT], {"protocol": "other"}, "no protocol is named 'other'"),
        ([LEFT], [LEFT], {"metrics": ("iou",)}, "no metric is named 'iou'"),
    ],
)
def test_errors_are_one_sentence(predictions, truths, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        score_masks(predictions, truths, **options)
    assert "\n" not in str(caught.value)


def test_library_metrics_need_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py_sod_metrics", None)
    with pytest.raises(ImportError, match="pip install"):
        score_masks([LEFT], [LEFT], metrics=("f_w",))


def test_library_metrics():
    pytest.importorskip("py_sod_metrics", exc_type=ImportError)
    disk = np.hypot(*np.mgrid[-20:20, -20:20]) < 8
    perfect = score_masks([disk], [disk], metrics=("f_w", "s_measure", "giou"))
    assert perfect["f_w"] == pytest.approx(100, abs=1e-3)
    assert perfect["s_measure"] == pytest.approx(100, abs=1)
    # In float, near-edge misses cost something; with integer masks the smoothed errors would be truncated away.
    eroded = np.hypot(*np.mgrid[-20:20, -20:20]) < 5
    assert 40 < score_masks([eroded], [disk], metrics=("f_w",))["f_w"] < 90
