"""What every test may rely on: no network, no hub, a cache of its own, fixed seeds, and few threads under xdist.

The environment is set before torch, transformers or matplotlib is imported, because they read it once, at import;
child processes that a test starts inherit it.
"""

import ipaddress
import os
import random
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_hf_home = tempfile.TemporaryDirectory(prefix="florence-tests-")  # removed when the process ends
os.environ["HF_HOME"] = _hf_home.name  # a reader's own cache neither helps nor hinders, and workers never share one
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism

import numpy as np
import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

SHARED = Path(__file__).resolve().parents[2] / "shared"


class NetworkUse(RuntimeError):
    """A test reached for the network. Not an OSError, so that no library takes it for an outage and tries again."""


def _is_local(host: str | bytes | None) -> bool:
    """True for this machine's own names and loopback addresses."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


@pytest.fixture(scope="session", autouse=True)
def block_network() -> Iterator[None]:
    """Refuse every name look-up and connection that would leave this machine."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: str | bytes | None) -> None:
        if not _is_local(host):
            raise NetworkUse(f"tests run without the network, but something reached for {host!r}")

    def check_address(address: tuple | str | bytes) -> None:
        if isinstance(address, tuple):  # a plain string is a Unix socket's path
            check(address[0])

    def guarded_connect(self, address):
        check_address(address)
        return connect(self, address)

    def guarded_connect_ex(self, address):
        check_address(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(autouse=True)
def fix_seeds() -> None:
    """Start each test from the same state of every random generator, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the clone (upstream tensors, real data sets); a test that needs it skips without."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` beside the clone; put it there and run `make test` again")
    return SHARED


@pytest.fixture(scope="session")
def parity_path(shared) -> Callable[[str], Path]:
    """Where a file of `../shared/parity` is; a test that needs one skips without it."""

    def find(name: str) -> Path:
        path = shared / "parity" / name
        if not path.is_file():
            pytest.skip(f"needs {name} in `shared/parity`, which lies beside the clone; put it there and run again")
        return path

    return find


@pytest.fixture(scope="session")
def parity_file(parity_path) -> Callable[[str], dict[str, Any]]:
    """The cases of one file of `../shared/parity`."""
    return lambda name: torch.load(parity_path(name), weights_only=True)
