"""Tests for split-reference datasets: one mosaic per prompt and epoch, and boxes in the frame of the mosaic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg_hf import ConceptSegProcessor

pytest.importorskip("datasets")
from conceptseg_trainers.split_reference import COLUMNS, find_composer, set_epoch, split_reference_dataset

CELL, CANVAS, SCALE = 64, 128, 100


@pytest.fixture()
def dataset(shapes, nano_processor):
    return split_reference_dataset(shapes, processor=nano_processor)


def mosaics(dataset) -> list[bytes]:
    return [row["images"][0].tobytes() for row in dataset]


def test_rows_have_all_columns(dataset, shapes) -> None:
    assert set(COLUMNS) < set(dataset.column_names) and len(dataset) == len(shapes)
    row, sample = dataset[3], shapes[3]
    assert set(row) == set(dataset.column_names)
    assert row["sample_id"] == sample.sample_id and row["problem"] == sample.prompt
    assert row["target_image"].tobytes() == sample.image.tobytes() and row["gt_mask"] is sample.mask
    assert [image.size for image in row["images"]] == [(CANVAS, CANVAS)] * 2
    assert sample.prompt in row["prompt"][1]["content"]


def test_boxes_are_in_text_units_of_the_mosaic(dataset, shapes) -> None:
    for row, sample in zip(dataset, shapes, strict=True):
        expected = None if sample.box is None else [value * SCALE / CANVAS for value in sample.box]
        assert row["gt_box"] == (None if expected is None else pytest.approx(expected))
        if len(sample.references) < 2:
            assert row["gt_check_box"] is None
            continue
        # The proxy query is in the top left cell; its box is that of one of the references, scaled to the cell.
        on_cell = [
            [v * CELL / reference.image.width * SCALE / CANVAS for v in reference.box]
            for reference in sample.references
        ]
        assert any(row["gt_check_box"] == pytest.approx(box) for box in on_cell)


def test_several_boxes_of_a_proxy_query_are_alternatives(shapes, nano_processor) -> None:
    """The best of several boxes counts by default; the released code uses the enclosing box."""
    sample = next(sample for sample in shapes if len(sample.references) > 1)
    boxes = [(2, 2, 20, 20), (30, 24, 60, 44)]
    size = sample.references[0].image.size
    references = [replace(each, box=None, boxes=boxes) for each in sample.references[:2]]
    several = replace(sample, references=references)

    def check_of(processor):
        (row,) = split_reference_dataset([several], processor=processor)
        return row["gt_check_box"]

    scale = [CELL / size[0] * SCALE / CANVAS, CELL / size[1] * SCALE / CANVAS] * 2
    expected = [[value * factor for value, factor in zip(box, scale, strict=True)] for box in boxes]
    check_boxes = check_of(nano_processor)
    assert [pytest.approx(box) for box in check_boxes] == expected
    enclosing = check_of(nano_processor.with_settings(mosaic={"several_boxes": "enclosing"}))
    assert enclosing == pytest.approx([*expected[0][:2], *expected[1][2:]])


def test_proxy_box_is_neither_drawn_nor_in_the_prompt(dataset, shapes) -> None:
    for row, sample in zip(dataset, shapes, strict=True):
        if row["gt_check_box"] is None:
            continue
        cell = row["images"][0].crop((0, 0, CELL, CELL))
        unmarked = [
            reference.image.resize((CELL, CELL), Image.Resampling.BICUBIC) for reference in sample.references
        ]
        assert cell.tobytes() in [image.tobytes() for image in unmarked]
        numbers = ",".join(str(int(np.floor(value + 0.5))) for value in row["gt_check_box"])
        assert f"[{numbers}]" not in row["prompt"][1]["content"]


def test_rows_depend_only_on_seed_epoch_and_sample(shapes, nano_processor, dataset) -> None:
    def recreate(samples=shapes, **kwargs):
        return split_reference_dataset(samples, processor=nano_processor, **kwargs)

    first = mosaics(dataset)
    assert mosaics(dataset) == first == mosaics(recreate())
    assert mosaics(recreate(shapes[5:])) == first[5:]  # independent of the other samples
    assert mosaics(dataset.select([7, 2])) == [first[7], first[2]]
    assert (
        sum(map(np.not_equal, mosaics(recreate(seed=1)), first)) >= 4
    )  # of six samples with several possible compositions
    set_epoch(dataset, 1)
    second = mosaics(dataset)
    assert sum(map(np.not_equal, second, first)) >= 4
    assert sum(map(np.not_equal, mosaics(recreate(seed=1)), second)) >= 4
    set_epoch(dataset, 0)
    assert mosaics(dataset) == first


def test_workers_read_the_same_rows(dataset) -> None:
    for epoch in range(2):
        set_epoch(dataset, epoch)
        loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=list)
        read = [row["images"][0].tobytes() for batch in loader for row in batch]
        assert read == mosaics(dataset)


def test_every_reference_becomes_the_proxy_query_in_some_epoch(dataset) -> None:
    seen = set()
    for epoch in range(40):
        set_epoch(dataset, epoch)
        seen.add(dataset[0]["images"][0].crop((0, 0, CELL, CELL)).tobytes())
    assert len(seen) == 4


def test_order_is_kept_without_a_proxy_query(shapes, nano_processor) -> None:
    frames = [replace(reference, box=None) for reference in shapes[0].references]
    frames[1] = shapes[0].references[1]
    rows = split_reference_dataset([replace(shapes[0], references=frames)], processor=nano_processor)
    assert rows[0]["gt_check_box"] is None
    before = rows[0]["images"][0].tobytes()
    for epoch in range(1, 6):
        set_epoch(rows, epoch)
        assert rows[0]["images"][0].tobytes() == before


def test_mosaic_of_one_cell_has_no_proxy_query(shapes, nano_processor) -> None:
    row = split_reference_dataset(shapes, grid=1, processor=nano_processor)[0]
    assert row["gt_check_box"] is None and len(row["images"]) == 2


def test_without_references_only_the_target_is_shown(shapes, nano_processor) -> None:
    row = split_reference_dataset([replace(shapes[0], references=[])], processor=nano_processor)[0]
    assert row["gt_check_box"] is None and len(row["images"]) == 1


def test_vlm_processor_matches_inference(dataset, nano_processor, processor) -> None:
    for each in (nano_processor, processor):  # with and without a chat template
        find_composer(dataset).processor = each
        row = dataset[1]
        plain = each.vlm_processor()
        messages = [
            {"role": "system", "content": [{"type": "text", "text": row["prompt"][0]["content"]}]},
            {
                "role": "user",
                "content": [
                    *({"type": "image", "image": image} for image in row["images"]),
                    {"type": "text", "text": row["prompt"][1]["content"]},
                ],
            },
        ]
        encoded = plain.apply_chat_template(
            [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prepared = each.prepare_vlm(_prepared(each, row))
        assert torch.equal(encoded["input_ids"][0], prepared.input_ids)
        assert torch.equal(encoded["mm_token_type_ids"][0], prepared.mm_token_type_ids)
        torch.testing.assert_close(encoded["pixel_values"], prepared.pixel_values)
        assert torch.equal(encoded["image_grid_thw"], prepared.image_grid_thw)


def _prepared(processor: ConceptSegProcessor, row):
    from conceptseg_hf.processing_conceptseg import PreparedSample

    return PreparedSample(
        row["problem"],
        vlm_images=tuple(row["images"]),
        vlm_text=processor.chat_text(row["prompt"][1]["content"], len(row["images"])),
    )


def test_bad_input_is_reported(shapes, nano_processor) -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        split_reference_dataset([])
    with pytest.raises(ValueError, match="grid is 5; use 1, 2 or 3"):
        split_reference_dataset(shapes, grid=5)
    wrong = [replace(shapes[0], mask=Image.new("L", (10, 12)))]
    with pytest.raises(
        ValueError, match=r"'train-000000': its mask has 10 x 12 pixels, but its image has 128 x 128"
    ):
        split_reference_dataset(wrong, processor=nano_processor)[0]


def test_without_a_processor_rows_can_be_read(shapes) -> None:
    assert split_reference_dataset(shapes)[0]["images"][0].size == (CANVAS, CANVAS)
