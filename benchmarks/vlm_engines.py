"""Compare completions of `generate` and of vLLM in one run, with the embedded checkpoint on the CPU.

    python benchmarks/vlm_engines.py          in the environment of `make test-vllm`

Both write the same greedy completions and return the same hidden states (checked below); vLLM's figure includes the
teacher-forced pass that computes them. Times are CPU seconds of one thread; the engines alternate. With references, all
prompts of a batch share their mosaic. The embedded VLM has 128 channels, so most of the time is Python and
dispatch: the ratios say nothing about a 7B VLM on a GPU, where computation and memory traffic dominate.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from conceptseg_hf.data import load_benchmark
from conceptseg_hf.generation import generate_with_states
from conceptseg_hf.loading import load_model_and_processor

TURNS = 3


def main() -> None:
    """Print a table of batch sizes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="batch sizes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load_model_and_processor(None, device="cpu")
    from conceptseg_hf.vllm_engine import VllmEngine

    start = time.process_time()
    engine = VllmEngine(model, processor, max_num_seqs=max(arguments.batches))
    print(f"building the engine: {time.process_time() - start:.1f} CPU seconds\n")
    benchmark = load_benchmark("concept-shapes", split="test")
    samples = [
        benchmark[index] for index in range(0, len(benchmark), len(benchmark) // max(arguments.batches))
    ]
    shown = next(sample for sample in samples if len(sample.references) == 4)

    def prepare(count: int, shared: bool) -> list:
        return [
            processor.prepare_vlm(
                processor.prepare(
                    sample.image, *((shown.prompt, shown.references) if shared else (sample.prompt,))
                )
            )
            for sample in samples[:count]
        ]

    def transformers(batch: list) -> object:
        return generate_with_states(model.vlm, processor.collate(batch))

    def vllm(batch: list) -> object:
        return engine.generate(model, processor, batch)

    def seconds(run: object, batch: list) -> float:
        start = time.process_time()
        run(batch)
        return time.process_time() - start

    print("| prompts | batch | generate | vLLM | generate / vLLM | same tokens |\n|---|---|---|---|---|---|")
    for shared in (False, True):
        for count in arguments.batches:
            batch = prepare(count, shared)
            expected, actual = transformers(batch), vllm(batch)  # also warms up
            same = sum(
                row[mask].tolist() == other[other_mask].tolist()
                for row, mask, other, other_mask in zip(
                    expected.token_ids, expected.mask, actual.token_ids, actual.mask
                )
            )
            times: dict[str, list[float]] = {"transformers": [], "vllm": []}
            for _ in range(TURNS):
                engine._llm.reset_prefix_cache()  # prefixes are shared within a batch, not with earlier turns
                times["transformers"].append(seconds(transformers, batch))
                times["vllm"].append(seconds(vllm, batch))
            first, second = (count / statistics.median(values) for values in times.values())
            print(
                f"| {'shared references' if shared else 'no references'} | {count} | {first:.1f}/s | {second:.1f}/s | "
                f"{first / second:.2f} | {same} of {count} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
