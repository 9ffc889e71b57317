# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's open-set detector (section 3.6): boxes by the Dynamic Head, their names by the dual encoder."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_convert, roi_align
from transformers import PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .box_ops import box_centers, select_detections
from .configuration_florence import FlorenceConfig
from .configuration_florence_detection import FIRST_STRIDE
from .configuration_florence_zero_shot_detection import FlorenceZeroShotDetectionConfig
from .dynamic_head import Predictor
from .modeling_florence import FlorenceModel
from .modeling_florence_detection import (
    PRIOR_LOGIT,
    AnchorPredictions,
    FlorenceForObjectDetection,
    FlorenceObjectDetectionOutput,
    fuse_centerness,
)
from .modeling_florence_text import FlorenceTextModel

PROPOSAL_NMS = 0.6  # proposals that overlap (IoU) more with a better one are dropped, as the detector's own boxes are
REGION_BINS = 7  # of a side, over which a region's features are averaged
NO_PROPOSAL = -1e4  # logit of what fills up a picture with fewer proposals than another; its sigmoid is zero
FLOAT32_EPS = torch.finfo(torch.float32).eps


@dataclass
class FlorenceZeroShotObjectDetectionOutput(FlorenceObjectDetectionOutput):
    """What `FlorenceForZeroShotObjectDetection` returns; everything but recorded tensors in float32 at least.

    The fields of `FlorenceObjectDetectionOutput`, with the given classes in the place of `num_labels`. Where the dual
    encoder names the boxes, `anchors` are the proposals, `class_logits` is what it says, and `centerness_logits` is
    whether there is an object at all; what a picture lacks of the batch's largest number of proposals has the score 0.
    Without classes these four are those of all anchors, for one class, "object".

    Args:
        class_embeds: (batch, classes, projection_dim), the vectors of the classes, unit length.
    """

    class_embeds: torch.Tensor | None = None


def object_boxes(boxes: torch.Tensor, margin: float) -> torch.Tensor:
    """Squares around boxes, for cutting out: an object with a part of what is beside it, at its own proportions.

    boxes: (..., 4), corners; margin: of both sides together, over the longer side. Returns (..., 4).
    """
    half = (boxes[..., 2:] - boxes[..., :2]).amax(dim=-1, keepdim=True) * (1 + margin) / 2
    centers = box_centers(boxes)
    return torch.cat((centers - half, centers + half), dim=-1)


def log_odds(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of each class, in a softmax over all classes and what else there could be.

    logits: (..., classes); others: (..., n). Returns (..., classes); of a class that is nearly certain at most 16.
    """
    together = torch.cat((logits, others), dim=-1)
    log_probability = together.log_softmax(dim=-1)[..., : logits.shape[-1]]
    return log_probability - (-log_probability.expm1()).clamp(min=FLOAT32_EPS).log()


class FlorenceForZeroShotObjectDetection(FlorenceForObjectDetection):
    """Finds objects of classes that are given as texts.

    The detector of `FlorenceForObjectDetection` on the dual encoder's image tower, and the dual encoder's text tower.
    How a class is matched with a box is `config.naming`, see `FlorenceZeroShotDetectionConfig`: `"crop"` and
    `"region"` train the detector without classes and name its boxes by the dual encoder as it is, `"text_head"`
    trains classes too. Classes that are given at once compete for a box, beside `background_texts` (`"crop"` and
    `"region"`). transformers' pipeline gives them one by one: each then competes with the background alone.

    Example:
        >>> config = FlorenceZeroShotDetectionConfig.from_size("nano", num_blocks=1, num_proposals=5)
        >>> model = FlorenceForZeroShotObjectDetection(config)
        >>> model(torch.zeros(2, 3, 64, 96), class_embeds=torch.eye(256)[:3]).logits.shape[2]
        3
    """

    config: FlorenceZeroShotDetectionConfig
    get_input_embeddings = FlorenceModel.get_input_embeddings
    set_input_embeddings = FlorenceModel.set_input_embeddings
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _no_split_modules = ["DynamicHeadBlock", "CLIPEncoderLayer"]

    def __init__(self, config: FlorenceZeroShotDetectionConfig) -> None:
        super().__init__(config)
        self.text_model = FlorenceTextModel._from_config(config.text_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        if config.naming == "text_head":
            self.class_bias = nn.Parameter(torch.tensor(PRIOR_LOGIT))
        else:
            width, eps = config.vision_config.hidden_size, config.vision_config.layer_norm_eps
            self.tower_norm = nn.LayerNorm(width, eps=eps)  # the dual encoder's, behind the last stage
            self.visual_projection = nn.Linear(width, config.projection_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
            count = max(1, len(config.background_texts))
            self.background_embeds = nn.Parameter(torch.zeros(count, config.projection_dim), requires_grad=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        own = (getattr(self, name, None) for name in ("text_projection", "visual_projection"))
        if isinstance(module, nn.Linear) and any(module is each for each in own):
            if getattr(module, "weight", None) is not None:  # None: quantised
                init.normal_(module.weight, std=module.in_features**-0.5)
            return
        super()._init_weights(module)
        if module is self and hasattr(self, "class_bias"):
            init.constant_(self.class_bias, PRIOR_LOGIT)
        elif module is self and hasattr(self, "logit_scale"):
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            init.zeros_(self.background_embeds)

    def make_class_predictor(self, config: FlorenceZeroShotDetectionConfig) -> Predictor:
        """Of the text head, vectors in the space of the texts; else whether there is an object."""
        if config.naming == "text_head":
            return Predictor(config.hidden_size, config.projection_dim)
        return Predictor(config.hidden_size, 1, bias_value=PRIOR_LOGIT)

    @classmethod
    def from_pretrained_backbone(
        cls, folder: str | os.PathLike, **fields: Any
    ) -> "FlorenceForZeroShotObjectDetection":
        """An open-set detector to be trained, on both towers of a dual encoder.

        Args:
            folder: where a `FlorenceModel` was saved, or its name on the Hub.
            fields: of the `FlorenceZeroShotDetectionConfig`, such as `naming` and `num_blocks`. For
                `background_texts`, call `set_background` then.

        Returns:
            The model in float32, in evaluation mode. New are the norms behind the stages, the pyramid and the head.

        Raises:
            ValueError: the checkpoint is no dual encoder; a field has an impossible value.

        Example:
            >>> model = FlorenceForZeroShotObjectDetection.from_pretrained_backbone(bundled_checkpoint(), num_blocks=1)
        """
        dual_config = FlorenceConfig.from_pretrained(folder)
        config = FlorenceZeroShotDetectionConfig.from_dual_config(dual_config, **fields)
        model = cls(config)
        dual, info = FlorenceModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"expected the weights of a dual encoder in {folder}, missing are: {missing}")
        tower = dual.vision_model.state_dict()
        norm = {name: tower.pop(f"norm.{name}") for name in ("weight", "bias")}
        model.backbone.vision_model.load_state_dict(tower)
        model.text_model.load_state_dict(dual.text_model.state_dict())
        model.text_projection.load_state_dict(dual.text_projection.state_dict())
        if config.naming != "text_head":
            model.tower_norm.load_state_dict(norm)
            model.visual_projection.load_state_dict(dual.visual_projection.state_dict())
            model.logit_scale.data.copy_(dual.logit_scale.data)
        return model.eval()

    def freeze_backbone(self) -> None:
        """Train the pyramid and the head alone, and leave the dual encoder as it is."""
        for name in ("text_model", "text_projection", "tower_norm", "visual_projection", "logit_scale"):
            if hasattr(self, name):
                getattr(self, name).requires_grad_(False)
        super().freeze_backbone()

    def unfreeze_backbone(self) -> None:
        """Take `freeze_backbone` back."""
        for name in ("text_model", "text_projection", "tower_norm", "visual_projection", "logit_scale"):
            if hasattr(self, name):
                getattr(self, name).requires_grad_(True)
        super().unfreeze_backbone()

    # As a dual encoder's, so that what embeds texts for one does it for the other.
    get_text_features = FlorenceModel.get_text_features

    @torch.no_grad()
    def set_background(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        """Say what a proposal may show beside the classes; saved with the model.

        Raises:
            ValueError: no text, or a model that compares its classes with no other (`"text_head"`).
        """
        if self.config.naming == "text_head" or isinstance(texts, str) or not texts:
            raise ValueError(
                f"expected texts, for naming by 'crop' or 'region', got {texts!r}, {self.config.naming!r}"
            )
        tokens = tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True).to(self.device)
        embeds = F.normalize(self.get_text_features(**tokens, return_dict=True).pooler_output, dim=-1)
        self.background_embeds = nn.Parameter(embeds, requires_grad=False)
        self.config.background_texts = list(texts)

    def embed_classes(
        self,
        batch: int,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        class_embeds: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Vectors of each picture's classes, unit length: (batch, classes, projection_dim); None if there are none.

        See `forward` for arguments and errors.
        """
        width = self.config.projection_dim
        if class_embeds is not None:
            if input_ids is not None:
                raise ValueError("expected input_ids or class_embeds, got both")
            shape = (
                tuple(class_embeds.shape) if isinstance(class_embeds, torch.Tensor) else type(class_embeds).__name__
            )
            if len(shape) not in (2, 3) or shape[-1] != width or 0 in shape or shape[:-2] not in ((), (batch,)):
                raise ValueError(
                    f"expected class_embeds (classes, {width}) or ({batch}, classes, {width}) with at least one "
                    f"class, got {shape}"
                )
            embeds = class_embeds if class_embeds.ndim == 3 else class_embeds.expand(batch, -1, -1)
        elif input_ids is not None:
            if input_ids.ndim != 2 or input_ids.shape[0] == 0 or input_ids.shape[0] % batch:
                raise ValueError(
                    f"expected input_ids (pictures * classes, tokens), as many classes for each of {batch} pictures, "
                    f"got {tuple(input_ids.shape)}"
                )
            pooled = self.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output
            embeds = pooled.unflatten(0, (batch, -1))
        else:
            return None
        # Half precision would make classes alike that are not.
        return F.normalize(embeds.to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        class_embeds: torch.Tensor | None = None,
        labels: list[dict[str, torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceZeroShotObjectDetectionOutput:
        """
        Args:
            pixel_values, pixel_mask: as in `FlorenceForObjectDetection`.
            input_ids, attention_mask: (batch * classes, tokens), integers: the classes of the first picture, then
                those of the second, as many each.
            class_embeds: instead of them, vectors of classes: (classes, projection_dim) for all pictures or (batch,
                classes, projection_dim). `build_zero_shot_classifier` makes them of names and templates, once.
            labels: as in `FlorenceForObjectDetection`, with numbers of the picture's classes. Where the dual encoder
                names the boxes, the numbers do not matter, and no classes have to be given.

        Returns:
            A `FlorenceZeroShotObjectDetectionOutput`.

        Raises:
            ValueError: pixels that the tower refuses; a mask, classes or labels that do not fit; no classes although
                there are no labels, or the text head wants them.
        """
        by_head = self.config.naming == "text_head"
        if input_ids is None and class_embeds is None and (labels is None or by_head):
            raise ValueError("expected classes as input_ids or class_embeds, got neither")
        recorded = kwargs.get("output_hidden_states", getattr(self.config, "output_hidden_states", False))
        if self.config.naming == "region":  # they are cut out of the last state
            kwargs["output_hidden_states"] = True
        found = self.predict_anchors(pixel_values, pixel_mask, **kwargs)
        assert pixel_values is not None  # the tower has refused it
        # Not `len`, which would fix the batch's size for exporters.
        embeds = self.embed_classes(pixel_values.shape[0], input_ids, attention_mask, class_embeds)
        with maybe_autocast(found.classes.device.type, enabled=False):
            if by_head:
                assert embeds is not None  # refused above
                class_logits = found.classes @ embeds.mT + self.class_bias  # (batch, anchors, classes)
                output = self.make_output(found, class_logits, labels, embeds.shape[1])
            else:
                output = self.make_output(found, found.classes, self.without_classes(labels), 1)
        fields = {**output, "class_embeds": embeds, "hidden_states": output.hidden_states if recorded else None}
        if not by_head and embeds is not None:
            fields |= self.name_proposals(pixel_values, found, fields["logits"], embeds)
        return FlorenceZeroShotObjectDetectionOutput(**fields)

    @staticmethod
    def without_classes(labels: Any) -> Any:
        """Labels in which everything is an object; what is no label is left for the door of the losses to refuse."""
        if not isinstance(labels, Sequence):
            return labels
        return [
            {**label, "class_labels": torch.zeros_like(label["class_labels"])}
            if isinstance(label, dict) and isinstance(label.get("class_labels"), torch.Tensor)
            else label
            for label in labels
        ]

    def name_proposals(
        self, pixel_values: torch.Tensor, found: AnchorPredictions, logits: torch.Tensor, embeds: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The best boxes of each picture, and what the dual encoder says that they show.

        logits: (batch, anchors, 1), whether there is an object; embeds: (batch, classes, projection_dim).

        Returns:
            `logits`, `pred_boxes`, `class_logits` and `centerness_logits` of the output.
        """
        within = torch.minimum(found.boxes.clamp(min=0), found.scale)
        area = (within[..., 2:] - within[..., :2]).clamp(min=0).prod(dim=-1, keepdim=True)
        scores = logits.sigmoid() * (area > 0)  # not what lies in the padding
        best = select_detections(scores, within, 0.0, self.config.num_proposals, PROPOSAL_NMS)
        counts = [len(each["scores"]) for each in best]
        images = self.embed_boxes(pixel_values, [each["boxes"] for each in best], found)  # (all proposals, dim)
        texts = embeds.repeat_interleave(torch.tensor(counts, device=embeds.device), dim=0)  # (all, classes, dim)
        scale = self.logit_scale.to(embeds.dtype)
        if self.config.max_logit_scale is not None:
            scale = scale.clamp(max=math.log(self.config.max_logit_scale))
        cosines, others = (texts @ images[..., None])[..., 0], images @ self.background_embeds.to(images).T
        class_logits = log_odds(scale.exp() * cosines, scale.exp() * others)
        objectness = torch.cat([each["scores"] for each in best]).logit(eps=FLOAT32_EPS)

        def filled(values: torch.Tensor, fill: float) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence(list(values.split(counts)), batch_first=True, padding_value=fill)

        boxes = filled(torch.cat([each["boxes"] for each in best]), 0.0) / found.scale  # (batch, proposals, 4)
        class_logits, objectness = filled(class_logits, NO_PROPOSAL), filled(objectness, NO_PROPOSAL)
        return {
            "logits": fuse_centerness(class_logits, objectness),
            "pred_boxes": box_convert(boxes, "xyxy", "cxcywh"),
            "class_logits": class_logits,
            "centerness_logits": objectness,
        }

    def embed_boxes(
        self, pixel_values: torch.Tensor, boxes: list[torch.Tensor], found: AnchorPredictions
    ) -> torch.Tensor:
        """What the dual encoder sees in boxes, corners in pixels, of each picture: (all boxes, projection_dim)."""
        config = self.config.vision_config
        dtype = boxes[0].dtype
        if not any(len(each) for each in boxes):
            return torch.zeros(0, self.config.projection_dim, dtype=dtype, device=boxes[0].device)
        if self.config.naming == "crop":
            size = config.image_size
            size = (size, size) if isinstance(size, int) else tuple(size)
            squares = [object_boxes(each, self.config.crop_margin) for each in boxes]
            # As many samples as there are pixels in a bin: a large object is averaged down, a small one interpolated.
            crops = roi_align(pixel_values.to(dtype), squares, size, aligned=True)
            grid = self.backbone.vision_model(crops.to(pixel_values.dtype), return_dict=True).last_hidden_state
            tokens = self.tower_norm(grid)  # (all boxes, tokens, channels)
        else:
            grid = self.tower_norm(found.backbone.hidden_states[-1]).permute(0, 3, 1, 2)
            stride = FIRST_STRIDE * 2 ** (config.num_layers - 1)
            regions = roi_align(grid.to(dtype), boxes, REGION_BINS, 1 / stride, aligned=True)
            tokens = regions.flatten(2).transpose(1, 2).to(grid.dtype)  # (all boxes, bins, channels)
        return F.normalize(self.visual_projection(tokens.mean(dim=1)).to(dtype), dim=-1)


__all__ = ["FlorenceForZeroShotObjectDetection", "FlorenceZeroShotObjectDetectionOutput"]
