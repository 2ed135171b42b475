"""Tests for CoPRSTrainer: rewards, loss, schedule, learning rates, gradients and resuming, on a small random model."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from PIL import Image

from conceptseg_hf import CoPRSForSegmentation
from conceptseg_hf.coprs.completion import format_score, parse_reasoning

pytest.importorskip("trl", "1.16")
from conceptseg_trainers import (
    CoPRSTrainer,
    CoPRSTrainerConfig,
    position_format_reward,
    soft_mask_reward,
    split_reference_dataset,
)
from conceptseg_trainers.scripts.coprs import TRAINED_IN_FULL
from group_settings import GROUP_SETTINGS
from random_coprs import build_random_coprs

VALID = "<think>the red one</think><REF_POS>"


@pytest.fixture
def make_coprs_trainer(shapes, tmp_path):
    """Return a function that creates a trainer with groups of 4, which sample the token more often than by chance."""

    def make(folder: str = "run", kind: str = "sam", **settings) -> CoPRSTrainer:
        model = settings.pop("model", None) or build_random_coprs(kind)
        peft_config = settings.pop("peft_config", None)
        settings = {
            **GROUP_SETTINGS,
            "max_completion_length": 6,
            "generation_kwargs": {"sequence_bias": [[[model.config.ref_pos_token_id], 20.0]]},
            **settings,
        }
        return CoPRSTrainer(
            model,
            args=CoPRSTrainerConfig(str(tmp_path / folder), **settings),
            train_dataset=split_reference_dataset([s for s in shapes if not s.references][:4]),
            processing_class=model.processor,
            peft_config=peft_config,
        )

    return make


# -- rewards --


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("no template", 0.0),
        ("<think>a</think>", 0.0),
        ("<REF_POS>", 0.0),
        ("<REF_POS><think>a</think>", 0.0),
        ("<think>a</think> here <REF_POS>", 0.0),
        ("<think>a</think><REF_POS><REF_POS>", 0.0),
        ("<think>a<think>b</think><REF_POS>", 0.0),
        (VALID, 1.0),
        (" <think>a</think>\n<REF_POS> \n", 1.0),
        (f"<think>{'a' * 2048}</think><REF_POS>", 1.0),
        (f"<think>{'a' * 2049}</think><REF_POS>", 0.9),
        (f"Sure: {VALID}", 0.9),
        (f"{VALID} done", 0.9),
        (f"Sure: {VALID} done", 0.9),
    ],
)
def test_format_reward(text, score) -> None:
    assert position_format_reward([text]) == [score]
    assert position_format_reward([[{"role": "assistant", "content": text}]]) == [score]


def test_hostile_completions_never_raise() -> None:
    rng = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<REF_POS>",
        "<",
        ">",
        "\x00",
        "\ud800",
        "é" * 50,
        " ",
        "\n",
        "<think" * 9,
        "[1,2",
    ]
    texts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(10_000)]
    scores = position_format_reward(texts)
    assert set(scores) <= {0.0, 0.9, 1.0} and 0 < sum(scores) < 10_000
    assert all(
        (parse_reasoning(text).is_valid) == (score > 0) for text, score in zip(texts, scores, strict=True)
    )
    assert format_score(None) == 0.0


def test_mask_reward_is_the_weighted_sum() -> None:
    truth = np.zeros((4, 4), dtype=bool)
    truth[:2] = True  # 8 pixels
    probability = np.where(truth, 0.8, 0.1).astype(np.float64)
    probability[0, 0] = 0.4  # missed by the hard mask
    overlap, total = 0.8 * 7 + 0.4, 0.8 * 7 + 0.4 + 0.1 * 8 + 8
    expected = 0.5 * overlap / (total - overlap) + 0.2 * 2 * overlap / total + 0.3 * 7 / 8
    image = Image.fromarray(truth.astype(np.uint8) * 255)
    (reward,) = soft_mask_reward([VALID], [probability], [image])
    assert reward == pytest.approx(expected, abs=1e-12)
    empty = Image.new("L", (4, 4))
    rewards = soft_mask_reward([VALID] * 3, [truth * 1.0, truth * 0.0, truth * 0.0], [image, image, empty])
    assert rewards == [1.0, 0.0, 1.0]
    ignore = Image.fromarray((np.arange(16).reshape(4, 4) == 0).astype(np.uint8) * 255)
    (ignored,) = soft_mask_reward([VALID], [probability], [image], [ignore])
    overlap, total = 0.8 * 7, 0.8 * 7 + 0.1 * 8 + 7
    assert ignored == pytest.approx(0.5 * overlap / (total - overlap) + 0.4 * overlap / total + 0.3)
    with pytest.raises(ValueError, match="predicted_probability or gt_mask is missing"):
        soft_mask_reward([VALID])


# -- settings --


def test_defaults_are_those_of_the_paper(tmp_path) -> None:
    args = CoPRSTrainerConfig(str(tmp_path), bf16=False, use_cpu=True)
    assert (args.num_generations, args.epsilon, args.beta, args.learning_rate) == (8, 0.2, 0.2, 1.6e-6)
    assert (args.weight_decay, args.max_grad_norm, args.max_steps, args.warmup_steps) == (
        0.01,
        1.0,
        31_250,
        0,
    )
    assert (args.adam_beta1, args.adam_beta2, args.temperature, args.top_p) == (0.9, 0.999, 1.0, 1.0)
    assert (args.max_prompt_length, args.max_completion_length, args.loss_type) == (1300, 2000, "grpo")
    assert (args.rewards, args.reward_weights, args.seg_loss_weight) == (["mask", "format"], [0.7, 0.3], 0.3)
    assert (args.prior_rate, args.prompt_encoder_rate, args.mask_decoder_rate) == (25, 10, 5)
    assert args.lr_scheduler_kwargs["min_lr_rate"] == pytest.approx(1 / 6.7)
    with pytest.raises(ValueError, match="beta is 0"):
        CoPRSTrainerConfig(str(tmp_path), bf16=False, use_cpu=True, beta=0.0)


# -- training --


@pytest.mark.parametrize("kind", ["sam", "sam3_tracker"])
def test_a_step_changes_all_parts_but_the_encoder(make_coprs_trainer, weight_hash, kind) -> None:
    trainer = make_coprs_trainer(kind=kind, learning_rate=1e-4, switch_step=1)
    model = trainer.concept_model
    encoder = model.sam.vision_encoder
    frozen = weight_hash(encoder)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert not any("vision_encoder" in name for name in before)
    trainer.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unchanged = {name for name in trained if torch.equal(before[name], model.state_dict()[name])}
    assert not {name for name in unchanged if "k_proj.bias" not in name}
    assert {name.split(".")[0] for name in trained} == {"vlm", "prior", "sam"}
    assert weight_hash(encoder) == frozen and not encoder.training
    logs = trainer.state.log_history[:2]
    for log, (dice_weight, focal_weight) in zip(logs, [(1.5, 0.0), (3.0, 10.0)], strict=True):
        seg = log["loss/prior"] + dice_weight * log["loss/dice"] + focal_weight * log["loss/focal"]
        assert log["loss/seg"] == pytest.approx(seg, abs=1e-4)
        assert log["loss"] == pytest.approx(log["loss/grpo"] + 0.3 * log["loss/seg"], abs=1e-4)
        reward = 0.7 * log["rewards/mask/mean"] + 0.3 * log["rewards/format/mean"]
        assert log["reward"] == pytest.approx(reward, abs=1e-6)
        assert log["loss/dice"] > 0.1  # completions with the token have a mask
    # Groups: the learning rates of the schedule at the last step, in the ratio of the multipliers.
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            part = names[id(parameter)].split(".")
            rates.setdefault(".".join(part[: 2 if part[0] == "sam" else 1]), set()).add(group["lr"])
    base = rates["vlm"].pop()
    assert base == pytest.approx(1e-4 / 6.7)  # the schedule ends at the peak divided by 6.7
    assert {part: values.pop() / base for part, values in rates.items() if values} == pytest.approx(
        {"prior": 25, "sam.prompt_encoder": 10, "sam.mask_decoder": 5}
    )
    trainer.save_model(trainer.args.output_dir)
    loaded = CoPRSForSegmentation.from_pretrained(trainer.args.output_dir)
    assert weight_hash(loaded.sam.vision_encoder) == frozen
    assert torch.equal(loaded.prior.query_head.weight, model.prior.query_head.weight)


def test_segmentation_loss_equals_the_formula_and_reaches_the_vlm(make_coprs_trainer) -> None:
    trainer = make_coprs_trainer(beta=0.0, reward_masks="policy")
    trainer.model.train()
    row = trainer.train_dataset[0]
    inputs = trainer._generate_and_score_completions([row] * 4)
    inputs["advantages"].zero_()  # with beta 0, the policy loss is zero
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    model, processor = trainer.concept_model, trainer.concept_processor
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    features = torch.cat([rollout.prompt.features.keys for rollout in inputs["rollouts"]])
    truth = np.asarray(row["gt_mask"]) > 0
    target = torch.from_numpy(truth).float()  # images of 128 pixels are not padded
    with torch.no_grad():
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw", "mm_token_type_ids")}
        hidden = model.vlm.base_model(input_ids=ids, attention_mask=mask, **images).last_hidden_state
        terms = []
        for index in range(4):
            columns = [
                c
                for c in range(len(ids[index]) - length, len(ids[index]))
                if ids[index, c] == processor.ref_pos_token_id
            ]
            if not columns or not mask[index, columns[0]]:
                continue
            state = hidden[index, columns[0]]
            prior = torch.nn.functional.interpolate(
                model.prior(state[None], features[index : index + 1]), size=(64, 64), mode="bilinear"
            )
            logits = model.sam(
                image_embeddings=features[index : index + 1], input_masks=prior, multimask_output=False
            ).pred_masks[:, 0]
            fraction = target.reshape(64, 2, 64, 2).mean(dim=(1, 3))
            bce = torch.nn.functional.binary_cross_entropy_with_logits(prior[0, 0], fraction)
            full = torch.nn.functional.interpolate(logits, size=(128, 128), mode="bilinear")[0, 0]
            p = full.sigmoid()
            dice = 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
            terms.append(bce + 1.5 * dice)
    assert len(terms) >= 2
    assert loss.item() == pytest.approx(0.3 * torch.stack(terms).mean().item(), abs=1e-4)
    assert model.vlm.model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.sam.vision_encoder.parameters())


LORA = {
    "target_modules": r"vlm\.model\.language_model\..*\.(q_proj|v_proj)",
    "modules_to_save": list(TRAINED_IN_FULL),
    "r": 4,
}


def test_adapters_prior_and_decoder_are_trained(make_coprs_trainer, weight_hash, tmp_path) -> None:
    from peft import LoraConfig, PeftModel

    model = build_random_coprs("sam")
    base = copy.deepcopy(model)
    trainer = make_coprs_trainer(model=model, peft_config=LoraConfig(**LORA), learning_rate=1e-3)
    assert trainer.ref_model is None  # the reference policy is the VLM without adapters
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    assert not any("vision_encoder" in name for name in before)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all("lora_" in name or ".modules_to_save." in name for name in changed)
    for part in ("lora_B", ".prior.", ".mask_embed.", ".mask_decoder."):
        assert any(part in name for name in changed), part
    log = trainer.state.log_history
    assert log[0]["kl"] == 0.0 and log[1]["kl"] > 0
    assert log[0]["loss/dice"] > 0.1 and log[0]["rewards/mask/mean"] > 0
    # The learning rates of the prior and the decoder are multiples here, too.
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    rates = {
        part: group["lr"]
        for group in trainer.optimizer.param_groups
        for value in group["params"]
        for part in ("lora_", ".prior.", ".mask_embed.", ".mask_decoder.")
        if part in names[id(value)]
    }
    ratios = [rates[part] / rates["lora_"] for part in (".prior.", ".mask_embed.", ".mask_decoder.")]
    assert ratios == pytest.approx([25, 10, 5])

    trainer.save_model(str(tmp_path / "adapters"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapters")
    assert weight_hash(loaded.get_base_model().prior.modules_to_save["default"]) == weight_hash(
        trainer.concept_model.prior.modules_to_save["default"]
    )
    merged = loaded.merge_and_unload()
    expected = trainer.concept_model
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8))
    prepared = [merged.processor.prepare(image, "star")]
    options = {"generation_config": {"max_new_tokens": 4, **trainer.generation_kwargs}}
    one, other = (
        each.segment(prepared, processor=merged.processor, **options)[0] for each in (merged, expected)
    )
    assert one.completion == other.completion
    np.testing.assert_allclose(one.heatmap, other.heatmap, atol=1e-4)


def test_the_reference_of_adapters_decodes_with_the_initial_modules(make_coprs_trainer) -> None:
    from peft import LoraConfig

    trainer = make_coprs_trainer(peft_config=LoraConfig(**LORA), max_steps=1)
    trainer.model.train()
    row, probabilities = trainer.train_dataset[0], []
    for _ in range(2):
        torch.manual_seed(0)
        rows = [dict(row) for _ in range(4)]
        trainer._generate_and_score_completions(rows)
        probabilities.append([item["predicted_probability"] for item in rows])
        with torch.no_grad():
            trainer.concept_model.prior.modules_to_save["default"].fusion[2].bias += 3
    assert max(np.abs(a - b).max() for a, b in zip(*probabilities, strict=True)) == 0
    assert max(values.max() for values in probabilities[0]) > 0


@pytest.mark.parametrize("kind", ["plain", "lora", "stored features"])
def test_resume_is_exact(make_coprs_trainer, weight_hash, tmp_path, kind) -> None:
    from peft import LoraConfig

    def make(folder: str) -> CoPRSTrainer:
        options = {"peft_config": LoraConfig(**LORA)} if kind == "lora" else {}
        if kind == "stored features":
            options["image_features_dir"] = str(tmp_path / "features")
        return make_coprs_trainer(folder, **settings, **options)

    settings = {
        "max_steps": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-4,
        "save_only_model": False,
    }
    whole = make("whole")
    start = weight_hash(whole.model)
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert weight_hash(resumed.model) == weight_hash(whole.model) != start
    losses = [
        log["loss"]
        for trainer in (whole, resumed)
        for log in trainer.state.log_history
        if log.get("step") == 3 and "loss" in log
    ]
    assert losses[0] == losses[1]


def test_reference_modules_decode_the_masks_of_the_rewards(make_coprs_trainer) -> None:
    """Changing the policy's modules changes only rewards with reward_masks="policy"."""
    rewards = {}
    for masks in ("reference", "policy"):
        trainer = make_coprs_trainer(masks, reward_masks=masks)
        trainer.model.train()
        row = trainer.train_dataset[0]
        before, after = [], []
        for values in (before, after):
            torch.manual_seed(0)
            rows = [dict(row) for _ in range(4)]
            trainer._generate_and_score_completions(rows)
            values += [item["predicted_probability"] for item in rows]
            with torch.no_grad():
                trainer.concept_model.prior.fusion[2].bias += 3
        rewards[masks] = max(np.abs(a - b).max() for a, b in zip(before, after, strict=True))
    assert rewards["reference"] == 0 and rewards["policy"] > 1e-3


def test_stored_features_equal_computed_ones(make_coprs_trainer, tmp_path) -> None:
    computed, stored = (
        make_coprs_trainer("a"),
        make_coprs_trainer("b", image_features_dir=str(tmp_path / "features")),
    )
    image = computed.train_dataset[0]["target_image"]
    (expected,) = computed.encode_images([image])
    for _ in range(2):  # written, then read
        (features,) = stored.encode_images([image])
        assert torch.equal(features.keys, expected.keys)
    (path,) = (tmp_path / "features").glob("*.safetensors")
    path.write_bytes(b"damaged")
    assert torch.equal(stored.encode_images([image])[0].keys, expected.keys)


def test_stored_features_do_not_change_the_training(
    make_coprs_trainer, weight_hash, tmp_path, monkeypatch
) -> None:
    """Each image is encoded once for all epochs and runs, and the weights are those of a run without the option."""
    hashes, encoded, images = {}, {}, set()
    for name in ("computed", "stored", "again"):
        folder = None if name == "computed" else str(tmp_path / "features")
        trainer = make_coprs_trainer(name, max_steps=8, image_features_dir=folder, learning_rate=1e-4)
        count = encoded[name] = []
        encode = trainer.concept_model.encode_image
        monkeypatch.setattr(
            trainer.concept_model,
            "encode_image",
            lambda pixels, encode=encode, count=count: count.append(len(pixels)) or encode(pixels),
        )
        images |= {row["target_image"].tobytes() for row in trainer.train_dataset}
        trainer.train()
        hashes[name] = weight_hash(trainer.concept_model)
    assert hashes["computed"] == hashes["stored"] == hashes["again"]
    assert 1 < len(images) < 8
    assert {name: sum(counts) for name, counts in encoded.items()} == {
        "computed": 8,
        "stored": len(images),
        "again": 0,
    }
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == len(images)


def test_processes_that_do_not_save_write_no_files(make_coprs_trainer, tmp_path, monkeypatch) -> None:
    """Otherwise, they would write to the folder in which the main process collects the files of the model."""
    trainer = make_coprs_trainer()
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda _: False))
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
