"""Tests of run-length encoded masks: the round trip, and compatibility with COCO's encoding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conceptseg_hf.evaluation.records.rle import decode_mask, encode_mask


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_round_trip(mask):
    encoded = json.loads(json.dumps(encode_mask(mask)))
    assert np.array_equal(decode_mask(encoded), mask)


def test_long_runs_and_borders():
    mask = np.zeros((700, 500), dtype=bool)
    mask[3:650, 2:498] = True
    assert np.array_equal(decode_mask(encode_mask(mask)), mask)
    for value in (False, True):
        assert (decode_mask(encode_mask(np.full((90, 70), value))) == value).all()


def test_encoding_equals_coco():
    # The runs in column-major order are 5 2 2 2 2 2 5; from the fourth on, the run two places before is subtracted.
    mask = np.zeros((4, 5), dtype=bool)
    mask[1:3, 1:4] = True
    assert encode_mask(mask) == {"size": [4, 5], "counts": "5220003"}


def test_pycocotools_decodes_and_encodes_the_same():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((int(rng.integers(1, 60)), int(rng.integers(1, 60)))) > rng.random()
        encoded = encode_mask(mask)
        assert np.array_equal(coco.decode(encoded | {"counts": encoded["counts"].encode()}), mask)
        assert coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode() == encoded["counts"]


def test_damaged_encoding_raises():
    encoded = encode_mask(np.eye(8, dtype=bool))
    with pytest.raises(ValueError, match="8 x 8"):
        decode_mask(encoded | {"counts": encoded["counts"][:-2]})
