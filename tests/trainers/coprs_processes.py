"""Worker of `test_coprs_distributed.py` for torchrun: train a small random CoPRS model and write the log as JSON.

Usage: `torchrun --nproc_per_node N coprs_processes.py OUTPUT_DIR`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_coprs import build_random_coprs

from conceptseg_hf.data import load_benchmark

GROUP, STEPS = 4, 2
# The first one has no concentration token, so that rewards differ, and one process may have fewer masks.
TEXTS = (
    "<think>a star</think>",
    "<think>the red one</think><REF_POS>",
    "x <think>left</think><REF_POS>",
    "<REF_POS>",
)


def make_trainer(folder: Path, **settings):
    from conceptseg_trainers import CoPRSTrainer, CoPRSTrainerConfig, split_reference_dataset

    class Scripted(CoPRSTrainer):
        """Use completions that depend only on the index in the group, as sampling differs by process."""

        def _generate_single_turn(
            self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
        ):
            tokenizer = self.concept_processor.tokenizer
            completions = [
                [
                    *tokenizer(TEXTS[row % GROUP], add_special_tokens=False)["input_ids"],
                    tokenizer.eos_token_id,
                ]
                for row in range(len(prompt_ids))
            ]
            end = self.concept_processor.ref_pos_token_id
            return [ids[: ids.index(end) + 1] if end in ids else ids for ids in completions], None

    model = build_random_coprs("sam")
    args = CoPRSTrainerConfig(
        str(folder),
        per_device_train_batch_size=GROUP,
        num_generations=GROUP,
        max_completion_length=12,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        learning_rate=1e-5,
        bf16=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=False,
        log_examples=0,
        **settings,
    )
    samples = [s for s in load_benchmark("concept-shapes", split="train", limit=12) if not s.references]
    return Scripted(
        model, args=args, train_dataset=split_reference_dataset(samples), processing_class=model.processor
    )


def train(folder: Path, **settings) -> None:
    trainer = make_trainer(folder / "run", **settings)
    trainer.train()
    trainer.save_model(str(folder / "whole"))
    if trainer.is_world_process_zero():
        figures = {
            "world_size": trainer.accelerator.num_processes,
            "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        }
        (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
    torch.distributed.barrier()
    os._exit(0)  # otherwise gloo's threads abort the interpreter at exit in about one of six runs
