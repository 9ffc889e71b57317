"""The house's rules that a reader cannot see in one file: floors, import forms, forbidden calls, no private paths.

Each rule is a function from source text to a list of complaints. It is tried on snippets that break it, then on every
file of the project. Why the rules are what they are: CONTRIBUTING.md, "Floors".
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "transformers_florence"
SCRIPT_FOLDERS = ("examples", "conversion", "benchmarks")

# A file imports from lower floors only; equal floors never see each other. A folder has one floor for all its files.
# Names that do not exist yet hold the floor that they will stand on.
FLOORS = {
    "configuration_florence": 0,
    "window_ops": 0,
    "box_ops": 0,
    "image_checks": 0,
    "import_hook": 0,
    "integrity": 0,
    "video_worker": 0,
    "configuration_florence_detection": 1,
    "configuration_florence_fusion": 1,
    "configuration_florence_video": 1,
    "configuration_florence_zero_shot_detection": 2,
    "losses_fusion": 1,
    "losses_contrastive": 1,
    "losses_detection": 1,
    "layers": 1,
    "video_decoding": 1,
    "image_processing_shared": 1,
    "dynamic_head": 2,
    "fusion": 2,
    "modeling_florence_vision": 2,
    "modeling_florence_text": 2,
    "modeling_florence_fusion": 3,
    "video_layers": 3,
    "modeling_florence": 3,
    "modeling_florence_detection": 4,
    "modeling_florence_captioning": 4,
    "modeling_florence_fusion_heads": 4,
    "modeling_florence_video": 4,
    "modeling_florence_video_retrieval": 5,
    "modeling_florence_zero_shot_detection": 5,
    "image_processing_florence": 5,
    "image_processing_florence_detection": 5,
    "image_processing_pil_florence": 5,
    "loading": 5,
    "model_card": 6,
    "video_processing_florence": 5,
    "processing_florence": 5,
    "tokenization_florence": 5,
    "processing_florence_zero_shot_detection": 6,
    "pipelines": 6,
    "data": 6,
    "evaluation": 7,  # prompts and readers come from data
    "training": 7,
    "registration": 8,
    "__init__": 9,
}

# Modules whose loading runs code from the file, and calls that do the same.
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CODE_RUNNERS = {"eval", "exec", "builtins.eval", "builtins.exec", "torch.hub.load", "pandas.read_pickle"}
UNPICKLERS = {"torch.serialization.add_safe_globals", "torch.serialization.safe_globals"}
PLAIN_UNPICKLER = "conversion/reading.py"  # lets in classes of dictionaries, and makes plain ones of them
YAML_SAFE = {"yaml.safe_load", "yaml.safe_load_all"}

PRIVATE_PATH = re.compile(
    r"(?<![\w.}])/(?:home|Users|root|work|workspaces?|scratch|farm)/[\w.]"  # not the tail of a URL or of a longer path
    r"|\b[A-Z]:\\Users\\\w"
)


def imports_of(source: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import statement, and whether it stands at the top level of the module."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, node in tree.body


def imported_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Dotted names of the modules that an absolute import names; none for a relative one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.level == 0 and node.module else []


def floor_complaints(source: str, name: str, folder: str | None = None) -> list[str]:
    """What breaks the floors in one file of the package.

    Args:
        source: the file's text.
        name: the file's name without `.py`.
        folder: the folder of the package that the file lies in; None for a file of the root.
    """
    place = folder or name
    if place not in FLOORS:
        return [f"'{place}' has no floor: add it to FLOORS"]
    complaints = []
    for node, at_top in imports_of(source):
        line = f"{name}.py:{node.lineno}: {ast.unparse(node)}"
        if any(module.split(".")[0] == PACKAGE.name for module in imported_modules(node)):
            complaints.append(f"{line}: a file of the package imports its siblings by relative name")
        if isinstance(node, ast.Import) or node.level == 0:
            if folder is None and isinstance(node, ast.ImportFrom) and node.module == "__future__":
                complaints.append(f"{line}: transformers reads annotations as classes, not as strings")
            continue
        if not at_top:
            complaints.append(f"{line}: own imports stand at the top of the file")
        if any(alias.name == "*" for alias in node.names):
            complaints.append(f"{line}: name what is imported")
        parts = (node.module or "").split(".")
        if folder is not None and node.level == 1:
            continue  # a neighbour in the same folder
        if not parts[0] or node.level != (1 if folder is None else 2) or (folder is None and len(parts) > 1):
            form = "from .name import x" if folder is None else "from ..name import x"
            complaints.append(f"{line}: the only form of an import from the root is `{form}`")
        elif parts[0] not in FLOORS:
            complaints.append(f"{line}: '{parts[0]}' has no floor: add it to FLOORS")
        elif FLOORS[parts[0]] >= FLOORS[place]:
            complaints.append(f"{line}: floor {FLOORS[place]} cannot see floor {FLOORS[parts[0]]}")
    return complaints


def script_import_complaints(source: str, name: str) -> list[str]:
    """Imports of the script folders or of the tests: scripts end in a command line, nothing stands on them."""
    return [
        f"{name}:{node.lineno}: {module}: scripts and tests are not a library"
        for node, _ in imports_of(source)
        for module in imported_modules(node)
        if module.split(".")[0] in (*SCRIPT_FOLDERS, "tests")
    ]


def alias_table(tree: ast.AST) -> dict[str, str]:
    """Local name -> the dotted name that it was imported from, so that `import numpy as np` hides nothing."""
    table = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]  # `import a.b` binds `a`, `import a.b as c` binds `a.b`
                table[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                table[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return table


def dotted_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """`np.lib.load` -> `numpy.lib.load`; empty for what is no chain of plain names."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = dotted_name(node.value, aliases)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


def unsafe_complaints(source: str, name: str) -> list[str]:
    """Everything that lets a file's content run as code: pickles, eval, exec, full YAML, remote code."""
    tree = ast.parse(source)
    aliases = alias_table(tree)
    complaints = [
        f"{name}:{node.lineno}: {module} runs code from what it loads"
        for node, _ in imports_of(source)
        for module in imported_modules(node)
        if module.split(".")[0] in PICKLES
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        line = f"{name}:{node.lineno}: {ast.unparse(node)[:80]}"
        called = dotted_name(node.func, aliases)
        constants = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            for keyword in node.keywords
            if keyword.arg is not None
        }
        if called in CODE_RUNNERS:
            complaints.append(f"{line}: runs its argument as code")
        if called in UNPICKLERS and name != PLAIN_UNPICKLER:
            complaints.append(f"{line}: lets torch.load build more than tensors")
        if re.fullmatch(r"yaml\.\w*load\w*", called) and called not in YAML_SAFE:
            complaints.append(f"{line}: only yaml.safe_load")
        if called == "torch.load" and "weights_only" not in constants:
            complaints.append(f"{line}: torch.load needs a literal weights_only=True")
        if constants.get("weights_only", True) is not True:
            complaints.append(f"{line}: weights_only must be a literal True")
        if constants.get("allow_pickle", False) is not False:
            complaints.append(f"{line}: allow_pickle must be a literal False")
        if constants.get("trust_remote_code", False) is not False:
            complaints.append(f"{line}: remote code is never trusted")
    return complaints


def path_complaints(text: str, name: str) -> list[str]:
    """Absolute paths that only exist on the machine of whoever wrote them."""
    return [
        f"{name}:{number}: {line.strip()[:100]}"
        for number, line in enumerate(text.splitlines(), start=1)
        if PRIVATE_PATH.search(line)
    ]


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def project_texts() -> Iterator[tuple[str, str]]:
    """Name and text of each file that git tracks or would add; binary files are left out."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs git and a clone, to know which files belong to the project: {error}")
    for name in filter(None, listing.split("\0")):
        path = ROOT / name
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content:
            yield name, content.decode("utf-8")


@pytest.mark.parametrize(
    ("source", "name", "folder"),
    [
        ("from .losses_detection import x", "layers", None),  # an equal floor
        ("from .modeling_florence import x", "layers", None),  # a higher floor
        ("from .layers import x", "layers", None),  # itself
        ("from . import layers", "modeling_florence", None),
        ("from .data.prompts import x", "modeling_florence", None),
        ("from .data import x", "modeling_florence", None),
        ("from ..transformers_florence import x", "modeling_florence", None),
        ("from .layers import *", "modeling_florence", None),
        ("from .nowhere import x", "modeling_florence", None),
        ("import transformers_florence.layers", "modeling_florence", None),
        ("from transformers_florence.layers import x", "modeling_florence", None),
        ("from transformers_florence import x", "modeling_florence", None),
        ("def build():\n    from .layers import x", "modeling_florence", None),
        ("try:\n    from .layers import x\nexcept ImportError:\n    pass", "modeling_florence", None),
        ("from __future__ import annotations", "modeling_florence", None),
        ("x = 1", "unheard_of", None),
        ("x = 1", "file", "unheard_of"),
        ("from ..training.engine import x", "datasets", "data"),
        ("from ..evaluation import x", "datasets", "data"),
        ("from .. import x", "datasets", "data"),
        ("from transformers_florence.layers import x", "datasets", "data"),
    ],
)
def test_a_broken_floor_is_noticed(source: str, name: str, folder: str | None):
    assert len(floor_complaints(source, name, folder)) == 1


@pytest.mark.parametrize(
    ("source", "name", "folder"),
    [
        ("import torch\nfrom torch import nn\nfrom .window_ops import x", "layers", None),
        ("from .layers import (\n    a,\n    b,\n)", "modeling_florence", None),
        ("from .modeling_florence import x\nfrom .training import y", "__init__", None),
        ("from __future__ import annotations\nfrom .prompts import x\nfrom ..layers import y", "datasets", "data"),
        ("from ..data.datasets import x", "engine", "training"),
        ("def load():\n    import datasets", "datasets", "data"),  # an optional dependency may wait
    ],
)
def test_a_sound_import_passes(source: str, name: str, folder: str | None):
    assert floor_complaints(source, name, folder) == []


@pytest.mark.parametrize(
    "source",
    [
        "import examples.demo",
        "from examples import demo",
        "from conversion.swin import x",
        "def run():\n    import benchmarks.vision_tower",
        "from tests.conftest import SHARED",
    ],
)
def test_an_imported_script_is_noticed(source: str):
    assert len(script_import_complaints(source, "a.py")) == 1
    assert script_import_complaints("import torch\nfrom .layers import examples", "a.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib as storage",
        "eval('1')",
        "exec('1')",
        "import builtins\nbuiltins.eval('1')",
        "from builtins import eval as harmless\nharmless('1')",
        "import torch\ntorch.load('a.pt')",
        "import torch as t\nt.load('a.pt', map_location='cpu')",
        "from torch import load\nload('a.pt')",
        "import torch\ntorch.load('a.pt', weights_only=False)",
        "import torch\ntorch.load('a.pt', weights_only=safe)",
        "import torch\ntorch.load('a.pt', **options)",
        "import torch\ntorch.serialization.add_safe_globals([Evil])",
        "from torch.serialization import safe_globals\nwith safe_globals([Evil]):\n    pass",
        "import torch\ntorch.hub.load('owner/name', 'model')",
        "import yaml\nyaml.load(stream, Loader=yaml.SafeLoader)",
        "import yaml\nyaml.unsafe_load(stream)",
        "from yaml import full_load\nfull_load(stream)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=True)",
        "import numpy as np\nnp.load('a.npy', allow_pickle=flag)",
        "import pandas as pd\npd.read_pickle('a')",
        "AutoModel.from_pretrained('a', trust_remote_code=True)",
        "Model.from_pretrained('a', weights_only=False)",
    ],
)
def test_an_unsafe_call_is_noticed(source: str):
    assert len(unsafe_complaints(source, "a.py")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "model.eval()",
        "import torch\ntorch.load('a.pt', weights_only=True)",
        "from safetensors.torch import load_file\nload_file('a')",
        "import json\njson.load(stream)",
        "import yaml\nyaml.safe_load(stream)",
        "import numpy as np\nnp.load('a.npy')",
        "import numpy as np\nnp.load('a.npy', allow_pickle=False)",
    ],
)
def test_a_safe_call_passes(source: str):
    assert unsafe_complaints(source, "a.py") == []


@pytest.mark.parametrize("place", ["home/jo/florence", "Users/jo/florence", "root/.cache", "work/a", "workspace/a"])
def test_a_private_path_is_noticed(place: str):
    assert path_complaints(f'data = "/{place}"', "a.py")
    assert path_complaints(f"see /{place}", "a.md")
    assert not path_complaints(f"see https://example.org/{place} and ./{place} and data/{place}", "a.md")
    assert path_complaints("C:" + r"\Users\jo", "a.md")


def test_files_stand_on_their_floors():
    files = python_files(PACKAGE)
    assert files, f"no package in {PACKAGE}"
    complaints = []
    for path in files:
        folders = path.relative_to(PACKAGE).parts[:-1]
        assert len(folders) <= 1, f"{path.name} lies two folders deep: files travel, folders stay, and are flat"
        complaints += floor_complaints(path.read_text("utf-8"), path.stem, *folders)
    assert complaints == []


def test_nothing_stands_on_the_scripts():
    folders = [PACKAGE, *(ROOT / folder for folder in SCRIPT_FOLDERS)]
    complaints = [
        complaint
        for path in python_files(*folders)
        for complaint in script_import_complaints(path.read_text("utf-8"), str(path.relative_to(ROOT)))
    ]
    assert complaints == []


def test_no_file_runs_what_it_loads():
    folders = [ROOT / "src", *(ROOT / folder for folder in SCRIPT_FOLDERS)]
    complaints = [
        complaint
        for path in python_files(*folders)
        for complaint in unsafe_complaints(path.read_text("utf-8"), str(path.relative_to(ROOT)))
    ]
    assert complaints == []


def test_no_file_names_a_path_of_someones_machine():
    complaints = [complaint for name, text in project_texts() for complaint in path_complaints(text, name)]
    assert complaints == []
