"""ModelTesterMixin and, where they apply, the backbone and training mixins on every model class of the table."""

import unittest

from .adaptations import build
from .entries import CONFIGS, MODELS
from .loader import load

for _entry in MODELS:
    _case = build(_entry)
    globals()[_case.__name__] = _case
del _case


def _config_case(config_class, fields):
    class Case(unittest.TestCase):
        model_tester = None

        def test_config(self):
            tester = load("test_configuration_common").ConfigTester(
                self, config_class=config_class, has_text_modality="vocab_size" in fields, **fields
            )
            tester.run_common_tests()

    name = f"{config_class.__name__}Test"
    Case.__name__ = Case.__qualname__ = name
    return Case


for _config_class, _fields in CONFIGS:
    globals()[f"{_config_class.__name__}Test"] = _config_case(_config_class, _fields)
