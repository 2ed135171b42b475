"""Stage II with rollouts of a colocated vLLM engine; vLLM runs for real, on the CPU.

The model is the embedded checkpoint, or a random one of the same size for other families of VLMs.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM needs an environment of its own: run `make test-vllm`")
pytest.importorskip("trl", "1.16")

import psutil
import torch
from conceptseg_trainers import MetaGRPOConfig, MetaGRPOTrainer, split_reference_dataset
from group_settings import GROUP_SETTINGS
from peft import LoraConfig

from conceptseg_hf import ConceptSegForSegmentation, ConceptSegProcessor, nano_checkpoint
from conceptseg_hf.data import load_benchmark
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.inputs import PreparedSample
from conceptseg_hf.vlm_families import FAMILIES, get_family

other_families = pytest.mark.parametrize(
    "vlm_family", [name for name in FAMILIES if name != "qwen2_5_vl"], indirect=True, scope="session"
)


@pytest.fixture(scope="module")
def shapes():
    return list(load_benchmark("concept-shapes", split="train", limit=12))


@pytest.fixture(scope="session")
def make_policy(vlm_family, request):
    """Return a function that creates the model and its processor."""

    def make() -> tuple[ConceptSegForSegmentation, ConceptSegProcessor]:
        if vlm_family != "qwen2_5_vl":
            return request.getfixturevalue("make_model")(), request.getfixturevalue("processor")
        folder = nano_checkpoint()
        return ConceptSegForSegmentation.from_pretrained(folder), ConceptSegProcessor.from_pretrained(folder)

    return make


@pytest.fixture(scope="session")
def vlm_folder(make_policy, tmp_path_factory) -> str:
    """The VLM alone, with its processor, as users save it."""
    model, processor = make_policy()
    folder = tmp_path_factory.mktemp("vlm")
    model.vlm.save_pretrained(folder)
    processor.vlm_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def weight_hash():
    def hash_of(module: torch.nn.Module) -> str:
        digest = hashlib.sha256()
        for name, weight in sorted(module.state_dict().items()):
            digest.update(name.encode() + weight.detach().numpy().tobytes())
        return digest.hexdigest()

    return hash_of


@pytest.fixture
def make(shapes, make_policy, vlm_folder, tmp_path):
    def make_trainer(folder: str = "run", **settings) -> MetaGRPOTrainer:
        model, processor = make_policy()
        arguments = {name: settings.pop(name) for name in ("peft_config",) if name in settings}
        settings = {
            **GROUP_SETTINGS,
            "max_completion_length": 64,
            "learning_rate": 1e-4,
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_vlm_name_or_path": vlm_folder,
            "vllm_max_model_length": 512,
            **settings,
        }
        return MetaGRPOTrainer(
            model,
            args=MetaGRPOConfig(str(tmp_path / folder), **settings),
            train_dataset=split_reference_dataset(shapes),
            processing_class=processor,
            **arguments,
        )

    return make_trainer


def prompts_of(trainer, samples) -> list[PreparedSample]:
    prepare = trainer.concept_processor.prepare
    return [prepare(sample.image, sample.prompt, sample.references) for sample in samples]


def outputs_of_engine(trainer, prepared) -> list:
    from vllm import SamplingParams

    backend = trainer.vllm_generation
    settings = SamplingParams(
        temperature=0,
        max_tokens=64,
        logit_bias=backend.generation_kwargs["logit_bias"],
        detokenize=False,
        logprobs=0,
    )
    prompts = [
        {
            "prompt_token_ids": backend.engine_prompt(sample.input_ids.tolist()),
            "multi_modal_data": {"image": list(sample.vlm_images)},
        }
        for sample in prepared
    ]
    outputs = backend.llm.generate(prompts, settings, use_tqdm=False)
    assert [output.prompt_token_ids for output in outputs] == [each.input_ids.tolist() for each in prepared]
    return [output.outputs[0] for output in outputs]


def greedy_of_engine(trainer, prepared) -> list[list[int]]:
    ends = set(trainer.eos_token_ids)
    outputs = outputs_of_engine(trainer, prepared)
    return [[token for token in output.token_ids if token not in ends] for output in outputs]


def assert_engine_follows(trainer, prepared) -> list[list[int]]:
    """Compare greedy completions of the engine and their log-probabilities with the policy's, and return them."""
    outputs = outputs_of_engine(trainer, prepared)
    completions = greedy_of_policy(trainer, prepared)
    assert greedy_of_engine(trainer, prepared) == completions
    model, processor = trainer.concept_model, trainer.concept_processor
    vlm, family = model.vlm, processor.family
    for sample, output, completion in zip(prepared, outputs, completions, strict=True):
        batch = processor.collate([sample], [completion])
        with torch.no_grad():
            states = family.full_pass(vlm, family.model_inputs(batch), use_cache=False).last_hidden_state
            logits = vlm.get_output_embeddings()(states[0, len(sample.input_ids) - 1 :])
        logits[:, family.vision_token_ids(vlm.config)] = -torch.inf  # are not sampled
        expected = logits.log_softmax(dim=1)
        for position, (token, values) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
            assert values[token].logprob == pytest.approx(expected[position, token].item(), abs=1e-3)
    return completions


def greedy_of_policy(trainer, prepared) -> list[list[int]]:
    model = trainer.concept_model
    generated = generate_with_states(
        model.vlm, trainer.concept_processor.collate(prepared), {"max_new_tokens": 64}
    )
    return [ids[mask].tolist() for ids, mask in zip(generated.token_ids, generated.mask)]


def history(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_engine_follows_the_policy(make, shapes) -> None:
    """Completions and log-probabilities of the engine are those of the policy, also after updates."""
    trainer = make(max_steps=3, learning_rate=3e-4)
    prepared = prompts_of(trainer, shapes[:8])
    trainer.vllm_generation.sync_weights()
    before = greedy_of_engine(trainer, prepared)
    assert before == greedy_of_policy(trainer, prepared)

    trainer.train()
    assert trainer.vllm_importance_sampling_correction
    # The engine sampled from the policy of the same step: vision tower, language model and tied head are current.
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    ratios = history(trainer, "sampling/importance_sampling_ratio/min")
    assert len(ratios) == 3 and min(ratios) > 0.99
    assert min(history(trainer, "rewards/format/mean")) == 1.0
    assert history(trainer, "kl")[-1] > 1e-3

    policy = greedy_of_policy(trainer, prepared)
    assert policy != before
    trainer.vllm_generation.sync_weights()
    assert greedy_of_engine(trainer, prepared) == policy

    listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert set(listening) <= {"127.0.0.1", "::1"}


def test_vision_tower_alone_reaches_the_engine(make, shapes) -> None:
    """The engine caches encoded images, which TRL does not clear."""
    trainer = make()
    prepared = prompts_of(trainer, shapes[:1])
    trainer.vllm_generation.sync_weights()
    before = greedy_of_engine(trainer, prepared)
    with torch.no_grad():
        vlm = trainer.concept_model.vlm
        for parameter in get_family(vlm.config).vision_tower(vlm).parameters():
            parameter.mul_(0.8)
    expected = greedy_of_policy(trainer, prepared)
    assert expected != before
    trainer.vllm_generation.sync_weights()
    assert greedy_of_engine(trainer, prepared) == expected


def test_resumed_run_equals_an_undisturbed_one(make, weight_hash) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    undisturbed = make("undisturbed", **settings)
    undisturbed.train()
    resumed = make("resumed", **settings)
    resumed.train(resume_from_checkpoint=f"{undisturbed.args.output_dir}/checkpoint-2")
    assert history(resumed, "loss")[-2:] == history(undisturbed, "loss")[-2:]
    assert weight_hash(resumed.concept_model) == weight_hash(undisturbed.concept_model)


def test_adapters_are_merged_for_the_engine(make) -> None:
    config = LoraConfig(
        r=4, target_modules=r"vlm\.model\.language_model\..*\.(q_proj|v_proj)", modules_to_save=["ctm"]
    )
    trainer = make(max_steps=3, peft_config=config, learning_rate=1e-2)
    trainer.train()
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 1e-3
    assert history(trainer, "kl")[-1] > 1e-5  # without adapters, log-probabilities would differ by 4e-3


@other_families
def test_engine_of_another_family_follows_the_policy(make, shapes) -> None:
    """Random models write no valid completions: the segmentation loss alone changes the VLM.

    They give image tokens a probability that matters, with which the policy loss counts but the engine does not;
    `sampling_logp_difference` is not small therefore.
    """
    trainer = make(max_steps=2, learning_rate=3e-3, seg_loss_weight=10)
    prepared = prompts_of(trainer, shapes[:4])
    trainer.vllm_generation.sync_weights()
    before = assert_engine_follows(trainer, prepared)
    assert max(map(len, before)) > 8
    if trainer.concept_processor.vlm_family == "internvl":  # large images are not cropped to tiles
        large = tuple(image.resize((256, 256)) for image in prepared[0].vlm_images)
        outputs_of_engine(trainer, [replace(prepared[0], vlm_images=large)])
    trainer.train()
    trainer.vllm_generation.sync_weights()
    after = assert_engine_follows(trainer, prepared)
    assert after != before

    vlm = trainer.concept_model.vlm
    with torch.no_grad():
        for parameter in get_family(vlm.config).vision_tower(vlm).parameters():
            parameter.mul_(0.8)
    trainer.vllm_generation.sync_weights()
    assert assert_engine_follows(trainer, prepared) != after
