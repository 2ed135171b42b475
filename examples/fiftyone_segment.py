# /// script
# requires-python = ">=3.10"
# dependencies = ["conceptseg-hf[fiftyone]"]
# ///
"""Segment, evaluate and question a FiftyOne dataset, without the App.

    python examples/fiftyone_segment.py                    # 24 samples of ConceptShapes
    python examples/fiftyone_segment.py --limit 200 --model path/or/id

Needs a MongoDB, as all of FiftyOne does: the one that FiftyOne brings, or FIFTYONE_DATABASE_URI. `make app` shows the
same in the App.
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
    """Loads, segments, evaluates, and prints what it found."""
    parser = argparse.ArgumentParser(description="ConceptSeg in FiftyOne.")
    parser.add_argument("--model", default="nano", help="checkpoint folder or hub id (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=24, help="targets to load (default: %(default)s)")
    arguments = parser.parse_args()

    dataset = load_concept_benchmark("concept-shapes", limit=arguments.limit)
    targets = dataset.load_saved_view("targets")
    job = SegmentationJob(
        prompt_field="prompt",
        reference_ids_field="reference_ids",
        checkpoint=arguments.model,
        skip_existing=True,  # run again, it goes on where it stopped
    )
    for progress in segment_collection(targets, job):
        print(progress)

    targets = dataset.load_saved_view("targets")
    results = evaluate_concepts(targets, eval_key="concepts")
    for metric in results.custom_metrics.values():
        print(f"{metric['label']:30} {metric['value']:6.1f}")
    for reason, ids in find_uncertain(targets).items():
        print(f"look at {len(ids)} samples: {reason}")


if __name__ == "__main__":
    main()
