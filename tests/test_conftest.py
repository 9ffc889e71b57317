"""The guard that keeps tests off the network has to hold, and has to leave this machine's own addresses alone."""

import os
import socket
import subprocess
import sys

import pytest

OUTSIDE = ("192.0.2.1", 80)  # an address that documentation reserves: nothing answers there


def test_look_ups_and_connections_are_refused():
    with pytest.raises(RuntimeError, match=r"'example\.org'"):
        socket.create_connection(("example.org", 80), timeout=1)
    with socket.socket() as sock:
        sock.settimeout(1)
        for connect in (sock.connect, sock.connect_ex):
            with pytest.raises(RuntimeError, match="without the network"):
                connect(OUTSIDE)


def test_this_machine_stays_reachable():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1]), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()


def test_the_hub_is_off_in_child_processes_too():
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE, c.HF_HOME)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.split() == ["True", os.environ["HF_HOME"]]
