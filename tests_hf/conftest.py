"""Environment and markers of transformers' tests. Read by `python -m tests_hf` only, never by `make test`."""

import os
import tempfile

_hf_home = tempfile.TemporaryDirectory(prefix="florence-hf-home-")  # removed when the process ends
os.environ["HF_HOME"] = _hf_home.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RUN_SLOW"] = "yes"  # the slow ones either need an accelerator or are quick here

MARKERS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_pipeline_test",
    "is_training_test",
    "run_first",
    "torch_compile_test",
)


def pytest_configure(config) -> None:
    for name in MARKERS:
        config.addinivalue_line("markers", f"{name}: of transformers' test suite")
