"""Worker for torchrun: run one kind of training on CPU and write its results as JSON.

Usage: `torchrun --nproc_per_node N two_processes.py KIND OUTPUT_DIR`, where KIND is ddp, zero2, zero3 or fsdp2. Both
systems are trained in the same processes, as starting them takes longer than the training.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from conceptseg_hf import (
    ConceptSegForSegmentation,
    ConceptSegProcessor,
    CoPRSForSegmentation,
    CoPRSProcessor,
    format_completion,
    nano_checkpoint,
)
from conceptseg_hf.data import load_benchmark

GROUP, STEPS = 4, 3  # GROUP is num_generations of `group_settings.GROUP_SETTINGS`


def skip_compilation() -> None:
    """Skip the compilation of a DeepSpeed operation, which takes minutes and is not needed with gloo."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def deepspeed_config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,
            "stage3_gather_16bit_weights_on_model_save": True,
            "stage3_param_persistence_threshold": 0,
        },
    }


def make_trainer(kind: str, folder: Path, **settings):
    from conceptseg_trainers import MetaGRPOConfig, MetaGRPOTrainer, split_reference_dataset

    class Scripted(MetaGRPOTrainer):
        """Use completions that depend only on the prompt and the index in the group, as sampling differs by process."""

        def _generate_single_turn(
            self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
        ):
            sampled, _ = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
            assert all(0 < len(ids) <= self.max_completion_length for ids in sampled)
            return [self._scripted_completion(ids, row % GROUP) for row, ids in enumerate(prompt_ids)], None

        def _scripted_completion(self, prompt: list[int], index: int) -> list[int]:
            rng = np.random.default_rng([sum(prompt), index])
            boxes = [sorted(rng.integers(0, 101, 2)) for _ in range(4)]
            check, bbox = ([a[0], b[0], a[1], b[1]] for a, b in (boxes[:2], boxes[2:]))
            text = format_completion("", "same", check, bbox, "star" if index % 2 else "red circle", 100)
            text = text if index else text.partition("</answer>")[0]  # so that rewards differ within a group
            tokenizer = self.concept_processor.tokenizer
            return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    samples = list(load_benchmark("concept-shapes", split="train", limit=8))
    return Scripted(
        ConceptSegForSegmentation.from_pretrained(nano_checkpoint()),
        args=MetaGRPOConfig(str(folder), **arguments(kind, 48, settings)),
        train_dataset=split_reference_dataset(samples),
        processing_class=ConceptSegProcessor.from_pretrained(nano_checkpoint()),
    )


# The first one has no concentration token, so that rewards differ, and one process may have fewer masks.
COPRS_TEXTS = (
    "<think>a star</think>",
    "<think>the red one</think><REF_POS>",
    "x <think>left</think><REF_POS>",
    "<REF_POS>",
)


def make_coprs_trainer(kind: str, folder: Path, **settings):
    from conceptseg_trainers import CoPRSTrainer, CoPRSTrainerConfig, split_reference_dataset
    from random_coprs import build_random_coprs

    class Scripted(CoPRSTrainer):
        """Use completions that depend only on the index in the group, as sampling differs by process."""

        def _generate_single_turn(
            self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
        ):
            sampled, _ = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
            )
            assert all(0 < len(ids) <= self.max_completion_length for ids in sampled)
            tokenizer, end = self.concept_processor.tokenizer, self.concept_processor.ref_pos_token_id
            completions = [
                [
                    *tokenizer(COPRS_TEXTS[row % GROUP], add_special_tokens=False)["input_ids"],
                    tokenizer.eos_token_id,
                ]
                for row in range(len(prompt_ids))
            ]
            return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions], None

    # With ZeRO-3, a model that is built after the first trainer would be created in parts; one that is loaded is whole.
    # Therefore CoPRS comes first in `MAKERS`.
    start = folder.parent / f"start_{os.environ.get('RANK', 0)}"
    if not start.exists():
        created = build_random_coprs("sam")
        created.save_pretrained(start)
        created.processor.save_pretrained(start)
    model = CoPRSForSegmentation.from_pretrained(start)
    samples = [s for s in load_benchmark("concept-shapes", split="train", limit=12) if not s.references]
    return Scripted(
        model,
        args=CoPRSTrainerConfig(str(folder), **arguments(kind, 12, {"learning_rate": 1e-5, **settings})),
        train_dataset=split_reference_dataset(samples),
        processing_class=CoPRSProcessor.from_pretrained(start),
    )


MAKERS = {"coprs": make_coprs_trainer, "conceptseg": make_trainer}


def arguments(kind: str, max_completion_length: int, settings: dict) -> dict:
    """Return the arguments of a run; `settings` take precedence."""
    from group_settings import GROUP_SETTINGS

    return {
        **GROUP_SETTINGS,
        "gradient_accumulation_steps": 1,
        "max_completion_length": max_completion_length,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-4,
        "deepspeed": deepspeed_config(int(kind[-1])) if kind.startswith("zero") else None,
        **settings,
    }


def frozen_part(trainer):
    """Return the part of SAM that is removed from the module tree."""
    sam = trainer.concept_model.sam
    return sam if hasattr(trainer.concept_model, "ctm") else sam.vision_encoder


def train(kind: str, folder: Path, system: str, **settings) -> dict:
    from conceptseg_trainers.distributed import is_sharded

    trainer = MAKERS[system](kind, folder / "run", **settings)
    frozen = _hash(frozen_part(trainer))
    trainer.train()
    trainer.save_model(str(folder / "whole"))
    resumed = MAKERS[system](kind, folder / "run", **settings)
    resumed.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    resumed.save_model(str(folder / "resumed"))
    return {
        "kind": str(trainer.accelerator.distributed_type).rpartition(".")[2],
        "zero_stage": trainer.args.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None,
        "world_size": trainer.accelerator.num_processes,
        "sharded": sorted({is_sharded(parameter) for parameter in trainer.concept_model.parameters()}),
        "frozen_sharded": sorted({is_sharded(parameter) for parameter in frozen_part(trainer).parameters()}),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "resumed": [entry for entry in resumed.state.log_history if "loss" in entry][-1],
        "final_weights": _file_hash(folder / "whole"),
        "resumed_weights": _file_hash(folder / "resumed"),
        "frozen_unchanged": _hash(frozen_part(trainer)) == frozen,
    }


def shard_and_generate() -> dict:
    """Shard manually with FSDP2, which accelerate only supports on GPUs."""
    from conceptseg_trainers.distributed import make_generate_gather
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    processor = ConceptSegProcessor.from_pretrained(nano_checkpoint())
    sample = load_benchmark("concept-shapes", split="train", limit=1)[0]
    batch = processor.collate([processor.prepare(sample.image, sample.prompt, sample.references)])

    def generate(model) -> list[int]:
        return model.generate(**batch, max_new_tokens=12, do_sample=False)[0].tolist()

    model = ConceptSegForSegmentation.from_pretrained(nano_checkpoint())
    whole = generate(model)
    model.detach_sam()
    for layer in [*model.vlm.model.visual.blocks, *model.vlm.model.language_model.layers]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    try:
        generate(model)
        fails_without = False
    except RuntimeError:
        fails_without = True
    make_generate_gather(model)
    return {
        "world_size": torch.distributed.get_world_size(),
        "same": generate(model) == whole,
        "fails_without": fails_without,
    }


def _hash(module) -> str:
    weights = b"".join(weight.numpy().tobytes() for weight in module.state_dict().values())
    return hashlib.sha256(weights).hexdigest()


def _file_hash(folder: Path) -> str:
    path = folder / "model.safetensors"  # written by the main process
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def write(figures: dict, folder: Path) -> None:
    (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    kind, folder = sys.argv[1], Path(sys.argv[2])
    if kind.startswith("zero"):
        skip_compilation()
    systems = [""] if kind == "fsdp2" else list(MAKERS)
    for system in systems:
        figures = shard_and_generate() if kind == "fsdp2" else train(kind, folder / system, system)
        if torch.distributed.get_rank() == 0:
            write(figures, folder / system)
    torch.distributed.barrier()
    os._exit(0)  # otherwise gloo's threads abort the interpreter at exit in about one of six runs
