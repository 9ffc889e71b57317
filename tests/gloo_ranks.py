"""A group of processes on this machine: the same function on every rank, what each returns in a list."""

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300  # seconds: a machine may be busy with something else
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
multiprocessing.set_forkserver_preload(
    ["torch", "transformers_florence.training.gradient_cache"]
)  # once for all ranks


def _run(rank: int, function: Callable[[int], Any], ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # What launchers set and Accelerate reads; the address is for its eyes only, as the group is there by then.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),  # a file: no port that another process could take
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.save(function(rank), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(function: Callable[[int], Any], ranks: int, folder: Path) -> list[Any]:
    """Call `function(rank)` in `ranks` processes with an initialised gloo group.

    Args:
        function: of a module's top level; what it returns holds tensors, numbers, texts, lists and dicts.
        folder: empty; of this call alone.

    Raises:
        Exception: a rank failed, with its traceback, or they took longer than `TIMEOUT`.
    """
    context = mp.start_processes(_run, args=(function, ranks, folder), nprocs=ranks, join=False, start_method=METHOD)
    end = time.monotonic() + TIMEOUT
    while not context.join(timeout=5):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{ranks} ranks took longer than {TIMEOUT} seconds")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
