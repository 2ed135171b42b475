# /// script
# requires-python = ">=3.10"
# dependencies = ["conceptseg-hf[fiftyone]"]
# ///
"""Segment, evaluate and inspect a FiftyOne dataset without the App.

    python examples/fiftyone_segment.py                    # 24 samples of ConceptShapes
    python examples/fiftyone_segment.py --limit 200 --model path/or/id

FiftyOne needs MongoDB: the bundled one, or the server at FIFTYONE_DATABASE_URI. `make app` shows the same workflow in
the App.
"""

from __future__ import annotations

import argparse

from conceptseg_hf.integrations.fiftyone import (
    SegmentationJob,
    evaluate_concepts,
    find_uncertain,
    load_concept_benchmark,
    segment_collection,
)


def main() -> None:
    """Load, segment and evaluate the dataset, and print the results."""
    parser = argparse.ArgumentParser(description="ConceptSeg in FiftyOne.")
    parser.add_argument("--model", default="nano", help="checkpoint folder or hub id (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=24, help="number of targets to load (default: %(default)s)"
    )
    arguments = parser.parse_args()

    dataset = load_concept_benchmark("concept-shapes", limit=arguments.limit)
    targets = dataset.load_saved_view("targets")
    job = SegmentationJob(
        prompt_field="prompt",
        reference_ids_field="reference_ids",
        checkpoint=arguments.model,
        skip_existing=True,  # resume when the script is run again
    )
    for progress in segment_collection(targets, job):
        print(progress)

    targets = dataset.load_saved_view("targets")
    results = evaluate_concepts(targets, eval_key="concepts")
    for metric in results.custom_metrics.values():
        print(f"{metric['label']:30} {metric['value']:6.1f}")
    for reason, ids in find_uncertain(targets).items():
        print(f"inspect {len(ids)} samples: {reason}")


if __name__ == "__main__":
    main()
