"""Compare a step of Meta-GRPO with the scheme of the released code, which shares nothing between completions.

    python benchmarks/meta_grpo.py          needs conceptseg-hf[train]

In the released scheme, the VLM processes prompt and images for each completion in generation, in the loss and in the
forward pass of the reference policy, and SAM 3 encodes the image for each completion (for its reward and for L_seg). In
this package, all completions of a prompt share these computations. Both schemes use the same model, data and seed, and
alternate in separate processes; compare the ratios rather than the absolute times.
There are two models: the embedded one with 16 x 16 patches in SAM 3, and the same VLM and CTM with a SAM 3 of the same
width and depth but 72 x 72 patches, as in the released SAM 3 (with random weights, as only the time is measured).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from nano_sizes import PATCHES, load

SCHEMES = ("shared", "released")
STEPS, WARM_UP, TURNS, COMPLETIONS = 6, 1, 3, 16


def measure(scheme: str, patches: int) -> dict[str, float]:
    """Return CPU seconds per step (median, after warm-up) and peak memory in MB of one scheme in this process."""
    import torch
    from conceptseg_trainers import MetaGRPOConfig, MetaGRPOTrainer, split_reference_dataset
    from transformers import TrainerCallback

    from conceptseg_hf import shared_prompts
    from conceptseg_hf.data import load_benchmark

    torch.set_num_threads(1)

    class Released(MetaGRPOTrainer):
        """Encode the target once per completion instead of once per prompt."""

        def __init__(self, *arguments: object, **keywords: object) -> None:
            super().__init__(*arguments, **keywords)
            self.features: dict[int, object] = {}
            self.prompts: dict[int, object] = {}

        def _decode(self, rollouts, concept_embeds):
            masks = []
            for rollout, concept in zip(rollouts, concept_embeds, strict=True):
                features = self.features.pop(id(rollout), None)
                # The features of the prompt are used for its first completion.
                if features is None and id(rollout.prompt) not in self.prompts:
                    self.prompts[id(rollout.prompt)] = rollout.prompt
                    features = self.features[id(rollout)] = rollout.prompt.features
                if features is None:
                    images = [rollout.prompt.target]
                    pixels = self.concept_processor.sam_image_processor(images=images, return_tensors="pt")
                    features = self.concept_model.encode_image(pixels["pixel_values"])
                    self.features[id(rollout)] = features  # for L_seg
                text = self.concept_processor.sam_text([rollout.sam_text])
                masks.append(self.concept_model.decode_masks(features, *text, concept[None])[0])
            return torch.cat(masks)

    if scheme == "released":
        shared_prompts.find_shared_prompts = lambda *arguments: None

    class Clock(TrainerCallback):
        """Record the CPU time at the end of each step, which does not depend on the load of the machine."""

        def __init__(self) -> None:
            self.ends = [time.process_time()]

        def on_step_end(self, *arguments: object, **keywords: object) -> None:
            self.ends.append(time.process_time())

    clock = Clock()
    model, processor = load(patches)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (MetaGRPOTrainer if scheme == "shared" else Released)(
            model=model,
            processing_class=processor,
            args=MetaGRPOConfig(
                folder,
                per_device_train_batch_size=COMPLETIONS,
                num_generations=COMPLETIONS,
                max_completion_length=80,
                max_steps=STEPS,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                bf16=False,
                gradient_checkpointing=False,
                log_examples=0,
                disable_tqdm=True,
            ),
            train_dataset=split_reference_dataset(load_benchmark("concept-shapes", split="train", limit=64)),
            callbacks=[clock],
        )
        trainer.train()
    steps = [after - before for before, after in zip(clock.ends, clock.ends[1:])][WARM_UP:]
    return {
        "seconds": statistics.median(steps),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", choices=SCHEMES, help="measure one scheme and print JSON")
    parser.add_argument(
        "--patches", type=int, default=PATCHES[0], help="SAM 3 patches per side, with --scheme"
    )
    arguments = parser.parse_args()
    if arguments.scheme:
        print(json.dumps(measure(arguments.scheme, arguments.patches)))
        return
    print(f"one step of {COMPLETIONS} completions of one prompt, one thread, medians of {TURNS} runs:")
    for patches in PATCHES:
        compare(patches)


def compare(patches: int) -> None:
    """Run both schemes alternately and print their medians and ratios."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in SCHEMES}
    for _ in range(TURNS):
        for name, measured in results.items():
            command = [sys.executable, __file__, "--scheme", name, "--patches", str(patches)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            measured.append(json.loads(output.splitlines()[-1]))
    medians = {
        name: {key: statistics.median(result[key] for result in measured) for key in measured[0]}
        for name, measured in results.items()
    }
    print(f"SAM 3 with {patches} x {patches} patches")
    for name, numbers in medians.items():
        print(f"  {name:16} {numbers['seconds']:6.2f} s   peak {numbers['memory']:5.0f} MB")
    shared, released = (medians[name] for name in SCHEMES)
    print(
        f"  ratio            {shared['seconds'] / released['seconds']:6.2f}     "
        f"     {shared['memory'] / released['memory']:5.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
