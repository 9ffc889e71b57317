"""Running a function as soon as a module has been imported, together with all that was being imported around it."""

import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _WatchedLoader:
    """A module's own loader, with the hook told when the module's code begins and ends."""

    def __init__(self, loader: Any, hook: "ImportHook") -> None:
        self.loader = loader
        self.hook = hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader  # what has been imported shows no trace of the hook
        module.__loader__ = self.loader
        with self.hook.importing():
            self.loader.exec_module(module)


class ImportHook(MetaPathFinder):
    """Calls `action` once `trigger` has been imported, but not while a module of `packages` is still half imported.

    A module is often imported in the middle of another one. What `action` imports may need that other one whole, so
    it waits until the outermost import has ended, in all threads, where an import statement of the user's could stand
    as well. Then the hook removes itself. If `trigger` has been imported before, `action` is called at once.

    Args:
        trigger: full name of a module of one of `packages`.
        packages: names of the packages whose modules are watched: those of `trigger` and of what `action` imports.
        action: an exception that it raises is the import statement's, and the next import tries again.
    """

    def __init__(self, trigger: str, packages: Collection[str], action: Callable[[], None]) -> None:
        self.trigger = trigger
        self.packages = frozenset(packages)
        self.action = action
        self.lock = threading.Lock()  # never held while anything is imported
        self.under_way = 0
        self.thread = threading.local()

    def install(self) -> None:
        """Begin to watch, or call the action if there is nothing left to wait for."""
        if self.trigger in sys.modules:
            self.action()
        else:
            sys.meta_path.insert(0, self)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Around the code of one module."""
        with self.lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self.lock:
                self.under_way -= 1
                due = self.under_way == 0 and self.trigger in sys.modules and self in sys.meta_path
                self.under_way += due  # so that nothing that the action imports calls it again
            if due:
                self.act()

    def act(self) -> None:
        """Call the action; `under_way` counts it already."""
        try:
            self.action()
            sys.meta_path.remove(self)
        finally:
            with self.lock:
                self.under_way -= 1

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the other finders find, with its loader watched if it is a module of the watched packages."""
        if fullname.partition(".")[0] not in self.packages or getattr(self.thread, "finding", False):
            return None
        self.thread.finding = True  # another hook may ask all finders again
        try:
            specs = (finder.find_spec(fullname, path, target) for finder in list(sys.meta_path) if finder is not self)
            spec = next((spec for spec in specs if spec is not None), None)
        finally:
            self.thread.finding = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _WatchedLoader(spec.loader, self)  # type: ignore[assignment]  # has a loader's methods
        return spec


__all__ = ["ImportHook"]
