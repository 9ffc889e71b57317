"""What `import transformers_florence` costs, that the Auto classes know it however they come, and what it needs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import transformers_florence
from tests.test_public_api import HIDE, extras

PACKAGE = Path(transformers_florence.__file__).parent
KNOWN = """
from transformers import AutoConfig, AutoModel, AutoProcessor

folder = transformers_florence.bundled_checkpoint()
found = [each.from_pretrained(folder) for each in (AutoConfig, AutoModel, AutoProcessor)]
print([type(each).__name__ for each in found])
assert not [finder for finder in sys.meta_path if type(finder).__name__ == "ImportHook"]
"""


def child(*code: str) -> subprocess.CompletedProcess:
    """A fresh interpreter that finds this package."""
    paths = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", "\n".join(["import sys", *code])]
    environment = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return result


def test_the_import_costs_at_most_a_tenth_of_transformers():
    """Processor time of one process, so that its neighbours hardly count. Measured: half a percent."""
    timed = "start = time.process_time()\nimport {}\nprint(time.process_time() - start)"
    output = child("import time", timed.format("transformers"), timed.format("transformers_florence")).stdout
    transformers, ours = map(float, output.split())
    assert ours < 0.10 * transformers


def test_the_import_brings_neither_torch_nor_transformers():
    code = "import transformers_florence\nprint(*{name.partition('.')[0] for name in sys.modules})"
    imported = set(child(code).stdout.split())
    imported -= set(sys.stdlib_module_names) | set(child("print(*sys.modules)").stdout.replace(".", " ").split())
    assert imported == {"transformers_florence"}


def test_names_for_editors_are_the_names_for_python():
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
    stub = {
        alias.asname: (node.module, alias.name, node.level)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub == {name: (module, name, 1) for name, module in transformers_florence.MODULES.items()}
    assert set(stub) == set(transformers_florence.__all__) <= set(dir(transformers_florence))
    for name, (module, _, _) in stub.items():
        assert getattr(transformers_florence, name).__module__ == f"transformers_florence.{module}"
        assert getattr(transformers_florence, module).__name__ == f"transformers_florence.{module}"
    with pytest.raises(AttributeError, match="module 'transformers_florence' has no attribute 'Florence2Model'"):
        transformers_florence.Florence2Model  # noqa: B018


@pytest.mark.parametrize(
    "first",
    [
        # In the middle of whose import transformers imports its Auto classes.
        "import transformers_florence\nfrom transformers import CLIPModel",
        # Ours, a module of the package itself, without a look at the package.
        "from transformers_florence.modeling_florence import FlorenceModel\nimport transformers_florence",
        pytest.param("from transformers import AutoModel\nimport transformers_florence", marks=pytest.mark.slow),
        pytest.param("import transformers_florence\nfrom transformers import pipeline", marks=pytest.mark.slow),
        pytest.param("import transformers_florence\nfrom transformers import Trainer", marks=pytest.mark.slow),
        pytest.param("from transformers_florence import *\nimport transformers_florence", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_florence_whatever_comes_first(first):
    assert child(first, KNOWN).stdout.split("\n")[-2] == "['FlorenceConfig', 'FlorenceModel', 'FlorenceProcessor']"


def test_every_public_name_comes_without_any_extra():
    """With the packages of all extras hidden, as if they had never been installed."""
    code = "import transformers_florence\nprint(*[getattr(transformers_florence, name).__name__ for name in"
    names = child(f"HIDDEN = {extras()}", HIDE, f"{code} transformers_florence.__all__])").stdout.split()
    assert names == transformers_florence.__all__
