"""What transformers' mixins ask of a test class, answered for Florence: towers with windows, pairs, feature maps."""

import copy
import math
import unittest
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from transformers.testing_utils import torch_device

from .entries import BATCH, ModelEntry
from .loader import load
from .reasons import own

BASE_TABLE = "MODEL_MAPPING_NAMES"
GENERATION = "test_generation_tester_mixin_inheritance"


def on_device(value):
    """Tensors, alone or in lists and dictionaries (a detector's labels), on the device that is tested."""
    if isinstance(value, dict):
        return {name: on_device(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [on_device(item) for item in value]
    return value.to(torch_device)


class Tester:
    """What the mixins call a model tester: configurations, inputs, and the sizes that they compare outputs with."""

    batch_size = BATCH
    is_training = True

    def __init__(self, entry: ModelEntry) -> None:
        self.entry = entry
        config = entry.config()
        text = config.get_text_config()
        text = text if hasattr(text, "num_hidden_layers") else config.vision_config  # a detector
        self.num_hidden_layers = text.num_hidden_layers
        self.hidden_size = text.hidden_size
        self.num_attention_heads = text.num_attention_heads
        self.seq_length = next(iter(entry.inputs(config).values())).shape[1]

    def get_config(self):
        return self.entry.config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        return config, on_device(self.entry.inputs(config))


class Adaptation:
    """For every class: inputs and labels from the entry, and a loss also where upstream expects none."""

    entry: ModelEntry
    model_tester = None

    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model_tester = Tester(self.entry)
        super().setUp()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and self.entry.labels is not None:
            inputs.update(on_device(self.entry.labels(self.entry.config())))
        return inputs

    def with_loss(self):
        """Inside this, a base model that has a loss counts as a head: upstream leaves base models out of training."""
        module = load("test_modeling_common")
        names = dict(getattr(module, BASE_TABLE))
        if self.entry.labels is not None:
            names = {kind: name for kind, name in names.items() if name != self.entry.model_class.__name__}
        return mock.patch.object(module, BASE_TABLE, names)

    def test_training(self):
        with self.with_loss():
            super().test_training()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        with self.with_loss():
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def towers(self, outputs) -> list[tuple]:
        """Outputs that hold recorded tensors, each with the shapes that these must have (without the batch)."""
        return [(outputs, self.entry.hidden_shapes, self.entry.attention_shapes)]

    def run_model(self, options: dict, settings: dict):
        """The outputs of a fresh model under options of the call and settings of all its configurations."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for part in (config, *(getattr(config, name) for name in config.sub_configs)):
            for name, value in settings.items():
                setattr(part, name, value)
        model = self.entry.model_class._from_config(config, attn_implementation="eager").to(torch_device).eval()
        return model(**inputs, **options)


class Pictures(Adaptation):
    """A tower whose hidden states are grids of falling size, and whose attention works window by window."""

    test_resize_embeddings = False  # there is no vocabulary

    def check_recorded(self, option: str, check) -> None:
        """`check` holds whether the recording is asked for by the call or by the configuration."""
        for options, settings in (({option: True}, {}), ({}, {option: True})):
            for tower, hidden_shapes, attention_shapes in self.towers(self.run_model(options, settings)):
                check(tower, hidden_shapes, attention_shapes)

    def test_attention_outputs(self):
        def check(tower, hidden_shapes, attention_shapes):
            self.assertEqual(len(tower.attentions), len(attention_shapes))
            self.assertIsNone(tower.hidden_states)
            for weights, (windows, *shape) in zip(tower.attentions, attention_shapes, strict=True):
                self.assertEqual(tuple(weights.shape), (BATCH * windows, *shape))
                torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))

        self.check_recorded("output_attentions", check)

    def test_hidden_states_output(self):
        def check(tower, hidden_shapes, attention_shapes):
            shapes = [tuple(hidden_states.shape) for hidden_states in tower.hidden_states]
            self.assertEqual(shapes, [(BATCH, *shape) for shape in hidden_shapes])
            self.assertIsNone(tower.attentions)

        self.check_recorded("output_hidden_states", check)

    def test_retain_grad_hidden_states_attentions(self):
        outputs = self.run_model({"output_hidden_states": True, "output_attentions": True}, {})
        recorded = [
            tensor for tower, *_ in self.towers(outputs) for tensor in (tower.hidden_states[0], tower.attentions[0])
        ]
        for tensor in recorded:
            tensor.retain_grad()
        first = outputs[0]
        (first[-1] if isinstance(first, tuple) else first).flatten()[0].backward()
        for tensor in recorded:
            self.assertIsNotNone(tensor.grad)

    def test_model_get_set_embeddings(self):
        model = self.entry.model_class(self.entry.config())
        self.assertIsInstance(model.get_input_embeddings(), nn.Conv2d | nn.Conv3d)
        fresh = copy.deepcopy(model.get_input_embeddings())
        model.set_input_embeddings(fresh)
        self.assertIs(model.get_input_embeddings(), fresh)
        self.assertIsNone(model.get_output_embeddings())


class Pairs(Pictures):
    """Two towers: recorded tensors lie in the towers' own outputs, pictures beside `input_ids` in the inputs."""

    _is_composite = True
    test_resize_embeddings = True
    additional_model_inputs = ["pixel_values"]

    def towers(self, outputs) -> list[tuple]:
        text, tokens = self.entry.config().text_config, self.model_tester.seq_length
        layers = text.num_hidden_layers
        hidden_shapes = ((tokens, text.hidden_size),) * (layers + 1)
        attention_shapes = ((1, text.num_attention_heads, tokens, tokens),) * layers
        return [
            *super().towers(outputs.vision_model_output),
            (outputs.text_model_output, hidden_shapes, attention_shapes),
        ]

    def _image_features_get_expected_num_hidden_states(self, model_tester=None):
        return len(self.entry.hidden_shapes)

    def _image_features_get_expected_num_attentions(self, model_tester=None):
        return len(self.entry.attention_shapes)

    # Upstream compares with the config's `embed_dim`, which is the first stage's width here; the test below does it.
    skip_test_image_features_output_shape = True

    def test_get_image_features_pooler_output(self):
        super().test_get_image_features_pooler_output()
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = self.entry.model_class(config).to(torch_device).eval().get_image_features(inputs["pixel_values"])
        *grid, channels = self.entry.hidden_shapes[-1]
        self.assertEqual(tuple(outputs.last_hidden_state.shape), (BATCH, math.prod(grid), channels))
        self.assertEqual(tuple(outputs.pooler_output.shape), (BATCH, config.projection_dim))

    def test_model_get_set_embeddings(self):
        super(Pictures, self).test_model_get_set_embeddings()


class ClipPairs(Pairs):
    """Two towers, of clips and of texts."""

    additional_model_inputs = ["pixel_values_videos"]
    skip_test_video_features_output_shape = True  # as for pictures; the test below does it

    def towers(self, outputs) -> list[tuple]:
        names = {"vision_model_output": outputs.video_model_output, "text_model_output": outputs.text_model_output}
        return super().towers(SimpleNamespace(**names))

    def _video_features_get_expected_num_hidden_states(self, model_tester=None):
        return len(self.entry.hidden_shapes)

    def _video_features_get_expected_num_attentions(self, model_tester=None):
        return len(self.entry.attention_shapes)

    def test_get_image_features_pooler_output(self):
        super(Pairs, self).test_get_image_features_pooler_output()  # there are none

    def test_get_video_features_pooler_output(self):
        super().test_get_video_features_pooler_output()
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.entry.model_class(config).to(torch_device).eval()
        outputs = model.get_video_features(inputs["pixel_values_videos"])
        *grid, channels = self.entry.hidden_shapes[-1]
        self.assertEqual(tuple(outputs.last_hidden_state.shape), (BATCH, math.prod(grid), channels))
        self.assertEqual(tuple(outputs.pooler_output.shape), (BATCH, config.projection_dim))


class Named(Pictures):
    """A detector of classes that are given as texts, beside the pictures in the inputs."""

    additional_model_inputs = ["input_ids", "attention_mask"]
    test_resize_embeddings = True
    test_model_get_set_embeddings = Pairs.test_model_get_set_embeddings


class Overfit:
    """Lets the training mixin, which makes texts only, fit the batch of the entry instead."""

    def _get_model_modality(self):
        return "text"  # the one that it goes on with

    def _create_text_training_batch(self, **sizes):
        return self.entry.overfit(self.entry.config())

    def test_training_overfit(self):
        get_config = self.model_tester.get_config

        def config_with_vocabulary():
            config = get_config()
            config.vocab_size = getattr(config.get_text_config(), "vocab_size", 0)  # read, then passed to the above
            return config

        with mock.patch.object(self.model_tester, "get_config", config_with_vocabulary):
            super().test_training_overfit()


class Fusion(Adaptation):
    """A question about a picture: both go through one model."""

    _is_composite = True
    additional_model_inputs = ("pixel_values",)


KINDS: dict[str, type] = {
    "text": Adaptation,
    "pictures": Pictures,
    "pairs": Pairs,
    "clip pairs": ClipPairs,
    "named": Named,
    "fusion": Fusion,
}


def build(entry: ModelEntry) -> type[unittest.TestCase]:
    """The test case of an entry: its adaptation before transformers' mixins.

    Raises:
        NotImplementedError: the class generates, and its entry does not say where that is tested.
    """
    if entry.model_class.can_generate() and GENERATION not in entry.meaningless:
        raise NotImplementedError(
            f"{entry.model_class.__name__} generates, but upstream's tests of that are not in its source "
            f"distribution: say in `meaningless`, under {GENERATION}, where it is tested instead"
        )
    mixins = [load("test_modeling_common").ModelTesterMixin]
    if entry.backbone:
        mixins.append(load("test_backbone_common").BackboneTesterMixin)
    if entry.overfit is not None:
        mixins = [Overfit, *mixins, load("test_training_mixin").TrainingTesterMixin]
    name = f"{entry.model_class.__name__}Test"
    contents = {
        "entry": entry,
        "all_model_classes": (entry.model_class,),
        "config_class": entry.model_class.config_class,
    }
    for test, reason in entry.meaningless.items():
        contents[test] = unittest.skip(own(reason))(lambda self: None)
    return type(name, (KINDS[entry.kind], *mixins, unittest.TestCase), {**contents, "__module__": __name__})


__all__ = ["KINDS", "Adaptation", "Overfit", "Pairs", "Pictures", "Tester", "build"]
