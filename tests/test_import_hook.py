"""`ImportHook`, on packages made for each test: when its action runs, and that it leaves no trace."""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transformers_florence.import_hook import ImportHook

WATCHED, OTHER = "watched_by_a_test", "not_watched_by_a_test"


@pytest.fixture
def write(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes a module of one of the two packages; they are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def write(name: str, code: str) -> Path:
        file = tmp_path / (name.replace(".", "/") + ".py")
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(code)
        importlib.invalidate_caches()
        return file

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in (WATCHED, OTHER)]:
        del sys.modules[name]


def hook(action: Callable[[], None], packages: tuple[str, ...] = (WATCHED,)) -> ImportHook:
    made = ImportHook(f"{WATCHED}.trigger", packages, action)
    made.install()
    return made


def test_the_action_waits_for_the_outermost_import(write):
    """`outer` imports the trigger in its middle, and the action needs what `outer` defines after that."""
    write(f"{WATCHED}.trigger", "")
    write(f"{WATCHED}.outer", "from . import trigger\ncalls_so_far = 0\nlate = 'whole'")
    seen = []
    made = hook(lambda: seen.append(importlib.import_module(f"{WATCHED}.outer").late))
    importlib.import_module(WATCHED)
    assert seen == [] and made in sys.meta_path
    importlib.import_module(f"{WATCHED}.outer")
    assert seen == ["whole"] and made not in sys.meta_path
    del sys.modules[f"{WATCHED}.trigger"]
    importlib.import_module(f"{WATCHED}.trigger")
    assert seen == ["whole"], "once is enough"


def test_a_trigger_that_was_imported_before_is_not_waited_for(write):
    write(f"{WATCHED}.trigger", "")
    importlib.import_module(f"{WATCHED}.trigger")
    seen = []
    assert hook(lambda: seen.append(1)) not in sys.meta_path and seen == [1]


def test_what_the_action_imports_does_not_call_it_again(write):
    write(f"{WATCHED}.trigger", "")
    write(f"{WATCHED}.more", "")
    seen = []
    hook(lambda: seen.append(importlib.import_module(f"{WATCHED}.more")))
    importlib.import_module(f"{WATCHED}.trigger")
    assert len(seen) == 1


def test_a_package_that_is_not_watched_may_stand_between(write):
    """Its own import statement is where the watched package's outermost import ends."""
    write(f"{WATCHED}.trigger", "")
    write(f"{OTHER}.module", f"import {WATCHED}.trigger\nfrom {OTHER} import seen\nat_once = list(seen)")
    seen = []
    hook(lambda: seen.append(1))
    importlib.import_module(OTHER).seen = seen
    assert importlib.import_module(f"{OTHER}.module").at_once == [1]


def test_an_import_that_fails_after_the_trigger(write):
    write(f"{WATCHED}.trigger", "")
    write(f"{WATCHED}.broken", "from . import trigger\nraise RuntimeError('broken module')")
    seen = []
    hook(lambda: seen.append(1))
    with pytest.raises(RuntimeError, match="broken module"):
        importlib.import_module(f"{WATCHED}.broken")
    assert seen == [1], "the trigger stays imported, and nothing else may follow"


def test_an_action_that_fails_is_tried_again(write):
    write(f"{WATCHED}.trigger", "")
    write(f"{WATCHED}.outer", "from . import trigger")
    attempts = []

    def action() -> None:
        attempts.append(1)
        if len(attempts) == 1:
            raise RuntimeError("not yet")

    made = hook(action)
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(f"{WATCHED}.outer")
    assert made in sys.meta_path
    importlib.import_module(f"{WATCHED}.outer")
    assert len(attempts) == 2 and made not in sys.meta_path


def test_what_is_imported_shows_no_trace(write):
    file = write(f"{WATCHED}.module", "answer = 42")
    write(f"{OTHER}.module", "")
    made = hook(lambda: None)
    spec = importlib.util.find_spec(f"{WATCHED}.module")
    assert spec.loader.get_source(spec.name) == "answer = 42", "as `python -m` and debuggers ask"
    for name in (f"{WATCHED}.module", f"{OTHER}.module"):
        module = importlib.import_module(name)
        loader = type(module.__spec__.loader)
        assert loader is type(module.__loader__) is importlib.machinery.SourceFileLoader
    assert sys.modules[f"{WATCHED}.module"].__file__ == str(file)
    assert importlib.util.find_spec(f"{WATCHED}.nowhere") is None
    with pytest.raises(ModuleNotFoundError, match=f"{WATCHED}.nowhere"):
        importlib.import_module(f"{WATCHED}.nowhere")
    assert made in sys.meta_path


def test_two_hooks_do_not_ask_each_other_for_ever(write):
    write(f"{WATCHED}.trigger", "")
    seen = []
    hook(lambda: seen.append("first"))
    hook(lambda: seen.append("second"))
    importlib.import_module(f"{WATCHED}.trigger")
    assert sorted(seen) == ["first", "second"]


def test_the_action_waits_for_other_threads_too(write):
    """Two threads that each wait for a module of the other's would get it half imported."""
    write(f"{WATCHED}.trigger", "")
    write(f"{WATCHED}.slow", f"from {OTHER} import entered, leave\nentered.set()\nassert leave.wait(10)\nlate = 1")
    write(f"{OTHER}.nothing", "")
    package = importlib.import_module(OTHER)
    package.entered, package.leave = threading.Event(), threading.Event()
    seen = []
    hook(lambda: seen.append(importlib.import_module(f"{WATCHED}.slow").late))
    slow = threading.Thread(target=importlib.import_module, args=(f"{WATCHED}.slow",))
    slow.start()
    assert package.entered.wait(10)
    importlib.import_module(f"{WATCHED}.trigger")
    assert seen == []
    package.leave.set()
    slow.join()
    assert seen == [1]
