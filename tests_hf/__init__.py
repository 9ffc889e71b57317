"""transformers' own common test suite, run on every public class of this package: `python -m tests_hf`."""
