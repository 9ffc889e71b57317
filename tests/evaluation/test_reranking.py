"""The fusion as retrieval's second stage: its scores are the model's, and they decide among what was found."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from tests.oracles import randomize
from tests.tiny_fusion import tiny_fusion_config, tiny_fusion_processor
from transformers_florence.evaluation.reranking import ImageTextMatcher
from transformers_florence.evaluation.retrieval import evaluate_retrieval
from transformers_florence.modeling_florence_fusion_heads import FlorenceForImageTextRetrieval

TEXTS = ["a red one", "blue", "something green", "a dog", "nothing"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for color in ("red", "blue", "green"):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
    return [str(tmp_path / f"{color}.png") for color in ("red", "blue", "green")]


@torch.no_grad()
def test_scores_are_the_models_and_each_tower_sees_its_part_once(files):
    model, processor = randomize(FlorenceForImageTextRetrieval(tiny_fusion_config())).eval(), tiny_fusion_processor()
    expected = torch.zeros(len(files), len(TEXTS))
    for row, file in enumerate(files):
        for column, text in enumerate(TEXTS):
            logits = model(**processor(images=file, text=text, return_tensors="pt")).logits[0]
            expected[row, column] = logits[1] - logits[0]
    seen = []
    model.image_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    matcher = ImageTextMatcher(model, processor, files, TEXTS, batch_size=2)
    pictures, texts = torch.cartesian_prod(torch.arange(3), torch.arange(5)).unbind(1)
    assert_close(matcher(pictures, texts), expected.flatten(), rtol=0, atol=1e-4)
    assert_close(matcher(pictures.flip(0), texts.flip(0)), expected.flatten().flip(0), rtol=0, atol=1e-4)
    assert seen == [2, 1]


@torch.no_grad()
def test_the_second_stage_decides_among_what_was_found(files):
    """With everything on the list, recall is that of the matching scores alone, whatever the vectors say."""
    model, processor = randomize(FlorenceForImageTextRetrieval(tiny_fusion_config())).eval(), tiny_fusion_processor()
    matcher = ImageTextMatcher(model, processor, files, TEXTS[:3])
    scores = matcher(*torch.cartesian_prod(torch.arange(3), torch.arange(3)).unbind(1)).view(3, 3)
    images, texts = (F.normalize(torch.randn(3, 4), dim=-1) for _ in range(2))
    found = evaluate_retrieval(images, texts, torch.arange(3), matching=matcher, top_k=3)
    right = torch.arange(3)
    assert found.image_to_text["recall_1"] == pytest.approx((scores.argmax(1) == right).float().mean().item())
    assert found.text_to_image["recall_1"] == pytest.approx((scores.argmax(0) == right).float().mean().item())


def test_nothing_to_match_is_refused(files):
    model, processor = FlorenceForImageTextRetrieval(tiny_fusion_config()), tiny_fusion_processor()
    for pictures, texts, got in (([], TEXTS, "0 and 5"), (files, [], "3 and 0")):
        with pytest.raises(ValueError, match=f"expected pictures and texts, got {got}"):
            ImageTextMatcher(model, processor, pictures, texts)
