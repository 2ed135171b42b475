"""The processes of an evaluation that was launched with `accelerate launch` or torchrun.

They divide the work by rank and exchange results through files, so the process group is only used for barriers.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# A process may finish hours before the others.
_TIMEOUT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The processes that were launched together.

    Attributes:
        rank: Rank of this process, from 0.
        world_size: Number of processes.
        state: accelerate's `PartialState`; None for a single process.
    """

    rank: int = 0
    world_size: int = 1
    state: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, merges and writes reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Destroy the process group; call it at the end of a program, which may otherwise abort on exit."""
        if self.state is not None:
            self.barrier()
            self.state.destroy_process_group()
            wait_for_gloo_threads()


ALONE = Processes()


def wait_for_gloo_threads() -> None:
    """Wait a second for gloo's threads, at the end of a program that has destroyed its process group.

    The threads release the last tensors, for which they need the interpreter. If the interpreter is being finalized at
    that time, the process aborts.
    """
    time.sleep(1.0)


def join_processes() -> Processes:
    """Initialize the process group; call it before loading models, as it assigns a device to each process.

    A process that was not started by a launcher runs alone.
    """
    if int(os.environ.get("LOCAL_RANK", -1)) < 0 or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return ALONE
    from accelerate import PartialState

    from ..devices import default_device

    device = default_device().type
    # Use gloo where accelerate accepts a backend: the group is only used for barriers, and processes may share a GPU.
    backend = {"backend": "gloo"} if device in ("cpu", "cuda") else {}
    state = PartialState(cpu=device == "cpu", timeout=_TIMEOUT, **backend)
    return Processes(state.process_index, state.num_processes, state)
