"""Tests of prefix sharing between rows with the same prompt."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import all_families, num_encoded_images
from torch import Tensor

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor
from conceptseg_hf.data import ConceptShapes
from conceptseg_hf.shared_prompts import find_shared_prompts, generate, share_prompts
from conceptseg_hf.vlm_families import get_family

ROWS = [0, 0, 1, 0, 2, 2, 1]
COMPLETION = (
    "<think>the red star</think><rule>the red star</rule><bbox>[1,2,30,40]</bbox><answer>star</answer>"
)


@pytest.fixture(scope="module")
def samples(processor: ConceptSegProcessor) -> list:
    # Prompts of three lengths: with a mosaic, without references, and with one reference.
    shapes = ConceptShapes("test")
    selected = [shapes[index] for index in (7, 10, 11)]
    return [processor.prepare(s.image, s.prompt, s.references) for s in selected]


@pytest.fixture(scope="module")
def prompts(processor: ConceptSegProcessor, samples: list) -> dict[str, Tensor]:
    return processor.family.model_inputs(processor.collate([samples[row] for row in ROWS]))


@all_families
def test_rows_with_the_same_prompt_and_images_share_it(
    model: ConceptSegForSegmentation, prompts: dict
) -> None:
    shared = find_shared_prompts(model.vlm, prompts, prompts["input_ids"].shape[1])
    assert shared.prompt_of_row == ROWS
    assert shared.row_of_prompt == [0, 2, 4]


@all_families
def test_prompts_that_differ_in_one_pixel_are_not_shared(
    model: ConceptSegForSegmentation, prompts: dict
) -> None:
    pixels = prompts["pixel_values"].clone()
    pixels[get_family(model.vlm.config).images_of_rows(model.vlm.config, prompts)[3].pixels.start, 0] += 1
    shared = find_shared_prompts(
        model.vlm, {**prompts, "pixel_values": pixels}, prompts["input_ids"].shape[1]
    )
    assert shared.prompt_of_row == [0, 0, 1, 2, 3, 3, 1]


def test_nothing_is_shared_by_different_prompts(
    model: ConceptSegForSegmentation, processor: ConceptSegProcessor, samples: list
) -> None:
    batch = processor.family.model_inputs(processor.collate(samples))
    assert find_shared_prompts(model.vlm, batch, batch["input_ids"].shape[1]) is None


@all_families
@pytest.mark.parametrize("do_sample", [False, True])
def test_generates_the_same_tokens_as_without_sharing(
    model: ConceptSegForSegmentation, prompts: dict, do_sample: bool
) -> None:
    settings = {"do_sample": do_sample, "max_new_tokens": 60}
    torch.manual_seed(3)
    plain = model.vlm.generate(**prompts, **settings)
    get_family(model.vlm.config).reset(model.vlm)
    torch.manual_seed(3)
    assert torch.equal(generate(model.vlm, prompts, **settings), plain)


@all_families
def test_images_of_a_shared_prompt_are_encoded_once(model: ConceptSegForSegmentation, prompts: dict) -> None:
    images: list[int] = []
    handle = (
        get_family(model.vlm.config)
        .vision_tower(model.vlm)
        .register_forward_hook(
            lambda module, args, kwargs, output: images.append(num_encoded_images(args, kwargs)),
            with_kwargs=True,
        )
    )
    try:
        generate(model.vlm, prompts, max_new_tokens=3)
    finally:
        handle.remove()
    assert images == [5], "two images with references, one without"


@all_families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_states_and_gradients_equal_those_without_sharing(
    make_model, processor: ConceptSegProcessor, samples: list, checkpointing: bool
) -> None:
    model = make_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    texts = [COMPLETION, COMPLETION[:40], "red", COMPLETION, "star", COMPLETION[:60], COMPLETION]
    batch = processor.collate([samples[row] for row in ROWS], texts)
    completion = batch["completion_mask"].bool()
    inputs = processor.family.model_inputs(batch)
    length = int(completion.any(0).nonzero()[0])
    used = completion.clone()
    used[:, length - 1] = True  # the state that predicts the first token
    parameters = [p for p in model.vlm.parameters() if p.requires_grad]
    weights = torch.randn(used.sum(), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    images: list[int] = []
    get_family(model.vlm.config).vision_tower(model.vlm).register_forward_pre_hook(
        lambda module, args, kwargs: images.append(num_encoded_images(args, kwargs)), with_kwargs=True
    )

    results = []
    for context in (nullcontext(), share_prompts(model.vlm, inputs, length)):
        with context:
            states = get_family(model.vlm.config).last_hidden_states(model.vlm, inputs)
        gradients = torch.autograd.grad((states[used] * weights).sum(), parameters, allow_unused=True)
        results.append((states[used].detach(), gradients))
    (plain, plain_gradients), (states, gradients) = results
    assert images[-1] < images[0], "fewer images are encoded"
    assert torch.allclose(states, plain, atol=1e-4)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6


def test_forward_of_the_base_model_is_restored(model: ConceptSegForSegmentation, prompts: dict) -> None:
    before = dict(vars(model.vlm.base_model))
    with share_prompts(model.vlm, prompts, prompts["input_ids"].shape[1] - 1):
        assert "forward" in vars(model.vlm.base_model)
    assert vars(model.vlm.base_model).keys() == before.keys()
