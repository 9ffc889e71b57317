"""`python -m tests_hf [pytest's arguments]`: fetch transformers' mixins, run them, print counts and reasons."""

import argparse
import importlib.util
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from .report import Collector, summary
from .sdist import FetchError, fetch

FOLDER = Path(__file__).resolve().parent


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; 0 if nothing failed and every skip has a reason."""
    parser = argparse.ArgumentParser(prog="python -m tests_hf", description=__doc__)
    parser.add_argument("-n", "--workers", type=int, default=2, help="processes (default: 2); 0 for this one only")
    options, extra = parser.parse_known_args(arguments)
    start = time.monotonic()
    if importlib.util.find_spec("parameterized") is None:
        print("transformers' mixins need `parameterized`: pip install parameterized", file=sys.stderr)
        return 2
    try:
        fetch()
    except FetchError as error:
        print(error, file=sys.stderr)
        return 2
    command = [str(FOLDER), "--rootdir", str(FOLDER.parent), "-c", str(FOLDER.parent / "pyproject.toml")]
    # The tables at the end replace pytest's own summaries.
    command += ["-o", "addopts=", "--import-mode=importlib", "-q", "--tb=short", "--disable-warnings", "-rN"]
    command += ["-o", "verbosity_subtests=0"]  # names a failed subtest only
    if options.workers and importlib.util.find_spec("xdist"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
        command += ["-n", str(options.workers), "--dist", "worksteal"]
    collector = Collector()
    code = pytest.main([*command, "-p", "no:cacheprovider", *extra], plugins=[collector])
    text, good = summary(collector.results)
    seconds = time.monotonic() - start
    print(f"\n{text}\n\ntransformers {version('transformers')}, torch {version('torch')}: {seconds:.0f} s")
    return 0 if good and code == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main())
