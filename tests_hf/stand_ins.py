"""What transformers' mixins import and the source distribution leaves out: each written anew, each doing its work."""

import copy
import tempfile
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.exporters.exporter_dynamo import DynamoConfig, DynamoExporter
from transformers.testing_utils import torch_device

import transformers_florence

EXPORT_TOLERANCE = 1e-5
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png")
_downloads = tempfile.TemporaryDirectory(prefix="florence-hf-pictures-")  # removed when the process ends


def picture_for(url: str) -> str:
    """A local picture in place of one on the Hub, the same for the same address; other files keep their address.

    Smooth colours with a few edges, 640 x 480, as a photograph has: backends resize noise too differently to compare.
    """
    if not url.lower().endswith(PICTURE_ENDINGS):
        return url
    file = Path(_downloads.name) / f"{zlib.crc32(url.encode()):08x}.png"
    if not file.is_file():
        random = np.random.default_rng(zlib.crc32(url.encode()))
        rows, columns = np.mgrid[0:480, 0:640]
        waves = [np.sin(rows / random.uniform(40, 90) + columns / random.uniform(40, 90)) for _ in range(3)]
        pixels = (np.stack(waves, axis=-1) + 1) * 127.5  # (480, 640, 3)
        for _ in range(6):
            top, left = random.integers(0, 400), random.integers(0, 560)
            pixels[top : top + 80, left : left + 80] = random.integers(0, 256, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return str(file)


def tensors_in(outputs, path: str = "") -> dict[str, torch.Tensor]:
    """The tensors of nested outputs by where they lie, such as `"feature_maps.0"`."""
    if isinstance(outputs, torch.Tensor):
        return {path: outputs}
    if not isinstance(outputs, dict | list | tuple):
        return {}
    items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    return {name: tensor for key, value in items for name, tensor in tensors_in(value, f"{path}.{key}").items()}


class ExportTesterMixin:
    """torch.export through transformers' exporter; upstream's mixin of this name is not in the source distribution."""

    test_torch_exportable = True

    def check_export(self, dynamic_batch: bool) -> None:
        """The exported program gives what the model gives, on the sample inputs or on a smaller batch of them."""
        for model_class in self.all_model_classes:
            torch.manual_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(copy.deepcopy(config)).to(torch_device).eval()
            inputs = self._prepare_for_class(inputs, model_class)
            inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            shapes = {name: {0: torch.export.Dim.AUTO} for name in inputs} if dynamic_batch else None
            exported = DynamoExporter().export(
                model, copy.deepcopy(inputs), config=DynamoConfig(dynamic=dynamic_batch, dynamic_shapes=shapes)
            )
            if dynamic_batch:
                inputs = {name: value[:-1] for name, value in inputs.items()}
            with torch.no_grad():
                expected, got = model(**inputs), exported(**inputs)
            expected, got = tensors_in(expected), tensors_in(got)
            self.assertTrue(expected, f"{model_class.__name__} returns no tensor to compare")
            self.assertEqual(list(got), list(expected))
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, atol=EXPORT_TOLERANCE, rtol=EXPORT_TOLERANCE)

    def test_export(self) -> None:
        self.check_export(dynamic_batch=False)

    def test_export_with_dynamic_batch(self) -> None:
        self.check_export(dynamic_batch=True)


class GenerationTesterMixin:
    """A name that upstream's `test_generation_tester_mixin_inheritance` asks for: no class here generates.

    Its tests are not in the source distribution. `adaptations.build` refuses a class that generates until they are
    written here.
    """


class Library:
    """This package and transformers under one roof: where mixins look classes up by name."""

    def __getattr__(self, name: str):
        return getattr(transformers_florence if hasattr(transformers_florence, name) else transformers, name)


def _module(name: str, **contents) -> ModuleType:
    module = ModuleType(name, "A stand-in of tests_hf.")
    module.__dict__.update(contents)
    return module


# Settings that every configuration must take and keep; values differ from the defaults, so that dropping one shows.
COMMON_SETTINGS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 5,
    "architectures": ["FlorenceModel"],
    "id2label": {0: "cat", 1: "dog"},
    "label2id": {"cat": 0, "dog": 1},
    "name_or_path": "a/name",
    "problem_type": "regression",
}


def missing_modules(package: str) -> dict[str, ModuleType]:
    """What the mixins import and the source distribution lacks: module name -> module."""
    return {
        "fetch_hub_objects_for_ci": _module("fetch_hub_objects_for_ci", url_to_local_path=picture_for),
        f"{package}.exporters": _module("exporters", __path__=[]),
        f"{package}.exporters.test_export": _module("test_export", ExportTesterMixin=ExportTesterMixin),
        f"{package}.generation": _module("generation", __path__=[]),
        f"{package}.generation.test_utils": _module("test_utils", GenerationTesterMixin=GenerationTesterMixin),
        f"{package}.utils": _module("utils", __path__=[]),
        f"{package}.utils.test_configuration_utils": _module(
            "test_configuration_utils", config_common_kwargs=COMMON_SETTINGS
        ),
    }


__all__ = ["ExportTesterMixin", "GenerationTesterMixin", "Library", "missing_modules", "picture_for"]
