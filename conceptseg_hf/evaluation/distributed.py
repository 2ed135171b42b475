"""The processes of one evaluation, as `accelerate launch` and torchrun start them.

They share work by number and pass results on in files: all that they need of each other is to wait.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

# One process may have hours of work left when another has none.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """The processes that were launched together.

    Attributes:
        rank: The number of this one, from 0.
        world_size: How many there are.
        state: accelerate's `PartialState`, None for a process that is alone.
    """

    rank: int = 0
    world_size: int = 1
    state: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, merges and writes reports."""
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when all have called it."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Ends what joins them; the last call of a program, without which its exit may be aborted."""
        if self.state is not None:
            self.barrier()
            self.state.destroy_process_group()
            wait_for_gloo_threads()


ALONE = Processes()


def wait_for_gloo_threads() -> None:
    """Waits a second for gloo's threads, at the end of a program whose process group is gone.

    They let go of the last tensors, for which they need the interpreter: one that is taking itself apart meanwhile
    aborts the process.
    """
    time.sleep(1.0)


def join_processes() -> Processes:
    """Finds out which process this is; to be called before models are loaded, as it gives each process its device.

    A process that no launcher has started is alone.
    """
    if int(os.environ.get("LOCAL_RANK", -1)) < 0 or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return ALONE
    from accelerate import PartialState

    from ..devices import default_device

    device = default_device().type
    # Where accelerate lets us choose: gloo, since nothing but waiting is asked of the group, and several processes may
    # share a GPU.
    backend = {"backend": "gloo"} if device in ("cpu", "cuda") else {}
    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE, **backend)
    return Processes(state.process_index, state.num_processes, state)
