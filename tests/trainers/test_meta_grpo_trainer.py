"""Tests for stage II: gradients, inputs of both losses, rewards, resuming, and errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import all_families
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open

from conceptseg_hf import ConceptSegForSegmentation, nano_checkpoint
from conceptseg_hf.vlm_families import get_family

pytest.importorskip("trl", "1.16")
from conceptseg_trainers import MetaGRPOConfig, MetaGRPOTrainer, split_reference_dataset
from conceptseg_trainers.split_reference import find_composer


def rollouts(trainer, index=0):
    """Return a scored group of completions of one prompt, as passed to the loss."""
    trainer.model.train()
    return trainer._generate_and_score_completions([trainer.train_dataset[index] for _ in range(4)])


def segmentation_gradients(trainer) -> set[str]:
    """Return the names of the parameters that get a gradient from L_seg alone."""
    inputs = rollouts(trainer)
    inputs["advantages"].zero_()  # with beta 0, the policy loss is zero
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs).backward()
    return {
        name
        for name, parameter in trainer.concept_model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


# -- gradients --


def test_segmentation_loss_reaches_all_trained_parameters(make_meta_grpo) -> None:
    trainer = make_meta_grpo(beta=0.0)
    reached = segmentation_gradients(trainer)
    model = trainer.concept_model
    ctm = {f"ctm.{name}" for name, _ in model.ctm.named_parameters()}
    tower = {f"vlm.model.visual.{name}" for name, _ in model.vlm.model.visual.named_parameters()}
    layers = {name for name, _ in model.named_parameters() if "language_model.layers" in name}
    assert ctm <= reached and tower <= reached and layers <= reached
    assert not any(
        parameter.requires_grad or parameter.grad is not None for parameter in model.sam.parameters()
    )


def test_detached_segmentation_loss_reaches_only_the_ctm(make_meta_grpo) -> None:
    trainer = make_meta_grpo(beta=0.0, detach_hidden_states=True)
    assert segmentation_gradients(trainer) == {
        f"ctm.{name}" for name, _ in trainer.concept_model.ctm.named_parameters()
    }


@all_families
def test_training_changes_vlm_and_ctm_but_not_sam(make_meta_grpo, weight_hash) -> None:
    trainer = make_meta_grpo(max_steps=3, learning_rate=1e-4)
    before = {name: weight.clone() for name, weight in trainer.concept_model.state_dict().items()}
    sam = weight_hash(trainer.concept_model.sam)
    trainer.train()
    after = trainer.concept_model.state_dict()
    # A bias of the keys shifts all scores of a softmax equally, so that its gradient is zero up to rounding errors.
    unchanged = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert not {name for name in unchanged if "bias" not in name}
    assert not any(name.startswith("sam.") for name in before)
    assert weight_hash(trainer.concept_model.sam) == sam
    assert not trainer.concept_model.sam.training
    log = trainer.state.log_history
    assert log[0]["kl"] == 0.0 and log[1]["kl"] > 0
    for entry in log[:3]:
        assert entry["loss"] == pytest.approx(entry["loss/grpo"] + entry["loss/seg"], abs=1e-4)
        assert entry["loss/seg"] == pytest.approx(entry["loss/dice"] + entry["loss/focal"], abs=1e-4)
        assert entry["rewards/mask/mean"] == pytest.approx(entry["mask_iou"], abs=1e-6)


def test_frozen_vision_tower_does_not_change(make_meta_grpo, weight_hash) -> None:
    trainer = make_meta_grpo(freeze_vision_tower=True, learning_rate=1e-4, max_steps=1)
    tower = weight_hash(trainer.concept_model.vlm.model.visual)
    language = weight_hash(trainer.concept_model.vlm.model.language_model)
    trainer.train()
    assert weight_hash(trainer.concept_model.vlm.model.visual) == tower
    assert weight_hash(trainer.concept_model.vlm.model.language_model) != language


@all_families
def test_adapters_of_the_family_are_trained(make_meta_grpo, vlm_family) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=2, target_modules=get_family(vlm_family).lora_target_modules, modules_to_save=["ctm"]
    )
    trainer = make_meta_grpo(peft_config=config, max_steps=2, learning_rate=1e-2)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])
    }
    assert {name.rsplit("_proj", 1)[0][-1] for name in changed if "lora_B" in name} == set("qkvo")
    assert all("lora_" in name or ".ctm.modules_to_save." in name for name in changed)
    assert any(".ctm." in name for name in changed)


# -- inputs of the losses --


@all_families
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_match_plain_logits(make_meta_grpo, temperature) -> None:
    trainer = make_meta_grpo(temperature=temperature)
    inputs = rollouts(trainer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    names = get_family(trainer.concept_model.config.vlm_config).input_names
    images = {name: inputs[name] for name in names if name not in ("input_ids", "attention_mask")}
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        output = trainer.model(
            input_ids=ids,
            attention_mask=mask,
            labels=ids.masked_fill(mask == 0, -100),
            fused_lm_head=True,
            concept_mask=torch.zeros_like(mask, dtype=torch.bool),
            **images,
        )
        logits = trainer.concept_model.vlm(input_ids=ids, attention_mask=mask, **images).logits
    plain = (logits[:, :-1] / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    kept = inputs["completion_mask"].bool()
    torch.testing.assert_close(
        output.log_probs[:, -length:][kept], plain[:, -length:][kept], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("end_of_turn", [False, True])
def test_loss_and_reward_use_the_same_concepts(make_meta_grpo, monkeypatch, end_of_turn) -> None:
    """The forward pass for the reward, with batches of the processor, gives the Z of the loss."""
    trainer = make_meta_grpo(temperature=2.0)
    monkeypatch.setattr(trainer.concept_model.config, "end_of_turn_state", end_of_turn)
    decoded, num_states = [], []
    encode = trainer.concept_model.encode_concepts
    monkeypatch.setattr(
        trainer.concept_model,
        "encode_concepts",
        lambda hidden, mask: num_states.append(mask.sum(1).tolist()) or encode(hidden, mask),
    )
    decode = trainer._decode
    monkeypatch.setattr(trainer, "_decode", lambda *args: decoded.append(args) or decode(*args))
    inputs = rollouts(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    (rewarded, reward_concepts), (trained, loss_concepts) = decoded
    assert [rollout.sam_text for rollout in rewarded] == [rollout.sam_text for rollout in trained]
    ends = torch.tensor(trainer.eos_token_ids)
    kept = inputs["completion_mask"].bool()
    text_tokens = kept & ~torch.isin(inputs["completion_ids"], ends)
    assert not torch.equal(kept, text_tokens), "some completions have an end-of-turn token"
    expected = (kept if end_of_turn else text_tokens).sum(1).tolist()
    assert len(set(expected)) > 1
    assert sorted(length for lengths in num_states[:-1] for length in lengths) == sorted(expected)
    torch.testing.assert_close(reward_concepts, loss_concepts.detach(), rtol=0, atol=1e-4)


@all_families
def test_rewarded_mask_matches_inference(make_meta_grpo, shapes, monkeypatch) -> None:
    """Greedy rollouts get the concept tokens and masks of `model.segment` with the same maximum length.

    Random models do not end their completions: these rollouts are truncated, and their states come from a second
    forward pass. Rounding changes Z by up to 6e-6 and logits by up to 7e-6, and no pixel of a mask.
    """
    trainer = make_meta_grpo(generation_kwargs={"do_sample": False})
    model = trainer.concept_model
    decoded = []
    decode = model.decode_masks

    def record(features, *prompt):
        decoded.append((prompt[2], decode(features, *prompt)))
        return decoded[-1][1]

    monkeypatch.setattr(model, "decode_masks", record)
    rows = [dict(trainer.train_dataset[0]) for _ in range(4)]
    trainer.model.train()
    trainer._generate_and_score_completions(rows)
    sample = shapes[0]
    references = [replace(reference, role="auto") for reference in _composed(trainer, sample)]
    inputs = trainer.concept_processor(sample.image, sample.prompt, [references])
    limit = {"max_new_tokens": trainer.args.max_completion_length}
    (result,) = model.segment(inputs, router="full_reasoning", generation_config=limit)
    (concepts, (logits, _)), (expected_concepts, (expected_logits, _)) = decoded
    assert expected_concepts.abs().max() > 0.5
    torch.testing.assert_close(concepts, expected_concepts.expand(4, -1, -1), rtol=0, atol=5e-5)
    torch.testing.assert_close(logits, expected_logits.expand(4, -1, -1, -1), rtol=0, atol=1e-4)
    for row in rows:
        assert ((np.asarray(result.mask) > 0) != row["predicted_mask"]).sum() <= 2


def _composed(trainer, sample):
    from conceptseg_trainers.split_reference import compose_references

    composer = find_composer(trainer.train_dataset)
    return compose_references(sample.references, 2, [composer.seed, composer.epoch], sample.sample_id)


def test_sam_encodes_the_image_of_a_prompt_once(make_meta_grpo, monkeypatch) -> None:
    trainer = make_meta_grpo(per_device_train_batch_size=8, max_steps=1)
    encoded = []
    encode = trainer.concept_model.encode_image
    monkeypatch.setattr(
        trainer.concept_model, "encode_image", lambda pixels: encoded.append(len(pixels)) or encode(pixels)
    )
    trainer.train()
    assert encoded == [2]  # 8 completions of 2 prompts


def test_samples_with_the_same_id_are_distinguished(make_meta_grpo, shapes) -> None:
    twins = [replace(sample, sample_id="same") for sample in shapes[:2]]
    trainer = make_meta_grpo(train_dataset=split_reference_dataset(twins))
    rows = [trainer.train_dataset[index] for index in (0, 0, 1)]
    prompts = trainer._encode_prompts(rows)
    assert [prompt.target.tobytes() for prompt in prompts.values()] == [
        sample.image.tobytes() for sample in twins
    ]


def test_chunk_size_does_not_change_the_loss(make_meta_grpo) -> None:
    losses = []
    for size in (8, 3):
        trainer = make_meta_grpo(sam_decode_batch_size=size, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss/seg"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_masked_truncated_completions_do_not_train_the_ctm(make_meta_grpo, weight_hash) -> None:
    trainer = make_meta_grpo(
        max_completion_length=8, mask_truncated_completions=True, learning_rate=1e-2, beta=0.0
    )
    before = weight_hash(trainer.concept_model.ctm)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["completions/clipped_ratio"] == 1.0
    assert log["loss/seg"] == 0.0 and log["rewards/format/mean"] == 0.0
    assert weight_hash(trainer.concept_model.ctm) == before


# -- rollouts --


@all_families
def test_image_tokens_are_never_sampled(make_meta_grpo) -> None:
    trainer = make_meta_grpo(generation_kwargs={"suppress_tokens": [17]}, max_completion_length=8)
    config = trainer.concept_model.config.vlm_config
    tokens = {*get_family(config).vision_token_ids(config), 17}
    assert set(trainer.generation_config.suppress_tokens) == tokens

    def favor(module, inputs, logits):
        logits[..., sorted(tokens)] += 1000
        return logits

    handle = trainer.concept_model.vlm.lm_head.register_forward_hook(favor)
    completions = rollouts(trainer)["completion_ids"]
    handle.remove()
    assert tokens.isdisjoint(completions.flatten().tolist())


def test_custom_rewards_get_the_columns(make_meta_grpo) -> None:
    from conceptseg_trainers import format_reward, mask_reward

    seen = []

    def area(completions, predicted_mask, gt_mask, problem, **columns):
        seen.append([mask.shape for mask in predicted_mask])
        return [float(mask.mean()) for mask in predicted_mask]

    trainer = make_meta_grpo(
        reward_funcs=[format_reward, mask_reward, area], reward_weights=[1.0, 1.0, 0.0], max_steps=1
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert seen == [[(128, 128)] * 4]
    assert log["reward"] == pytest.approx(log["rewards/format/mean"] + log["rewards/mask/mean"], abs=1e-5)
    assert 0 <= log["rewards/area/mean"] <= 1


def test_references_are_recomposed_in_each_epoch(make_meta_grpo, shapes) -> None:
    trainer = make_meta_grpo(
        train_dataset=split_reference_dataset(shapes[:1]), num_train_epochs=2, max_steps=-1, log_examples=1
    )
    mosaics = []
    score = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (
        mosaics.append({row["images"][0].tobytes() for row in inputs}) or score(inputs)
    )
    trainer.train()
    assert [len(group) for group in mosaics] == [1, 1]  # all copies of a prompt have the same mosaic
    assert mosaics[0] != mosaics[1]


def test_evaluation_metrics_and_example_images(make_meta_grpo, shapes, tmp_path) -> None:
    trainer = make_meta_grpo(
        eval_dataset=split_reference_dataset(shapes[4:6]), log_examples=2, log_examples_steps=1, max_steps=1
    )
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_loss/seg", "eval_rewards/mask/mean", "eval_mask_iou"} <= set(metrics) | set(
        trainer.state.log_history[-1]
    )
    trainer.train()
    images = sorted(path.name for path in (tmp_path / "run" / "examples").iterdir())
    assert "step_000001_0.png" in images


def test_completions_table_contains_answers_and_mask_ious(make_meta_grpo, tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    trainer = make_meta_grpo(log_completions=True, max_steps=1)
    trainer.train()
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert len(table) == 4
    for _, row in table.iterrows():
        assert f"<answer>{row['answer']}</answer>" in row["completion"][0]["content"].replace(" ", "")
        assert row["mask_iou"] == pytest.approx(row["mask"], abs=1e-6)


# -- the reference policy --


def test_reference_policy_can_be_passed(make_meta_grpo, weight_hash) -> None:
    other = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    with torch.no_grad():
        for parameter in other.vlm.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    trainer = make_meta_grpo(ref_model=other, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["kl"] > 0
    assert weight_hash(trainer.ref_model) == weight_hash(other.vlm)
    assert not any(parameter.requires_grad for parameter in trainer.ref_model.parameters())


# -- a model given by name --


def test_checkpoint_is_loaded_with_model_init_kwargs(make_meta_grpo, caplog) -> None:
    options = {"attn_implementation": "eager", "dtype": "bfloat16", "revision": "main"}
    trainer = make_meta_grpo(
        model=str(nano_checkpoint()),
        ref_model_name_or_path=str(nano_checkpoint()),
        model_init_kwargs=dict(options),
    )
    for vlm in (trainer.concept_model.vlm, trainer.ref_model):
        assert vlm.dtype == torch.bfloat16
        assert vlm.config.get_text_config()._attn_implementation == "eager"
    assert trainer.concept_model.sam.dtype == torch.float32
    assert trainer.args.model_init_kwargs == options and "will be ignored" not in caplog.text


def test_checkpoint_is_loaded_with_its_processor(shapes, tmp_path) -> None:
    args = MetaGRPOConfig(
        str(tmp_path / "run"), num_generations=4, per_device_train_batch_size=4, bf16=False, use_cpu=True
    )
    trainer = MetaGRPOTrainer(nano_checkpoint(), args=args, train_dataset=split_reference_dataset(shapes[:4]))
    assert trainer.concept_processor.canvas_size == 128
    assert trainer.concept_model.vlm.dtype == torch.float32  # the checkpoint's


def test_quantization_applies_to_the_vlm_only(make_meta_grpo) -> None:
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    options = {"model": str(nano_checkpoint()), "peft_config": LoraConfig(**LORA)}
    trainer = make_meta_grpo(quantization_config=four_bits, **options)
    kinds = {p.dtype for name, p in trainer.concept_model.named_parameters() if "base_layer" in name}
    assert torch.uint8 in kinds and trainer.concept_model.sam.dtype == torch.float32
    with pytest.raises(
        ValueError, match="quantization_config is passed as an argument and in model_init_kwargs"
    ):
        make_meta_grpo(
            quantization_config=four_bits, model_init_kwargs={"quantization_config": four_bits}, **options
        )


# -- saving and resuming --


def test_model_card_is_ours_and_names_the_license(make_meta_grpo, tmp_path, monkeypatch) -> None:
    """TRL writes a card at every checkpoint, which would not mention the license of SAM 3."""
    monkeypatch.setattr("conceptseg_hf.cards._holds_released_sam", lambda *_: True)
    trainer = make_meta_grpo(max_steps=1, save_strategy="steps", save_steps=1)
    path = tmp_path / "run" / "README.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("# Model Card\n\nIt has been trained using [TRL](https://github.com/huggingface/trl).")
    trainer.train()  # with an existing card of another run
    trained = path.read_text()
    trainer.save_model()
    assert path.read_text() == trained
    card = ModelCard.load(path)
    assert (card.data.license, card.data.license_name) == ("other", "sam-license")
    assert {"trl", "grpo", "meta-grpo"} <= set(card.data.tags) and "Meta-GRPO" in card.text
    assert "fine-tuned version of" not in card.text and str(nano_checkpoint()) not in card.content
    trainer.create_model_card("run", dataset_name="me/data", tags="mine")  # as `push_to_hub` does
    assert "mine" in ModelCard.load(path).data.tags
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert ModelCard.load(tmp_path / "elsewhere" / "README.md").data.license == "other"


def test_run_saves_a_complete_model(make_meta_grpo, tmp_path, weight_hash) -> None:
    trainer = make_meta_grpo(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "whole"))
    whole = ConceptSegForSegmentation.from_pretrained(tmp_path / "whole")
    assert weight_hash(whole.sam) == weight_hash(trainer.concept_model.sam)
    assert weight_hash(whole.vlm) == weight_hash(trainer.concept_model.vlm)
    assert weight_hash(whole.ctm) == weight_hash(trainer.concept_model.ctm)

    checkpoint = tmp_path / "run" / "checkpoint-1"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"vlm", "ctm"}  # noqa: SIM118
    with pytest.raises(ValueError, match="SAM 3 weights"):  # the nano model has no other source for them
        ConceptSegForSegmentation.from_pretrained(checkpoint)


LORA = {
    "target_modules": r"vlm\.model\.language_model\..*\.(q_proj|v_proj)",
    "modules_to_save": ["ctm"],
    "r": 4,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "accumulated", "lora"])
def test_resumed_run_ends_with_the_same_weights(make_meta_grpo, kind, weight_hash) -> None:
    def make(folder):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-4}
        if kind == "accumulated":
            settings |= {"gradient_accumulation_steps": 2}
        if kind == "lora":
            from peft import LoraConfig

            settings |= {"peft_config": LoraConfig(**LORA)}
        return make_meta_grpo(folder, **settings)

    whole, stopped = make("whole"), make("resumed")
    start = weight_hash(whole.model)
    whole.train()
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    stopped.train(resume_from_checkpoint=str(checkpoint))
    assert weight_hash(stopped.model) == weight_hash(whole.model) != start
    assert stopped.state.log_history[-2]["kl"] == whole.state.log_history[-2]["kl"] > 0
    if kind == "lora":
        trained = {name for name, p in whole.model.named_parameters() if p.requires_grad}
        assert all("lora_" in name or "modules_to_save" in name for name in trained)
        assert whole.ref_model is None


def test_warns_of_checkpoints_inside_a_generation_batch(make_meta_grpo, caplog) -> None:
    settings = {"save_strategy": "steps", "steps_per_generation": 2}
    make_meta_grpo(save_steps=4, **settings)
    assert "make save_steps * gradient_accumulation_steps a multiple of 2" not in caplog.text
    make_meta_grpo(save_steps=5, **settings)
    assert "make save_steps * gradient_accumulation_steps a multiple of 2" in caplog.text


@pytest.mark.parametrize(
    "settings", [{"bf16": True}, {"gradient_checkpointing": True}, {"num_iterations": 2}]
)
def test_other_training_settings(make_meta_grpo, settings) -> None:
    trainer = make_meta_grpo(**settings)
    trainer.train()
    log = trainer.state.log_history
    assert log[0]["loss"] == pytest.approx(log[0]["loss/grpo"] + log[0]["loss/seg"], abs=1e-4)
    assert 0 < log[0]["loss/seg"] < 2 and log[0]["grad_norm"] > 0


def test_vllm_engine_gets_the_weights_of_the_vlm(make_meta_grpo, monkeypatch) -> None:
    """The engine itself runs in tests/with_vllm."""
    from conceptseg_trainers.vllm import ConceptVLLMGeneration
    from trl.generation import vllm_generation

    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", lambda self: None)
    trainer = make_meta_grpo(use_vllm=True, vllm_vlm_name_or_path="an/vlm")
    assert trainer.use_vllm and trainer.args.use_vllm
    assert isinstance(trainer.vllm_generation, ConceptVLLMGeneration)
    names = {name for name, _ in trainer.vllm_generation._iter_named_params()}
    assert names == {name for name, _ in trainer.concept_model.vlm.named_parameters()}
    biases = trainer.vllm_generation.generation_kwargs["logit_bias"]
    assert set(biases) == set(
        trainer.concept_processor.family.vision_token_ids(trainer.concept_model.config.vlm_config)
    )


# -- bad input --


def row_without(column):
    return lambda dataset: _eager([{k: v for k, v in dataset[0].items() if k != column}])


def row_with(**values):
    return lambda dataset: _eager([{**dataset[0], **values}])


def _eager(rows):
    import datasets

    return datasets.Dataset.from_list(rows)


BAD_DATA = {
    "no mask": (row_without("gt_mask"), r"train_dataset lacks the column gt_mask; "),
    "no id": (row_without("sample_id"), r"train_dataset lacks the column sample_id; "),
    "mask of another size": (
        row_with(gt_mask=Image.new("L", (32, 16))),
        r"sample 'train-000000': gt_mask: mask has 32 x 16 pixels, but its image has 128 x 128",
    ),
    "no mask in a row": (
        row_with(gt_mask=None),
        r"sample 'train-000000': gt_mask is None; ",
    ),
    "shared ids": (
        lambda dataset: _eager([dataset[0], dataset[0]]),
        r"train_dataset has rows with the same sample_id; ",
    ),
    "a list": (
        lambda dataset: [dataset[0]],
        r"a dataset is a list; pass the result of split_reference_dataset",
    ),
    "no rows": (lambda dataset: dataset.select([]), r"a dataset has no rows"),
}


@pytest.mark.parametrize(("spoil", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_refused_before_training(make_meta_grpo, shapes, nano_processor, spoil, message) -> None:
    dataset = split_reference_dataset(shapes[:1], processor=nano_processor)
    with pytest.raises(ValueError, match=message):
        make_meta_grpo(train_dataset=spoil(dataset))


def test_mask_of_another_size_is_found_in_a_lazy_dataset(make_meta_grpo, shapes) -> None:
    wrong = [*shapes[:3], replace(shapes[3], mask=Image.new("L", (10, 10)))]
    with pytest.raises(ValueError, match=r"sample 'train-000003': its mask has 10 x 10 pixels"):
        make_meta_grpo(train_dataset=split_reference_dataset(wrong))


def test_several_gpus_in_one_process_are_refused(nano_processor, shapes, tmp_path) -> None:
    args = MetaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    args._n_gpu = 2
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        MetaGRPOTrainer(
            nano_checkpoint(),
            args=args,
            train_dataset=split_reference_dataset(shapes),
            processing_class=nano_processor,
        )


def test_pixels_to_ignore_change_neither_reward_nor_loss(make_meta_grpo, shapes) -> None:
    """The ground truth at ignored pixels has no effect."""
    left = Image.new("L", shapes[0].image.size)
    left.paste(255, (0, 0, 64, 128))
    other = shapes[0].mask.copy()
    other.paste(255, (0, 0, 64, 128))
    logs = []
    for mask, ignore in ((shapes[0].mask, left), (other, left), (other, None)):
        samples = [replace(shapes[0], mask=mask, ignore=ignore)]
        trainer = make_meta_grpo(train_dataset=split_reference_dataset(samples), max_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        logs.append([log[name] for name in ("rewards/mask/mean", "loss/seg", "mask_iou")])
    assert logs[0] == logs[1]
    assert logs[0] != logs[2]


def test_training_on_an_eager_dataset(make_meta_grpo, shapes, nano_processor) -> None:
    rows = [dict(row) for row in split_reference_dataset(shapes[:2], processor=nano_processor)]
    trainer = make_meta_grpo(train_dataset=_eager(rows), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["mask_iou"] > 0


def test_long_prompts_are_refused(make_meta_grpo) -> None:
    with pytest.raises(ValueError, match=r"has a prompt of \d+ tokens, more than max_prompt_length = 100"):
        make_meta_grpo(max_prompt_length=100)


BAD_SETTINGS = {
    "groups": (
        {"num_generations": 3, "per_device_train_batch_size": 4},
        r"a generation batch of 4 completions .* does not consist of whole groups of num_generations = 3",
    ),
    "reward": (
        {"rewards": ["format", "style"]},
        r"rewards is \[.*\]; use one or more of format, mask, meta, box",
    ),
    "proxy": ({"meta_without_proxy": "zero"}, r"meta_without_proxy is 'zero'; use one of none, box, square"),
    "weight": ({"seg_loss_weight": -1.0}, r"seg_loss_weight is -1.0; use 0 or more"),
    "batch": ({"sam_decode_batch_size": 0}, r"sam_decode_batch_size is 0; use at least 1"),
    "sync": (
        {"sync_ref_model": True},
        r"sync_ref_model is true, but the reference policy is fixed",
    ),
    "columns": (
        {"remove_unused_columns": True},
        r"remove_unused_columns is true, but SAM and the rewards need",
    ),
    "workers": (
        {"dataloader_persistent_workers": True},
        r"dataloader_persistent_workers is true, but persistent workers",
    ),
    "vllm": ({"use_vllm": True}, r"use_vllm is true without vllm_vlm_name_or_path"),
    "meta reward without meta reasoning": ({"meta_reasoning": False}, r"rewards contains 'meta'"),
}


def test_format_reward_without_meta_reasoning(make_meta_grpo) -> None:
    trainer = make_meta_grpo(meta_reasoning=False, rewards=["format", "mask", "box"])
    assert trainer.reward_func_names == ["format", "mask", "box"]
    text = "<think>a</think><bbox>[0,0,5,5]</bbox><answer>star</answer>"
    assert trainer.reward_funcs[0]([text], gt_check_box=[[0, 0, 4, 4]]) == [1.0]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS.values(), ids=BAD_SETTINGS.keys())
def test_bad_settings_are_refused(tmp_path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        MetaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_wrong_objects_are_refused(make_meta_grpo, model, tmp_path) -> None:
    with pytest.raises(ValueError, match="model is a Qwen2_5_VLForConditionalGeneration; "):
        make_meta_grpo(model=model.vlm)
    with pytest.raises(ValueError, match="processing_class is not the model's ConceptSegProcessor"):
        MetaGRPOTrainer(model, args=MetaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False))


def test_defaults_match_table_7(tmp_path) -> None:
    args = MetaGRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    assert (args.num_train_epochs, args.learning_rate, args.lr_scheduler_type) == (2, 1e-6, "linear")
    assert (args.num_generations, args.beta, args.seed) == (8, 0.04, 42)
    assert (args.max_prompt_length, args.max_completion_length) == (2048, 768)
    assert 8 * args.per_device_train_batch_size == 64
    assert args.seg_loss_weight == args.dice_weight == args.focal_weight == 1.0
    assert args.loss_type == "grpo" and not args.detach_hidden_states


@pytest.mark.filterwarnings("error:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("enabled", [False, True])
def test_no_deprecation_warnings_for_gradient_checkpointing(make_meta_grpo, shapes, enabled) -> None:
    from conceptseg_trainers import split_reference_dataset

    evaluation = split_reference_dataset(shapes[:4])
    trainer = make_meta_grpo(max_steps=1, gradient_checkpointing=enabled, eval_dataset=evaluation)
    trainer.train()
    trainer.evaluate()
    assert trainer.concept_model.is_activation_checkpointing is enabled


def test_trains_only_on_the_best_and_worst(make_meta_grpo, monkeypatch) -> None:
    trainer = make_meta_grpo(num_best_and_worst=1, per_device_train_batch_size=8, max_steps=1)
    advantages, kept, trained = [], [], []
    finish_rollouts, compute_loss = trainer.finish_rollouts, trainer._compute_loss

    def record_kept(output):
        advantages.extend(output["advantages"].tolist())
        output = finish_rollouts(output)
        kept.extend(output["advantages"].tolist())
        return output

    def record_trained(model, inputs):
        trained.extend(inputs["advantages"].tolist())
        assert len({id(rollout.prompt) for rollout in inputs["rollouts"]}) == 2
        assert inputs["num_items_in_batch"] == inputs["completion_mask"].sum()
        return compute_loss(model, inputs)

    monkeypatch.setattr(trainer, "finish_rollouts", record_kept)
    monkeypatch.setattr(trainer, "_compute_loss", record_trained)
    trainer.train()
    assert len(advantages) == 8 and max(advantages) > 0
    for group in (0, 1):
        group_advantages = advantages[4 * group : 4 * group + 4]
        assert sorted(kept[2 * group : 2 * group + 2]) == [min(group_advantages), max(group_advantages)]
    assert sorted(trained) == sorted(kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_best_and_worst": 3}, "num_best_and_worst is 3; use 1 to 2"),
        (
            {"num_best_and_worst": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
            "make per_device_train_batch_size a multiple of num_generations",
        ),
    ],
)
def test_invalid_num_best_and_worst_is_refused(make_meta_grpo, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_meta_grpo(**settings)
