"""Makes the mixins of transformers' source distribution importable, and known to them the classes of this package."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import transformers.utils
from transformers.models.auto import modeling_auto

from . import stand_ins
from .sdist import fetch

PACKAGE = "florence_hf_mixins"  # under which the distribution's folder `tests` is imported
TABLE_ENDING = "_MAPPING_NAMES"


def registered(mapping) -> dict[str, str]:
    """What this process registered with an Auto class beyond the library's own: model type -> class name."""
    extra = getattr(mapping, "_extra_content", {})
    return {
        config.model_type: tuple(item.__name__ for item in models) if isinstance(models, tuple) else models.__name__
        for config, models in extra.items()
    }


def enter_registered_classes(module: ModuleType) -> None:
    """Give `module` tables of model names in which the registered classes stand beside the library's own.

    The mixins choose by these tables which class gets labels, which has no loss, which is a base model. The library's
    own tables stay as they are: it imports from its own folders by them.
    """
    for name, table in vars(module).copy().items():
        if not name.endswith(TABLE_ENDING) or not isinstance(table, dict):
            continue
        mapping = getattr(modeling_auto, name.removesuffix("_NAMES"), None)
        if mapping is not None:
            setattr(module, name, {**table, **registered(mapping)})


@contextmanager
def stand_ins_imported() -> Iterator[None]:
    """While this is open, imports of what the distribution lacks find the stand-ins."""
    path, modules = sys.path.copy(), stand_ins.missing_modules(PACKAGE)
    sys.modules.update(modules)
    try:
        # What this function imports is a second copy of the library; the mixins only look classes up in it.
        with mock.patch.object(transformers.utils, "direct_transformers_import", lambda *_, **__: stand_ins.Library()):
            yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.path[:] = path  # the mixins append folders that the distribution does not have


@cache
def load(name: str, folder: Path | None = None) -> ModuleType:
    """The module `name` of the distribution's tests, such as `"test_modeling_common"`.

    Args:
        name: without the ending.
        folder: of the unpacked source distribution; without it, it is fetched or taken from the cache.

    Raises:
        FetchError: it could not be fetched.
        ModuleNotFoundError: it has no such module, or the module needs another that is neither there nor stood in for.
    """
    tests = (folder or fetch()) / "tests"
    if PACKAGE not in sys.modules:
        package = ModuleType(PACKAGE, "The tests of transformers' source distribution.")
        package.__path__ = [str(tests)]
        sys.modules[PACKAGE] = package
    with stand_ins_imported():
        module = importlib.import_module(f"{PACKAGE}.{name}")
    enter_registered_classes(module)
    return module


__all__ = ["enter_registered_classes", "load", "registered", "stand_ins_imported"]
