"""The learnt tokenizer with which processors, pipelines and the tokenizer itself are tested."""

from .entries import TOKENIZER

# Enough English for the mixins' sentences to be cut into few tokens.
CORPUS = [
    "This is a test of a sentence that is long enough to be cut into several tokens",
    "lower newer wider slower, a photo of a cat and a photo of a dog",
    "The quick brown fox jumps over the lazy dog and runs away from it again",
    "Hello there, how are you doing in this beautiful old street with its tall houses",
]
VOCABULARY = 640  # nearly all that can be learnt from as few sentences
CONTEXT = 2048  # the processor mixin pads to lengths far above Florence's context


def tokenizer(context: int = CONTEXT):
    """A tokenizer whose vocabulary was learnt from `CORPUS`."""
    return TOKENIZER.train_new(CORPUS * 4, vocab_size=VOCABULARY, model_max_length=context)


__all__ = ["CONTEXT", "tokenizer"]
