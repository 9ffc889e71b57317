# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's detector (section 2.4): CoSwin, feature pyramid, Dynamic Head, and ATSS's predictions and losses."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, box_convert
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BackboneOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .box_ops import decode_boxes, grid_anchors
from .configuration_florence import FlorenceVisionConfig
from .configuration_florence_detection import FlorenceDetectionConfig
from .dynamic_head import DynamicHead, ModulatedDeformConv, Predictor
from .integrity import ManifestMixin
from .losses_detection import atss_losses, detection_targets
from .modeling_florence_vision import FlorenceBackbone

# Of every class at every location before training, so that background does not drown the rest.
PRIOR_PROBABILITY = 0.01
PRIOR_LOGIT = -math.log(1 / PRIOR_PROBABILITY - 1)
TORCH_GAIN = math.sqrt(5)  # with it, the Kaiming rule gives torch's own default: uniform in 1 / sqrt(fan in)


@dataclass
class FlorenceObjectDetectionOutput(ModelOutput):
    """What `FlorenceForObjectDetection` returns; everything but recorded tensors in float32 at least.

    Args:
        loss: scalar, if `labels` were given: the sum of `loss_dict`.
        loss_dict: `loss_cls`, `loss_box_reg`, `loss_ctr`, scalars.
        logits: (batch, anchors, num_labels); their sigmoid is the score of a detection, the probability of the class
            times the centerness.
        pred_boxes: (batch, anchors, 4), centre, width and height over the size of the picture without its padding.
        class_logits: (batch, anchors, num_labels), of the class alone.
        centerness_logits: (batch, anchors).
        hidden_states, attentions: what the image tower recorded.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    pred_boxes: torch.Tensor | None = None
    class_logits: torch.Tensor | None = None
    centerness_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class AnchorPredictions(NamedTuple):
    """What a detector says at every anchor, before there is a loss.

    classes: (batch, anchors, channels) of the class predictor; boxes: (batch, anchors, 4), corners in pixels;
    centerness_logits: (batch, anchors); all in float32 at least. anchors: (anchors, 4) in pixels; grids: height and
    width of each level; scale: (batch, 1, 4), width, height, width and height of each picture without its padding;
    backbone: what the image tower returned.
    """

    classes: torch.Tensor
    boxes: torch.Tensor
    centerness_logits: torch.Tensor
    anchors: torch.Tensor
    grids: list[tuple[int, int]]
    scale: torch.Tensor
    backbone: BackboneOutput


def fuse_centerness(class_logits: torch.Tensor, centerness_logits: torch.Tensor) -> torch.Tensor:
    """Logits of the product of two probabilities, without overflow: 1 / (pq) - 1 = e^-x + e^-y + e^-(x + y).

    class_logits: (batch, anchors, classes); centerness_logits: (batch, anchors). Returns (batch, anchors, classes).
    """
    centerness_logits = centerness_logits[..., None]
    either = torch.logaddexp(-class_logits, -centerness_logits)
    return -torch.logaddexp(either, -class_logits - centerness_logits)


def picture_sizes(pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None) -> torch.Tensor:
    """Width and height of each picture without its padding, which lies at the right and below.

    Returns (batch, 2) integers.

    Raises:
        ValueError: a mask of another shape, or one (looked at on the CPU only) that leaves nothing of a picture.
    """
    batch, _, height, width = pixel_values.shape
    if pixel_mask is None:
        return torch.tensor([[width, height]], device=pixel_values.device).expand(batch, 2)
    if not isinstance(pixel_mask, torch.Tensor) or tuple(pixel_mask.shape) != (batch, height, width):
        got = tuple(pixel_mask.shape) if isinstance(pixel_mask, torch.Tensor) else type(pixel_mask).__name__
        raise ValueError(f"expected a pixel_mask of shape {(batch, height, width)}, got {got}")
    mask = pixel_mask.bool()
    sizes = torch.stack((mask[:, 0].sum(dim=1), mask[:, :, 0].sum(dim=1)), dim=1)
    if sizes.device.type == "cpu" and not torch.compiler.is_compiling() and (sizes == 0).any():
        raise ValueError(f"expected a pixel_mask that is 1 from the upper left corner on, got sizes {sizes.tolist()}")
    return sizes


def check_detection_labels(labels: Any, batch: int, num_labels: int) -> None:
    """Refuse labels that do not fit: the door of the detection loss.

    Raises:
        ValueError: no list of as many dictionaries as pictures, entries missing or of other shapes and types; or, on
            the CPU only, class numbers out of range, boxes that are not finite or have a negative side.
    """
    if not isinstance(labels, Sequence) or len(labels) != batch:
        got = f"{len(labels)} of them" if isinstance(labels, Sequence) else type(labels).__name__
        raise ValueError(f"expected a list of {batch} labels, one a picture, got {got}")
    for number, label in enumerate(labels):
        try:
            classes, boxes = label["class_labels"], label["boxes"]
            shapes, dtypes = (tuple(classes.shape), tuple(boxes.shape)), (classes.dtype, boxes.dtype)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"labels[{number}]: expected a dictionary with tensors 'class_labels' and 'boxes', got "
                f"{sorted(label) if isinstance(label, dict) else type(label).__name__} ({error})"
            ) from error
        if shapes != (shapes[0][:1], (*shapes[0][:1], 4)) or dtypes[0].is_floating_point or dtypes[0] == torch.bool:
            raise ValueError(
                f"labels[{number}]: expected class_labels (objects,), integers, and boxes (objects, 4), got "
                f"{shapes[0]}, {dtypes[0]} and {shapes[1]}, {dtypes[1]}"
            )
        if boxes.device.type != "cpu" or torch.compiler.is_compiling() or not classes.numel():
            continue
        low, high = int(classes.min()), int(classes.max())
        if low < 0 or high >= num_labels:
            raise ValueError(
                f"labels[{number}]: expected class numbers from 0 to {num_labels - 1}, got {low if low < 0 else high}"
            )
        if not torch.isfinite(boxes).all() or (boxes[:, 2:] < 0).any():
            raise ValueError(f"labels[{number}]: expected finite boxes of positive width and height, got others")


def mean_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Of a tensor without a gradient, in training over several processes; else the tensor itself."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    values = values.clone()
    torch.distributed.all_reduce(values)
    return values / torch.distributed.get_world_size()


class LevelScales(nn.Module):
    """A learnt factor for each level. Not a `ParameterList`: what lies on disk or is sharded comes back for calls."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        for level in range(levels):
            self.register_parameter(str(level), nn.Parameter(torch.ones(1)))

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """maps: the levels, finest first -> same shapes."""
        return [hidden_states * scale for hidden_states, scale in zip(maps, self.parameters(), strict=True)]


class FlorenceDetectionPreTrainedModel(ManifestMixin, PreTrainedModel):
    """Loading, saving and initialisation of detectors."""

    config: FlorenceDetectionConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The losses are means over objects: a trainer must divide them by its accumulation steps itself.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["DynamicHeadBlock"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if getattr(module, "weight", None) is None and not isinstance(module, LevelScales):
            return  # nothing of its own, or quantised
        if isinstance(module, Predictor):
            init.normal_(module.weight, std=module.std)
            init.constant_(module.bias, module.bias_value)
        elif isinstance(module, ModulatedDeformConv | nn.Linear):
            init.kaiming_uniform_(module.weight, a=TORCH_GAIN)
        elif isinstance(module, nn.Conv2d):  # of the pyramid: uniform in sqrt(3 / fan in), as torchvision's
            init.kaiming_uniform_(module.weight, a=1)
        elif isinstance(module, LevelScales):
            for scale in module.parameters():
                init.ones_(scale)


class FlorenceForObjectDetection(FlorenceDetectionPreTrainedModel):
    """One-stage detector: at every location of the pyramid one anchor, its classes, box and centerness.

    Pictures of any size work, also odd ones. Padding belongs at the right and below, with a `pixel_mask` that says
    where; predictions and labels are relative to the picture without it, as in DETR.

    Example:
        >>> model = FlorenceForObjectDetection(FlorenceDetectionConfig.from_size("nano", num_blocks=1, num_labels=3))
        >>> model(pixel_values=torch.zeros(2, 3, 64, 96)).pred_boxes.shape
        torch.Size([2, 129, 4])
    """

    def __init__(self, config: FlorenceDetectionConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        channels = config.hidden_size
        self.backbone = FlorenceBackbone._from_config(config.vision_config)
        self.pyramid = FeaturePyramidNetwork(
            self.backbone.channels, channels, extra_blocks=LastLevelP6P7(channels, channels)
        )
        self.dynamic_head = DynamicHead(config)
        self.class_predictor = self.make_class_predictor(config)
        self.box_predictor = Predictor(channels, 4)
        self.centerness_predictor = Predictor(channels, 1)
        self.box_scales = LevelScales(len(config.strides))
        self.post_init()
        # The tower alone passes over the rest of a dual encoder's checkpoint; a detector's must fit entirely.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    def make_class_predictor(self, config: FlorenceDetectionConfig) -> Predictor:
        """What becomes `AnchorPredictions.classes`: here the logits of the classes."""
        return Predictor(config.hidden_size, config.num_labels, bias_value=PRIOR_LOGIT)

    @classmethod
    def from_pretrained_backbone(cls, folder: str | os.PathLike, **fields: Any) -> "FlorenceForObjectDetection":
        """A detector to be trained, on the image tower of a Florence checkpoint.

        Args:
            folder: where a dual encoder, an image tower, a classifier or a backbone was saved, or its name on the Hub.
            fields: of the `FlorenceDetectionConfig`, such as `id2label` and `num_blocks`.

        Returns:
            The model in float32, in evaluation mode. New are the norms behind the stages, unless the checkpoint is a
            backbone's with the same, the pyramid and the head.

        Raises:
            ValueError: the checkpoint lacks weights of the image tower; a field has an impossible value.

        Example:
            >>> names = {0: "fish", 1: "jellyfish"}
            >>> model = FlorenceForObjectDetection.from_pretrained_backbone(bundled_checkpoint(), id2label=names)
        """
        config = FlorenceDetectionConfig.from_vision_config(FlorenceVisionConfig.from_pretrained(folder), **fields)
        model = cls(config)
        backbone, info = FlorenceBackbone.from_pretrained(
            folder, config=config.vision_config, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("feature_norms."))
        if missing:
            raise ValueError(f"expected the weights of an image tower in {folder}, missing are: {', '.join(missing)}")
        model.backbone.load_state_dict(backbone.state_dict())
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def freeze_backbone(self) -> None:
        """Train the pyramid and the head alone; the image tower stays in evaluation mode, without stochastic depth."""
        self.backbone.requires_grad_(False)
        self.train(self.training)

    def unfreeze_backbone(self) -> None:
        """Take `freeze_backbone` back."""
        self.backbone.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> "FlorenceForObjectDetection":
        """As in torch, but a backbone without anything to train stays in evaluation mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def predict(self, maps: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Classes (batch, anchors, channels), deltas (batch, anchors, 4), centerness logits (batch, anchors).

        maps: the levels, finest first, each (batch, hidden_size, height, width).
        """
        levels = []
        boxes = self.box_scales([self.box_predictor(hidden_states) for hidden_states in maps])
        for hidden_states, deltas in zip(maps, boxes, strict=True):
            predictions = (self.class_predictor(hidden_states), deltas, self.centerness_predictor(hidden_states))
            levels.append([each.flatten(2).transpose(1, 2) for each in predictions])  # (batch, locations, channels)
        classes, scaled, centerness = (torch.cat(each, dim=1) for each in zip(*levels, strict=True))
        return classes, scaled, centerness.squeeze(-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceObjectDetectionOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), floating, normalised, padded at the right and below.
            pixel_mask: (batch, height, width), 1 for pixels of the picture and 0 for padding; None for no padding.
            labels: for each picture a dictionary with `class_labels` (objects,), integers, and `boxes` (objects, 4),
                centre, width and height over the picture's size; there may be no objects. Where `iscrowd` (objects,)
                is set, a box is left out: it covers many objects. Other entries are not looked at.

        Returns:
            A `FlorenceObjectDetectionOutput`. In training over several processes the losses are divided by the
            processes' mean number of positives, so that the mean of the gradients is that of one large batch.

        Raises:
            ValueError: pixels that the tower refuses; a mask or labels that do not fit.
        """
        found = self.predict_anchors(pixel_values, pixel_mask, **kwargs)
        return self.make_output(found, found.classes, labels, self.config.num_labels)

    def predict_anchors(
        self, pixel_values: torch.Tensor | None, pixel_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> AnchorPredictions:
        """From pixels to what is said at every anchor; see `forward` for arguments and errors."""
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(self.config, name, False):
                kwargs.setdefault(name, True)
        outputs = self.backbone(pixel_values, return_dict=True, **kwargs)
        assert pixel_values is not None  # the tower has refused it
        sizes = picture_sizes(pixel_values, pixel_mask)
        names = [str(level) for level in range(len(outputs.feature_maps))]
        maps = self.pyramid(dict(zip(names, outputs.feature_maps, strict=True)))
        maps = self.dynamic_head(tuple(maps.values()))
        classes, deltas, centerness_logits = self.predict(maps)
        grids = [tuple(hidden_states.shape[2:]) for hidden_states in maps]
        anchors = grid_anchors(grids, self.config.strides, deltas.dtype, deltas.device)
        scale = sizes.to(deltas.dtype).repeat(1, 2)[:, None]  # (batch, 1, 4): width, height, width, height
        with maybe_autocast(deltas.device.type, enabled=False):
            boxes = decode_boxes(deltas, anchors)
        return AnchorPredictions(classes, boxes, centerness_logits, anchors, grids, scale, outputs)

    def make_output(
        self,
        found: AnchorPredictions,
        class_logits: torch.Tensor,
        labels: list[dict[str, torch.Tensor]] | None,
        num_labels: int,
    ) -> FlorenceObjectDetectionOutput:
        """Scores and boxes of every anchor, and the losses if there are labels.

        class_logits: (batch, anchors, num_labels), made of `found.classes`.
        """
        loss = loss_dict = None
        with maybe_autocast(class_logits.device.type, enabled=False):
            if labels is not None:
                check_detection_labels(labels, len(class_logits), num_labels)
                loss_dict = self.losses(
                    class_logits, found.boxes, found.centerness_logits, labels, found.anchors, found.grids, found.scale
                )
                loss = torch.stack(list(loss_dict.values())).sum()
            logits = fuse_centerness(class_logits, found.centerness_logits)
            pred_boxes = box_convert(found.boxes / found.scale, "xyxy", "cxcywh")
        return FlorenceObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=pred_boxes,
            class_logits=class_logits,
            centerness_logits=found.centerness_logits,
            hidden_states=found.backbone.hidden_states,
            attentions=found.backbone.attentions,
        )

    def losses(
        self,
        class_logits: torch.Tensor,
        boxes: torch.Tensor,
        centerness_logits: torch.Tensor,
        labels: Sequence[dict[str, torch.Tensor]],
        anchors: torch.Tensor,
        grids: Sequence[tuple[int, int]],
        scale: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The labels in pixels, assigned to the anchors, and `atss_losses` of them.

        boxes: (batch, anchors, 4) and anchors: (anchors, 4) in pixels; grids: height and width of each level; scale:
        (batch, 1, 4), width, height, width and height of each picture.
        """
        objects, classes = [], []
        for label, size in zip(labels, scale, strict=True):
            kept = ~label["iscrowd"].bool() if "iscrowd" in label else slice(None)
            objects.append(box_convert(label["boxes"][kept].to(boxes), "cxcywh", "xyxy") * size)
            classes.append(label["class_labels"][kept].to(boxes.device))
        level_sizes = [height * width for height, width in grids]
        targets = detection_targets(anchors, level_sizes, objects, classes)
        totals = torch.stack(((targets.labels >= 0).sum().to(boxes), targets.centerness.sum()))
        if self.training:
            totals = mean_over_processes(totals)
        return atss_losses(class_logits, boxes, centerness_logits, targets, *totals)


__all__ = ["FlorenceDetectionPreTrainedModel", "FlorenceForObjectDetection", "FlorenceObjectDetectionOutput"]
