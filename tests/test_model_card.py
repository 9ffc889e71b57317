"""A card written is a card read: the Hub's metadata, the example that loads, the table of what was measured."""

import pytest
from huggingface_hub import EvalResult, ModelCard
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedModel

import transformers_florence
from tests.tiny_florence import tiny_config, tiny_text_config, tiny_vision_config
from tests.tiny_heads import HEADS, tiny_head
from transformers_florence import (
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionConfig,
    FlorenceVisionModel,
    create_model_card,
    model_card,
)

TOP1 = EvalResult(
    task_type="zero-shot-image-classification",
    dataset_type="me/pictures",
    dataset_name="Pictures",
    dataset_split="test",
    metric_type="accuracy",
    metric_name="top-1",
    metric_value=0.75,
)
RECALL = EvalResult("image-text-retrieval", "me/pictures", "Pictures", "recall", 0.5)


def test_a_card_says_what_the_hub_asks_for(tmp_path):
    model = FlorenceModel(tiny_config())
    card = create_model_card(
        model,
        "me/florence-tiny",
        results=[TOP1, RECALL],
        description="Drawings: {cats} and --- dogs.",
        license="apache-2.0",
        language="en",
        datasets=["me/pictures"],
        tags=["drawings"],
    )
    card.save(tmp_path / "README.md")
    read = ModelCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == card.data.to_dict()
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert read.data.tags == ["florence", "drawings"] and read.data.metrics == ["accuracy", "recall"]
    assert (read.data.license, read.data.language, read.data.datasets) == ("apache-2.0", "en", ["me/pictures"])
    assert read.data.model_name == "florence-tiny"
    assert read.data.eval_results == [TOP1, RECALL]
    assert "Drawings: {cats} and --- dogs." in read.text and "# florence-tiny\n" in read.text
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in read.text
    table = [line for line in read.text.splitlines() if line.startswith("| Pictures")]
    assert table == ["| Pictures | test | top-1 | 0.75 |", "| Pictures |  | recall | 0.5 |"]


@pytest.mark.parametrize("head", HEADS)
def test_its_example_loads_the_model(head, tmp_path):
    model = tiny_head(head)
    model.save_pretrained(tmp_path)
    create_model_card(model, str(tmp_path)).save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text("utf-8")
    namespace: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], namespace)
    assert type(namespace["model"]) is head
    assert_close(namespace["model"].state_dict(), model.state_dict(), rtol=0, atol=0)
    assert "Results" not in text and ModelCard(text).data.library_name == "transformers"


def test_every_public_model_has_a_task():
    public = [getattr(transformers_florence, name) for name in transformers_florence.__all__]
    models = {each for each in public if isinstance(each, type) and issubclass(each, PreTrainedModel)}
    assert set(model_card.PIPELINE_TAGS) == models

    class Own(FlorenceVisionModel):
        config: FlorenceVisionConfig

    assert create_model_card(Own(tiny_vision_config()), "own").data.pipeline_tag == "image-feature-extraction"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {
                "model": CLIPTextModel(
                    CLIPTextConfig(vocab_size=9, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
                )
            },
            "expected a model among FlorenceModel, .*, got CLIPTextModel",
        ),
        ({"name": ""}, "expected the name of a repository or folder, got ''"),
        ({"name": None}, "got None"),
        ({"results": [TOP1, {"accuracy": 0.5}]}, "huggingface_hub.EvalResult, got dict"),
    ],
)
def test_what_no_card_can_say_is_refused(change, message):
    model = FlorenceTextModel(tiny_text_config())
    with pytest.raises(ValueError, match=message):
        create_model_card(**{"model": model, "name": "me/tiny", **change})
