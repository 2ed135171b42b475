"""CoPRS model: the formulas of the paper, one pass, batches, gradients, saving."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline

from conceptseg_hf import CoPRSConfig, CoPRSForSegmentation, CoPRSProcessor, Reference
from conceptseg_hf.coprs.completion import format_reasoning
from conceptseg_hf.coprs.sam_decoder import PriorFeatures

TEXTS = [format_reasoning("the red circle is left"), format_reasoning("a large star")]


def batch_of(model, images, prompts, texts=TEXTS):
    """Return the arguments of `forward` for teacher-forced completions."""
    processor = model.processor
    samples = [processor.prepare(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    return {
        **processor.collate(samples, texts),
        "sam_pixel_values": torch.stack([sample.sam_pixel_values for sample in samples]),
        "valid_sizes": torch.tensor([processor.valid_size(image.size) for image in images]),
    }


def reference_prior(model, states, keys, valid_sizes):
    """Algorithm 1 pixel by pixel, then two convolutions, resampling, and -50 where the input is padded."""
    prior, config = model.prior, model.config
    query = states @ prior.query_head.weight.T
    key_weight = prior.key_projection.weight[:, :, 0, 0]
    batch, _, height, width = keys.shape
    scores = torch.zeros(batch, config.num_heads, height, width, dtype=states.dtype)
    for head in range(config.num_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        for u in range(height):
            for v in range(width):
                key = keys[:, :, u, v] @ key_weight[rows].T
                scores[:, head, u, v] = (query[:, rows] * key).sum(-1) / math.sqrt(config.head_dim)
    first, last = prior.fusion[0], prior.fusion[2]
    fused = F.silu(F.conv2d(scores, first.weight, first.bias, padding=1))
    fused = F.conv2d(fused, last.weight, last.bias, padding=1)
    resampled = F.interpolate(fused, scale_factor=4, mode="bilinear", align_corners=False)
    side, stride = resampled.shape[-1], config.sam_image_size / resampled.shape[-1]
    for row, (valid_height, valid_width) in enumerate(valid_sizes.tolist()):
        for index in range(side):
            if (index + 0.5) * stride >= valid_height:
                resampled[row, :, index] = -50.0
            if (index + 0.5) * stride >= valid_width:
                resampled[row, :, :, index] = -50.0
    return resampled


def test_prior_and_mask_equal_the_formulas(coprs, kind, make_image):
    """In float64, since the logits of a random model are large."""
    coprs = copy.deepcopy(coprs).double()
    images, prompts = [make_image(0), make_image(1, (50, 80))], ["red circle", "star left"]
    batch = batch_of(coprs, images, prompts)
    for name in ("pixel_values", "sam_pixel_values"):
        batch[name] = batch[name].double()
    with torch.no_grad():
        output = coprs(**batch)
        hidden = coprs.vlm(
            **{
                name: batch[name]
                for name in coprs.processor.model_input_names
                if name in batch and "sam" not in name
            },
            output_hidden_states=True,
        ).hidden_states[-1]
        # The completion is "<think> ... </think> <REF_POS> <|im_end|>", padded on the right.
        columns = [int((row == coprs.config.ref_pos_token_id).nonzero()[-1]) for row in batch["input_ids"]]
        states = torch.stack([hidden[row, column] for row, column in enumerate(columns)])
        embeddings = coprs.sam.get_image_embeddings(batch["sam_pixel_values"])
        keys = embeddings if kind == "sam" else embeddings[-1]
        prior = reference_prior(coprs, states, keys, batch["valid_sizes"])
        stock = coprs.sam(image_embeddings=embeddings, input_masks=prior, multimask_output=False).pred_masks[
            :, 0
        ]
    assert output.has_position.tolist() == [True, True]
    torch.testing.assert_close(output.prior_logits, prior, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.mask_logits, stock, atol=1e-5, rtol=1e-5)
    assert output.prior_logits.shape == output.mask_logits.shape == (2, 1, 64, 64)
    assert ((prior == -50).any().item()) == (kind == "sam")  # SAM 3's images are not padded
    assert (output.prior_logits[0] - output.prior_logits[1]).abs().max() > 0.1


def test_the_state_of_the_token_comes_from_the_generation_pass(coprs, make_image):
    """The first token is forced to be <REF_POS>, since a random model would not write it."""
    model, processor = coprs, coprs.processor
    samples = [processor.prepare(make_image(2), "red circle"), processor.prepare(make_image(3), "star")]
    calls = []
    handle = model.vlm.base_model.register_forward_hook(lambda *_: calls.append(1))
    forced = {"max_new_tokens": 4, "forced_bos_token_id": None, "begin_suppress_tokens": None}
    position = model.config.ref_pos_token_id
    others = [token for token in range(model.config.get_text_config().vocab_size) if token != position]
    results = model.segment(
        samples,
        generation_config={**forced, "suppress_tokens": others},
        processor=processor,
        return_logits=True,
    )
    handle.remove()
    assert len(calls) == 2  # the prompts, then the token itself: no second pass over prompt and completion
    batch = batch_of(
        model, [make_image(2), make_image(3)], ["red circle", "star"], ["<REF_POS>", "<REF_POS>"]
    )
    with torch.no_grad():
        output = model(**batch)
    for row, (result, size) in enumerate(zip(results, batch["valid_sizes"].tolist(), strict=True)):
        assert result.completion == "<REF_POS>"
        assert result.route == "reasoning"
        masks = F.interpolate(output.mask_logits[row][None], size=(128, 128), mode="bilinear")[0, 0]
        expected = masks[: size[0], : size[1]] if size != [128, 128] else output.mask_logits[row, 0]
        np.testing.assert_allclose(result.mask_logits, expected.numpy(), atol=2e-5)
        image_mask = F.interpolate(expected[None, None], size=(60, 90), mode="bilinear")[0, 0] > 0
        assert (np.asarray(result.mask) > 0).tolist() == image_mask.tolist()
        assert result.heatmap.shape == (60, 90) and 0 <= result.heatmap.min() <= result.heatmap.max() <= 1


def test_streamed_text_adds_up_to_the_completion(coprs, make_image):
    processor = coprs.processor
    samples = [processor.prepare(make_image(4), "red circle"), processor.prepare(make_image(5), "star")]
    options = {"processor": processor, "generation_config": {"max_new_tokens": 5}}
    expected = coprs.segment(samples, batch_size=1, **options)
    pieces, results = [""], []
    for item in coprs.stream_segment(samples, **options):
        if isinstance(item, str):
            pieces[-1] += item
        else:
            results.append(item)
            pieces.append("")
    assert pieces == [*(result.completion for result in expected), ""]
    assert [result.to_dict()["mask"] for result in results] == [each.to_dict()["mask"] for each in expected]


def test_batched_equals_single(coprs, make_image):
    processor = coprs.processor
    items = [
        (make_image(4), "red circle"),
        (make_image(5, (40, 70)), "the odd one out in the image"),
        (make_image(6), "star"),
    ]
    samples = [processor.prepare(*item) for item in items]
    options = {"processor": processor, "return_logits": True, "generation_config": {"max_new_tokens": 5}}
    position = coprs.config.ref_pos_token_id
    # After some free tokens, the model would rarely write the token: force it by its bias.
    boost = {"sequence_bias": [[[position], 30.0]]}
    options["generation_config"] |= boost
    batched = coprs.segment(samples, **options)
    single = [coprs.segment([processor.prepare(*item)], **options)[0] for item in items]
    called = coprs.segment(
        **processor(*map(list, zip(*items))),
        return_logits=True,
        generation_config=options["generation_config"],
    )
    for one, many, other in zip(single, batched, called, strict=True):
        assert one.completion == many.completion == other.completion
        assert one.completion.endswith("<REF_POS>") and one.completion.count("<REF_POS>") == 1
        np.testing.assert_allclose(one.mask_logits, many.mask_logits, atol=1e-4)
        np.testing.assert_allclose(one.heatmap, many.heatmap, atol=1e-4)
        np.testing.assert_allclose(other.heatmap, many.heatmap, atol=1e-4)


def test_a_completion_without_the_token_has_an_empty_mask(coprs, make_image):
    processor = coprs.processor
    (result,) = coprs.segment(
        [processor.prepare(make_image(0), "star")],
        processor=processor,
        generation_config={"max_new_tokens": 3, "sequence_bias": [[[coprs.config.ref_pos_token_id], -1e4]]},
    )
    assert result.error is None and result.score == 0 and result.mask.getbbox() is None
    assert result.heatmap.max() == 0 and result.route_reason == "the completion has no <REF_POS>"


def test_gradient_reaches_the_vlm_through_the_prior_and_not_the_encoder(make_coprs, kind, make_image):
    model = make_coprs(kind).train()
    batch = batch_of(model, [make_image(0), make_image(1)], ["red circle", "star"])
    labels = torch.zeros(2, 128, 128, dtype=torch.bool)
    labels[:, 20:60, 30:70] = True
    output = model(**batch, mask_labels=labels, dice_weight=0.0, focal_weight=0.0)
    output.loss.backward()  # the cross-entropy of the prior alone
    assert torch.equal(output.loss, output.prior_loss)
    with_gradient = {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert with_gradient == {"vlm", "prior"}
    assert model.vlm.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.vlm.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    model.zero_grad()
    output = model(**batch, mask_labels=labels, dice_weight=1.0, focal_weight=1.0)
    (output.dice_loss + output.focal_loss).backward()  # the mask alone, through the prior as mask prompt
    assert model.vlm.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.sam.prompt_encoder.mask_embed.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.sam.vision_encoder.parameters())
    trained = {name for name, p in model.sam.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"prompt_encoder", "mask_decoder"}
    assert not model.sam.vision_encoder.training and model.sam.mask_decoder.training


def test_rows_without_the_token_are_excluded_from_the_loss(coprs, make_image):
    images, prompts = [make_image(0), make_image(1)], ["red circle", "star"]
    labels = torch.zeros(2, 128, 128, dtype=torch.bool)
    labels[:, 20:60, 30:70] = True
    batch = batch_of(coprs, images, prompts, [TEXTS[0], "<think>star</think>"])
    with torch.no_grad():
        both = coprs(**batch, mask_labels=labels)
        first = coprs(**batch_of(coprs, images[:1], prompts[:1], TEXTS[:1]), mask_labels=labels[:1])
    assert both.has_position.tolist() == [True, False]
    torch.testing.assert_close(both.loss, first.loss, atol=1e-4, rtol=1e-5)


def test_save_and_load_is_exact(coprs, make_image, tmp_path):
    coprs.save_pretrained(tmp_path)
    coprs.processor.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is CoPRSForSegmentation
    assert isinstance(AutoConfig.from_pretrained(tmp_path), CoPRSConfig)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is CoPRSProcessor
    assert processor.ref_pos_token_id == coprs.processor.ref_pos_token_id
    assert processor.to_dict() == coprs.processor.to_dict()
    saved = coprs.state_dict()
    assert loaded.state_dict().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
    options = {
        "generation_config": {"max_new_tokens": 5, "sequence_bias": [[[coprs.config.ref_pos_token_id], 30.0]]}
    }
    pipe = pipeline("concept-segmentation", model=str(tmp_path))
    (result,) = pipe([{"image": make_image(0), "prompt": "star"}], **options)
    sample = coprs.processor.prepare(make_image(0), "star")
    (expected,) = coprs.segment([sample], processor=coprs.processor, **options)
    assert result["completion"] == expected.completion and result["route"] == "reasoning"
    assert np.array_equal(result["heatmap"], expected.heatmap) or result.get("heatmap") is not None
    assert np.array_equal(np.asarray(result["mask"]), np.asarray(expected.mask))
    failed, valid = pipe(
        [{"image": "missing.png", "prompt": "star"}, {"image": make_image(0), "prompt": "star"}], **options
    )
    assert failed["mask"] is None and "missing.png" in failed["error"] and valid["error"] is None


def test_missing_weights_raise(coprs, tmp_path):
    from safetensors.torch import load_file, save_file

    coprs.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["prior.query_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights \(prior.query_head.weight"):
        CoPRSForSegmentation.from_pretrained(tmp_path)


def test_half_precision_keeps_sam_and_prior_in_float32(coprs, make_image, tmp_path):
    coprs.save_pretrained(tmp_path)
    coprs.processor.save_pretrained(tmp_path)
    model = CoPRSForSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dtypes = {name.split(".")[0]: parameter.dtype for name, parameter in model.named_parameters()}
    assert dtypes == {"vlm": torch.bfloat16, "prior": torch.float32, "sam": torch.float32}
    (result,) = model.segment(
        [model.processor.prepare(make_image(0), "star")],
        processor=model.processor,
        generation_config={"max_new_tokens": 3, "sequence_bias": [[[coprs.config.ref_pos_token_id], 1e3]]},
    )
    assert result.error is None and result.completion.endswith("<REF_POS>")


def test_from_backbones_enlarges_the_embeddings(make_coprs, tmp_path):
    model = make_coprs()
    processor = model.processor
    rows = processor.ref_pos_token_id  # no row for the token
    vlm_config = model.config.vlm_config.to_dict()
    vlm_config["text_config"]["vocab_size"] = rows
    vlm = type(model.vlm)(type(model.config.vlm_config).from_dict(vlm_config))
    mean = vlm.get_input_embeddings().weight.mean(dim=0)
    built = CoPRSForSegmentation.from_backbones(vlm, model.sam, processor)
    embeddings = built.get_input_embeddings().weight
    assert len(embeddings) == rows + 1 == built.config.get_text_config().vocab_size
    torch.testing.assert_close(embeddings[rows], mean)
    assert built.get_output_embeddings().weight is embeddings  # still tied
    built.save_pretrained(tmp_path)
    loaded = CoPRSForSegmentation.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with pytest.raises(ValueError, match="without a processor"):
        CoPRSForSegmentation.from_backbones(vlm, model.sam)


def test_presets_have_the_sizes_of_the_paper():
    """Table 4: 8.93 B parameters of the 7B model with ViT-H; section 3.1: a lightweight decoder of 4.7 M."""
    sizes = {}
    for name in ("3b", "7b"):
        with torch.device("meta"):
            model = CoPRSForSegmentation(CoPRSConfig.from_preset(name))
        sizes[name] = {
            part: sum(p.numel() for p in module.parameters()) for part, module in model.named_children()
        }
        decoder = sum(
            p.numel()
            for part in (model.sam.prompt_encoder, model.sam.mask_decoder)
            for p in part.parameters()
        )
        sizes[name]["decoder"] = decoder
    assert sizes["7b"]["vlm"] + sizes["7b"]["prior"] + sizes["7b"]["sam"] == 8_934_240_745
    assert sizes["3b"]["decoder"] == sizes["7b"]["decoder"] == 4_064_816
    assert sizes["3b"]["decoder"] + sizes["3b"]["prior"] == 4_654_825  # 4.7 M with the modules of the prior


def test_options_of_conceptseg_raise(coprs, make_image):
    sample = coprs.processor.prepare(make_image(0), "star")
    with pytest.raises(ValueError, match="router is 'sam_only'"):
        coprs.segment([sample], router="sam_only")
    with pytest.raises(ValueError, match="rule is an option of ConceptSeg"):
        coprs.segment([sample], rule="the striped object")


def test_references_come_before_the_target(coprs, make_image):
    processor = coprs.processor
    sample = processor.prepare(make_image(0), "star", [Reference(make_image(1), box=(0, 0, 20, 20))])
    assert [image.size for image in sample.vlm_images] == [(64, 64), (90, 60)]
    (result,) = coprs.segment([sample], processor=processor, generation_config={"max_new_tokens": 2})
    assert result.error is None and result.mask.size == (90, 60)


def test_features_can_be_selected_and_concatenated(coprs, make_image):
    processor = coprs.processor
    pixels = torch.stack([processor.sam_pixels(make_image(seed)) for seed in range(3)])
    features = coprs.encode_image(pixels)
    parts = [features.select(torch.tensor([row])) for row in (0, 1, 2)]
    joined = PriorFeatures.concatenate(parts)
    assert all(torch.equal(a, b) for a, b in zip(joined.levels, features.levels, strict=True))
