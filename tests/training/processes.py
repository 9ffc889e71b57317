"""Child processes that start at once: a server imports the training modules, and each child is forked from it."""

import multiprocessing
import os
import signal
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

WAIT = 300  # seconds, until a child that hangs is given up


def fork_server() -> ForkServerContext:
    """A context whose children have torch, Accelerate and the modules under test already."""
    context = multiprocessing.get_context("forkserver")
    # An optimizer's first step imports torch._dynamo, which takes longer than all the rest of a child.
    tests = ["tests.training.test_checkpointing", "tests.training.test_stability"]
    context.set_forkserver_preload(["torch._dynamo", *tests])
    return context


def wait_for(process: ForkServerProcess) -> int:
    """The exit status of a child: 0 for success, -9 for one that was killed by SIGKILL."""
    process.join(WAIT)
    if process.is_alive():
        process.kill()
        process.join()
        raise TimeoutError(f"the child did not end within {WAIT} seconds")
    assert process.exitcode is not None
    return process.exitcode


def die() -> None:
    """End this process as `kill -9` would."""
    os.kill(os.getpid(), signal.SIGKILL)


def _be_a_rank(
    target: Callable, rank: int, ranks: int, port: int, answer: Connection, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    try:
        answer.send((target(*arguments), None))
    except BaseException:
        answer.send((None, traceback.format_exc()))


def run_ranks(target: Callable, *arguments: Any, ranks: int = 2) -> list[Any]:
    """Call a function of a test module on several ranks, with gloo on this machine; what each of them returned."""
    context = fork_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(target=_be_a_rank, args=(target, rank, ranks, port, pipes[rank][1], arguments))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()
    answers = []
    for rank, (reader, _) in enumerate(pipes):
        if not reader.poll(WAIT):
            for process in processes:
                process.kill()
            raise TimeoutError(f"rank {rank} did not answer within {WAIT} seconds")
        answers.append(reader.recv())
    for process in processes:
        wait_for(process)
    failures = [f"rank {rank}:\n{text}" for rank, (_, text) in enumerate(answers) if text is not None]
    assert not failures, "\n".join(failures)
    return [value for value, _ in answers]
