"""A batch job as a process that tests can kill: batch_process.py IMAGES OUT ENGINE WORKERS CONCEPT LOG

Each segmented batch is a line in LOG with the id of its process, also if it is not written afterwards.
"""

import os
import sys
from pathlib import Path

from conceptseg_hf import ConceptPrompt
from conceptseg_hf.batch import BatchJob, open_images, run_batch

LOG = sys.argv[6]


class LoggedJob(BatchJob):
    """A job that logs when its model has segmented a batch."""

    def load(self):
        model, processor = BatchJob.load(self)
        segment = model.segment

        def logged(*arguments, **options):
            results = segment(*arguments, **options)
            with Path(LOG).open("a") as file:
                file.write(f"{os.getpid()}\n")
            return results

        model.segment = logged
        return model, processor


def main() -> None:
    images, out, engine, workers, concept, _ = sys.argv[1:]
    job = LoggedJob(
        open_images(images), concept=ConceptPrompt.load(concept), batch_size=3, batches_per_shard=2
    )
    report = run_batch(job, out, engine=engine, num_workers=int(workers) or None)
    sys.stdout.write(f"{report.computed}\n")


if __name__ == "__main__":
    main()
