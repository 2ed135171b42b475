"""Tests of the stage "ctm": what the concept tokens imitate."""

from __future__ import annotations

import pytest
import torch
from conceptseg_trainers.from_scratch.ctm_completions import KINDS, CompletionWriter
from conceptseg_trainers.from_scratch.ctm_stage import CtmStage, _repeated
from conceptseg_trainers.from_scratch.sam_stage import images_to_pixels, logits_to_masks, mask_logits
from conceptseg_trainers.nano.ctm_data import ShapesCtmData
from transformers.image_transforms import corners_to_center_format

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.evaluation import foreground_iou
from conceptseg_hf.sam_prompt import BOX_TEXT, ImageFeatures, decode, encode_image, encode_text

TASKS = 24


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> CtmStage:
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    return CtmStage(
        model, processor, ShapesCtmData(), tmp_path_factory.mktemp("ctm"), tasks=TASKS, held_out=1
    )


@pytest.mark.parametrize("is_named", [True, False])
@torch.no_grad()
def test_imitated_tokens_segment_like_the_prompt_that_they_are_from(stage, is_named) -> None:
    table, sam = stage.table, stage.model.sam
    named, boxes = table["true_named"], table["true_box"]
    chosen = [row for row in range(TASKS) if named[row] == is_named and boxes[row].any()][:6]
    assert len(chosen) > 2
    kinds = [KINDS.index("true")] * 2 * len(chosen)
    features = stage.encode([stage.data.task(row) for row in chosen])
    tokens, known = stage.imitated_tokens([row for row in chosen for _ in range(2)], kinds, features)
    assert known.all() and torch.equal(tokens[::2], tokens[1::2])
    pixels = images_to_pixels([stage.data.task(row).pixels for row in chosen], "cpu")
    features = encode_image(sam, pixels)
    alone = decode(sam, ImageFeatures(features.vision, None), concept_embeds=tokens[::2])
    if is_named:
        prompt = decode(sam, features, *encode_text(sam, *table["true_text"][chosen].unbind(1)))
    else:
        centers = corners_to_center_format(boxes[chosen])
        text = encode_text(sam, *stage.processor.sam_text([BOX_TEXT] * len(chosen)))
        prompt = decode(sam, features, *text, boxes=centers[:, None])
    side = pixels.shape[-1]
    pairs = zip(logits_to_masks(mask_logits(alone), side), logits_to_masks(mask_logits(prompt), side))
    ious = [foreground_iou(mask, expected) for mask, expected in pairs]
    assert sum(ious) / len(ious) > 0.9


def test_completions_without_box_and_unambiguous_answer_are_not_imitated(stage) -> None:
    kinds = [KINDS.index("true")] * 2
    row = next(row for row in range(TASKS) if not stage.table["true_named"][row])
    features = stage.encode([stage.data.task(row)])
    box = stage.table["true_box"][row].clone()
    assert stage.imitated_tokens([row, row], kinds, features)[1].all()
    try:
        stage.table["true_box"][row] = 0
        assert not stage.imitated_tokens([row, row], kinds, features)[1].any()
    finally:
        stage.table["true_box"][row] = box


def test_all_completions_imitate_their_box_at_first(stage) -> None:
    row = next(row for row in range(TASKS) if stage.table["true_named"][row])
    features, kinds = stage.encode([stage.data.task(row)]), [KINDS.index("true")] * 2
    tokens = {flag: stage.imitated_tokens([row, row], kinds, features, flag)[0] for flag in (False, True)}
    assert not torch.allclose(tokens[True], tokens[False])
    steps = stage.steps
    last = steps.reading + steps.imitation
    assert {"imitation"} == stage.loss(steps.reading)[1].keys() == stage.loss(last - 1)[1].keys()
    assert stage.loss(last)[1].keys() == {"dice", "focal", "presence", "imitation"}


def test_tokens_are_repeated_to_the_number_of_concept_tokens() -> None:
    tokens, padding = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]])
    assert _repeated(tokens, padding, 1).flatten().tolist() == [1]
    assert _repeated(tokens, padding, 5).flatten().tolist() == [1, 2, 3, 4, 3]


def test_completions_of_another_vlm_are_not_reused(tmp_path) -> None:
    """A VLM that is trained again in the same run folder writes other completions, with other hidden states."""
    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    data = ShapesCtmData()

    def table(seed: int = 0) -> dict[str, torch.Tensor]:
        writer = CompletionWriter(model, processor, data.noun, len(data.class_sizes), "ctm", "cpu", seed)
        return writer.table(tmp_path / "train", data.task, 2)

    first, again = table(), table(seed=1)  # runs with several seeds share their completions
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        model.vlm.get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(
        ValueError, match="completions of another VLM or of another version of the code; delete"
    ):
        table()
