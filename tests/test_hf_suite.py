"""The runner of transformers' own test suite (`python -m tests_hf`): what of it needs no download."""

import ast
import io
import re
import subprocess
import sys
import tarfile
import unittest
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import BaseVideoProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import transformers_florence
from tests_hf import adaptations, entries, loader, pipelines, sdist
from tests_hf.adaptations import Overfit, build
from tests_hf.entries import (
    BATCH,
    CONFIGS,
    DETECTION_IMAGE_PROCESSORS,
    IMAGE_PROCESSORS,
    MODELS,
    OPEN_SET_PROCESSOR,
    PROCESSOR,
    TOKENIZER,
    VIDEO_PROCESSOR,
)
from tests_hf.reasons import ADAPTED, SKIPS, explain, is_sentence, own
from tests_hf.report import FAILED, PASSED, SKIPPED, Collector, Result, summary, unexplained
from tests_hf.sdist import FetchError, fetch, unpack

FOLDER = Path(entries.__file__).parent
RELEASE = "9.9.9"
KNOWN_SAID = "test requires accelerator"


# The table


def public(kind: type) -> set[type]:
    """The public classes of a kind."""
    values = (getattr(transformers_florence, name) for name in transformers_florence.__all__)
    return {value for value in values if isinstance(value, type) and issubclass(value, kind)}


def test_every_public_class_has_an_entry():
    assert {entry.model_class for entry in MODELS} == public(PreTrainedModel)
    assert {config_class for config_class, _ in CONFIGS} == public(PreTrainedConfig)
    processors = {*IMAGE_PROCESSORS.values(), *DETECTION_IMAGE_PROCESSORS.values(), VIDEO_PROCESSOR}
    assert processors == public(BaseImageProcessor) | public(BaseVideoProcessor)
    assert {PROCESSOR, OPEN_SET_PROCESSOR} == public(ProcessorMixin)
    assert {TOKENIZER} == public(PreTrainedTokenizerBase)


@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.model_class.__name__)
def test_an_entry_is_small_and_what_it_declares_is_what_the_model_gives(entry):
    config = entry.config()
    model = entry.model_class._from_config(config, attn_implementation="eager")
    assert model.num_parameters() < 1_000_000  # the limit of transformers' suite
    inputs = entry.inputs(config)
    assert all(len(value) == BATCH for value in inputs.values())
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    outputs = outputs.get("vision_model_output", outputs.get("video_model_output", outputs))
    if entry.hidden_shapes:
        assert [tuple(state.shape) for state in outputs.hidden_states] == [(BATCH, *s) for s in entry.hidden_shapes]
        expected = [(BATCH * windows, *shape) for windows, *shape in entry.attention_shapes]
        assert [tuple(weights.shape) for weights in outputs.attentions] == expected


@pytest.mark.parametrize("make", ["labels", "overfit"])
@pytest.mark.parametrize("entry", MODELS, ids=lambda entry: entry.model_class.__name__)
def test_labels_of_an_entry_give_a_loss(entry, make):
    config = entry.config()
    if getattr(entry, make) is not None:
        batch = {**entry.inputs(config), **getattr(entry, make)(config)}
        assert entry.model_class(config)(**batch).loss.requires_grad


def test_every_task_of_an_entry_has_a_check():
    assert set(pipelines.served()) <= set(pipelines.TASKS)
    assert pipelines.served()["image-classification"] == (transformers_florence.FlorenceForImageClassification,)


# Reasons


def test_every_reason_is_a_sentence():
    for skip in SKIPS:
        assert is_sentence(skip.reason), skip
        assert skip.said.strip(".*^$"), f"{skip} takes any skip for its own"
        # Only the machine may be a reason for tests of any name.
        assert skip.tests != r"test_\w+" or skip.said.startswith("^test requires "), skip


@pytest.mark.parametrize(
    "said",
    ["", "It fails.", "test requires accelerator and more", "a test requires accelerator", own("It fails."), own("")],
)
def test_a_skip_that_no_line_explains_makes_the_run_fail_and_is_named(said):
    assert explain("test_save_load", said) is None
    results = {"f.py::A::test_x": Result(), "f.py::B::test_save_load": Result(SKIPPED, [said])}
    text, good = summary(results)
    assert not good and "f.py::B::test_save_load" in text and (said or "no reason given") in text


def test_a_skip_of_which_one_subtest_is_unexplained_makes_the_run_fail():
    results = {"f.py::A::test_x": Result(SKIPPED, [KNOWN_SAID, "because"])}
    assert unexplained(results) == ["f.py::A::test_x: because"]


def test_an_explained_skip_is_printed_once_with_its_reason_and_all_classes_are_counted():
    results = {f"f.py::{name}::test_cpu_offload": Result(SKIPPED, [KNOWN_SAID]) for name in "ABC"}
    results |= {"f.py::A::test_determinism": Result(), "f.py::B::test_y[one]": Result()}
    text, good = summary(results)
    assert good
    assert text.count(explain("test_cpu_offload", KNOWN_SAID)) == 1 and "test_cpu_offload (3)" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if re.match(r"(A|B|C|all) ", line)}
    assert rows == {
        "A": ["2", "1", "0", "1", "50.0%"],
        "B": ["2", "1", "0", "1", "50.0%"],
        "C": ["1", "0", "0", "1", "0.0%"],
        "all": ["5", "2", "0", "3", "40.0%"],
    }


@pytest.mark.parametrize("results", [{}, {"f.py::A::test_cpu_offload": Result(SKIPPED, [KNOWN_SAID])}])
def test_a_run_in_which_nothing_passed_is_not_good(results):
    assert not summary(results)[1]


def test_every_overridden_test_is_listed_as_adapted():
    """Only the tests that the sources define, outside of transformers' mixins, and only those that are not skipped."""
    written = set()
    for name in ("adaptations.py", "test_processors.py"):
        for node in ast.walk(ast.parse((FOLDER / name).read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                skipped = any("skip" in ast.unparse(decorator) for decorator in node.decorator_list)
                written |= set() if skipped else {node.name}
    assert written == set(ADAPTED)


# Counting


def phase(outcome: str, longrepr=None, node: str = "f.py::A::test_x") -> SimpleNamespace:
    return SimpleNamespace(nodeid=node, outcome=outcome, longrepr=longrepr)


@pytest.mark.parametrize(
    "phases, outcome, said",
    [
        ([phase(PASSED)] * 3, PASSED, []),
        ([phase(PASSED), phase(FAILED, "why"), phase(PASSED)], FAILED, []),
        ([phase(PASSED), phase(PASSED), phase(FAILED, "teardown")], FAILED, []),
        ([phase(SKIPPED, ("f.py", 3, "Skipped: no need")), phase(PASSED)], SKIPPED, ["no need"]),
        # A subtest's reports come before that of its test, which passes.
        ([phase(SKIPPED, ("f.py", 3, "Skipped: half")), phase(PASSED)], SKIPPED, ["half"]),
        ([phase(FAILED, "subtest"), phase(SKIPPED, ("f.py", 3, "Skipped: other")), phase(PASSED)], FAILED, ["other"]),
    ],
)
def test_of_phases_and_subtests_the_worst_counts(phases, outcome, said):
    collector = Collector()
    for each in phases:
        collector.pytest_runtest_logreport(each)
    assert collector.results == {"f.py::A::test_x": Result(outcome, said)}
    assert summary(collector.results)[1] == (outcome == PASSED)


def test_a_file_that_cannot_be_read_is_a_failure():
    collector = Collector()
    collector.pytest_collectreport(phase(PASSED, node="good.py"))
    collector.pytest_collectreport(phase(FAILED, "SyntaxError", node="bad.py"))
    assert {node: result.outcome for node, result in collector.results.items()} == {"bad.py": FAILED}


# Test cases from entries


class FakeMixin:
    def test_one(self):
        self.fail("ran")

    def test_training(self):
        pass


def fake_upstream(monkeypatch) -> None:
    mixins = {name: type(name, (), {}) for name in ("BackboneTesterMixin", "TrainingTesterMixin")}
    module = SimpleNamespace(ModelTesterMixin=FakeMixin, MODEL_MAPPING_NAMES={}, **mixins)
    monkeypatch.setattr(adaptations, "load", lambda name: module)


def test_an_entry_becomes_a_test_case_with_the_mixins_it_asks_for(monkeypatch):
    fake_upstream(monkeypatch)
    cases = {entry.model_class: build(entry) for entry in MODELS}
    names = {model_class: {base.__name__ for base in case.__mro__} for model_class, case in cases.items()}
    assert all({"FakeMixin", "TestCase"} <= bases for bases in names.values())
    backbones = {model_class for model_class, bases in names.items() if "BackboneTesterMixin" in bases}
    assert backbones == {transformers_florence.FlorenceBackbone}
    for entry in MODELS:
        assert issubclass(cases[entry.model_class], Overfit) == (entry.overfit is not None)
        assert cases[entry.model_class].all_model_classes == (entry.model_class,)


def test_a_test_that_an_entry_calls_meaningless_is_skipped_with_that_reason(monkeypatch):
    fake_upstream(monkeypatch)
    entry = MODELS[1]
    reason = "Nothing in this class could be tested by it."
    case = build(
        entries.ModelEntry(entry.model_class, entry.config, entry.inputs, "text", meaningless={"test_one": reason})
    )
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    ((_, said),) = result.skipped
    assert explain("test_one", said) == reason
    assert result.testsRun == 2 and result.wasSuccessful()


def test_a_class_that_generates_is_refused(monkeypatch):
    fake_upstream(monkeypatch)
    monkeypatch.setattr(transformers_florence.FlorenceTextModel, "can_generate", classmethod(lambda cls: True))
    with pytest.raises(NotImplementedError, match="FlorenceTextModel generates"):
        build(MODELS[1])


# The source distribution


def archive(path: Path, release: str = RELEASE, drop: tuple[str, ...] = ()) -> Path:
    """A source distribution in miniature, with two members that would leave the folder."""
    root = f"transformers-{release}"
    files = {
        f"{root}/tests/test_modeling_common.py": "from .other import VALUE\n",
        f"{root}/tests/other.py": "VALUE = 3\n",
        f"{root}/tests/deep/test_x.py": "",
        f"{root}/src/transformers/__init__.py": "",
        f"{root}/PKG-INFO": f"Metadata-Version: 2.1\nName: transformers\nVersion: {release}\n",
        f"{root}/LICENSE": "Apache",
        f"{root}/../../evil.py": "",
        "/tmp/evil.py": "",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            if not name.endswith(drop or ("\0",)):
                member = tarfile.TarInfo(name)
                member.size = len(text)
                tar.addfile(member, io.BytesIO(text.encode()))
        link = tarfile.TarInfo(f"{root}/tests/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_only_the_tests_are_unpacked(tmp_path):
    folder = tmp_path / "cache" / "transformers"
    unpack(archive(tmp_path / "a.tar.gz"), RELEASE, folder)
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert written == {"tests/test_modeling_common.py", "tests/other.py", "PKG-INFO", "LICENSE"}
    assert [file.name for file in folder.parent.iterdir()] == ["transformers"]


@pytest.mark.parametrize(
    "release, drop, message",
    [
        ("9.9.8", (), "expected transformers 9.9.9, got another release"),
        (RELEASE, ("PKG-INFO",), "expected transformers 9.9.9"),
        (RELEASE, ("test_modeling_common.py",), "expected tests/test_modeling_common.py"),
    ],
)
def test_another_release_or_one_without_tests_is_refused(tmp_path, release, drop, message):
    with pytest.raises(FetchError, match=message):
        unpack(archive(tmp_path / "a.tar.gz", release, drop), RELEASE, tmp_path / "cache" / "x")
    assert not (tmp_path / "cache" / "x").exists()


@pytest.mark.parametrize("length", [0, 1, 100, 250])
def test_a_truncated_archive_is_refused_and_leaves_nothing(tmp_path, length):
    whole = archive(tmp_path / "a.tar.gz").read_bytes()
    assert length < len(whole)
    (tmp_path / "b.tar.gz").write_bytes(whole[:length])
    with pytest.raises(FetchError, match="b.tar.gz"):
        unpack(tmp_path / "b.tar.gz", RELEASE, tmp_path / "cache" / "x")
    assert not list((tmp_path / "cache").iterdir())


def fake_pip(monkeypatch, returncode: int = 0, stderr: str = "") -> list:
    """pip that writes a source distribution where it is told to; the commands it was called with."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if not returncode:
            archive(Path(command[command.index("--dest") + 1]) / f"transformers-{RELEASE}.tar.gz")
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(sdist.subprocess, "run", run)
    return commands


def test_it_is_fetched_once_as_source_without_dependencies(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch)
    folder = fetch(tmp_path / "cache", RELEASE)
    assert fetch(tmp_path / "cache", RELEASE) == folder and (folder / "tests" / "other.py").is_file()
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == f"transformers=={RELEASE}"
    assert "--no-deps" in command and command[command.index("--no-binary") + 1] == "transformers"
    assert (tmp_path / "cache" / ".gitignore").read_text() == "*\n"


def test_the_installed_release_is_the_one_that_is_fetched(tmp_path, monkeypatch):
    commands = fake_pip(monkeypatch, returncode=1)
    with pytest.raises(FetchError):
        fetch(tmp_path)
    assert commands[0][-1] == f"transformers=={sdist.version('transformers')}"


def test_when_pip_fails_its_words_are_in_the_error(tmp_path, monkeypatch):
    fake_pip(monkeypatch, returncode=1, stderr="No matching distribution")
    with pytest.raises(FetchError, match=r"(?s)9.9.9.*No matching distribution"):
        fetch(tmp_path, RELEASE)


# The loader

MODULE = """
import sys
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.utils import direct_transformers_import

from .exporters.test_export import ExportTesterMixin
from .generation.test_utils import GenerationTesterMixin
from .utils.test_configuration_utils import config_common_kwargs

sys.path.append("/a/folder/that/is/not/there")
from fetch_hub_objects_for_ci import url_to_local_path

library = direct_transformers_import("a path")
"""


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """A module like transformers' mixins, loaded by the loader from a folder of its own."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_mixin.py").write_text(MODULE)
    monkeypatch.setattr(loader, "PACKAGE", "florence_hf_fake")
    yield loader.load("test_mixin", tmp_path)
    for name in [name for name in sys.modules if name.startswith("florence_hf_fake")]:
        del sys.modules[name]


def test_a_module_that_imports_what_is_missing_is_loaded_and_leaves_no_trace(loaded):
    assert loaded.ExportTesterMixin.__module__ == loaded.GenerationTesterMixin.__module__ == "tests_hf.stand_ins"
    assert "fetch_hub_objects_for_ci" not in sys.modules and "/a/folder/that/is/not/there" not in sys.path
    assert [name for name in sys.modules if name.startswith("florence_hf_fake.")] == ["florence_hf_fake.test_mixin"]


def test_registered_classes_stand_in_the_tables_of_the_module_and_not_in_the_library(loaded):
    assert loaded.MODEL_MAPPING_NAMES["florence"] == "FlorenceModel"
    assert loaded.MODEL_MAPPING_NAMES["clip"] == MODEL_MAPPING_NAMES["clip"]
    heads = loaded.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    assert heads["florence"] == heads["florence_vision_model"] == "FlorenceForImageClassification"
    assert "florence" not in MODEL_MAPPING_NAMES


def test_classes_are_found_by_name_in_this_package_and_in_transformers(loaded):
    assert loaded.library.FlorenceTokenizer is TOKENIZER
    assert loaded.library.CLIPConfig.model_type == "clip"
    with pytest.raises(AttributeError):
        loaded.library.NoSuchName  # noqa: B018


def test_a_picture_on_the_hub_becomes_a_local_one_always_the_same(loaded):
    first = loaded.url_to_local_path("https://host/a.jpg")
    assert first == loaded.url_to_local_path("https://host/a.jpg") != loaded.url_to_local_path("https://host/b.png")
    pixels = next(iter(IMAGE_PROCESSORS.values()))()(first, return_tensors="pt")["pixel_values"]
    assert pixels.std() > 0.1
    assert loaded.url_to_local_path("https://host/a.mp4") == "https://host/a.mp4"


def test_the_export_stand_in_sees_a_wrong_program(loaded, monkeypatch):
    """A program that gives something else than the model must fail; the right one passes in the suite itself."""
    entry = MODELS[0]

    class Case(loaded.ExportTesterMixin, unittest.TestCase):
        all_model_classes = (entry.model_class,)
        model_tester = adaptations.Tester(entry)

        def _prepare_for_class(self, inputs, model_class):
            return inputs

        def runTest(self):
            self.test_export()

    class Exporter:
        def export(self, model, inputs, config):
            def program(**given):
                outputs = model(**given)
                outputs.pooler_output = outputs.pooler_output + self.error
                return outputs

            return program

    import tests_hf.stand_ins

    monkeypatch.setattr(tests_hf.stand_ins, "DynamoExporter", Exporter)
    for error, good in ((0.0, True), (1e-3, False)):
        Exporter.error = error
        result = unittest.TestResult()
        with torch.no_grad():
            Case().run(result)
        assert result.wasSuccessful() == good, result.errors
