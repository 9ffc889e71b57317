"""What a training minimises: a contrastive loss of the dual encoder over all ranks, label prototypes beside it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from ..modeling_florence import FlorenceModel
from .distributed import global_sigmoid_loss, global_unicl_loss, mean_over_ranks

OBJECTIVES = ("unicl", "clip", "sigmoid")
SIGLIP_BIAS = -10.0  # SigLIP's first bias; its first scale is 10, `logit_scale_init_value=math.log(10)`
# Short at first: their direction is soon their own, while unit vectors would keep the one they began with.
PROTOTYPE_STD = 0.03


def lock_image_tower(model: FlorenceModel, *, projection: bool = True) -> None:
    """Leave the image tower as it is, so that the texts are drawn to where the pictures are (LiT, Zhai et al. 2022).

    Its weights need no gradient any more, and its stochastic depth is off; `ContrastiveObjective.train` keeps it off.
    Do this before the model is wrapped and before the optimizer is made.

    Args:
        model: changed in place.
        projection: whether `visual_projection` is locked too; not where it has not been trained with the tower.
    """
    model.vision_model.requires_grad_(False).eval()
    if projection:
        model.visual_projection.requires_grad_(False)


class ContrastiveObjective(nn.Module):
    """The dual encoder and what it minimises over the batches of all ranks.

    `forward` is the part with weights, to be called through whatever wraps this module; `loss` is a function of what
    `forward` returned and touches no weight, so that sharded weights (ZeRO-3, FSDP) may have been put away by then:

        outputs = wrapped(pixel_values, input_ids, attention_mask)
        accelerator.backward(objective.loss(**outputs, labels=labels))

    With `num_labels`, there is one learnt prototype for each label beside the contrastive loss. A batch holds a few of
    the labels; the prototypes stand for all of them. Each is a vector in the space that both towers share: the
    pictures are classified by them, and the texts are drawn to the direction of their label's. On a set with a few
    pictures a label both towers learn several times faster so than from each other's batches alone. The prototypes
    serve the training only and are thrown away.

    Args:
        model: the dual encoder; its `config.loss_reduction` is the contrastive loss's form.
        objective: `"unicl"`; `"clip"`, which looks at no label; or `"sigmoid"`, with a learnt bias, `logit_bias`.
        num_labels: how many labels there are in all; 0 for no prototypes.
        prototype_weight: weight of the pictures' cross-entropy; the contrastive loss has weight 1.
        alignment_weight: weight of the texts' 1 - cosine to their prototypes, which this term leaves where they are.
        prototype_scale: factor of the classification's logits, picture times prototype.
        label_smoothing: of the classification.
        group: the ranks that share a batch; None for all.

    Raises:
        ValueError: another objective, a negative number of labels or a negative weight.
    """

    def __init__(
        self,
        model: FlorenceModel,
        *,
        objective: str = "unicl",
        num_labels: int = 0,
        prototype_weight: float = 1.0,
        alignment_weight: float = 5.0,
        prototype_scale: float = 20.0,
        label_smoothing: float = 0.1,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise ValueError(f"expected an objective, one of {', '.join(OBJECTIVES)}, got {objective!r}")
        if num_labels < 0 or prototype_weight < 0 or alignment_weight < 0:
            raise ValueError(
                "expected num_labels, prototype_weight and alignment_weight of at least 0, got "
                f"{num_labels}, {prototype_weight} and {alignment_weight}"
            )
        self.model = model
        self.objective = objective
        self.reduction = model.config.loss_reduction
        self.prototype_weight = prototype_weight
        self.alignment_weight = alignment_weight
        self.prototype_scale = prototype_scale
        self.label_smoothing = label_smoothing
        self.group = group
        self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_BIAS)) if objective == "sigmoid" else None
        self.prototypes = None
        if num_labels and prototype_weight:
            self.prototypes = nn.Parameter(PROTOTYPE_STD * torch.randn(num_labels, model.config.projection_dim))

    @property
    def shared_outputs(self) -> tuple[str, ...]:
        """Those outputs of `forward` that are no embeddings, as `cached_backward` asks for them."""
        own = {"logit_bias": self.logit_bias, "prototypes": self.prototypes}
        return ("logit_scale", *(name for name, weight in own.items() if weight is not None))

    def train(self, mode: bool = True) -> "ContrastiveObjective":
        """As every module's, but an image tower that is locked (has no trainable weight) stays in evaluation mode."""
        super().train(mode)
        tower = self.model.vision_model
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What `loss` takes: image_embeds and text_embeds (batch, projection_dim), and the `shared_outputs`.

        Args:
            pixel_values: (batch, channels, height, width), floating.
            input_ids, attention_mask: (batch, tokens), integers.
        """
        output = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        outputs = {name: output[name] for name in ("image_embeds", "text_embeds", "logit_scale")}
        for name in self.shared_outputs[1:]:
            outputs[name] = getattr(self, name).clone()  # ZeRO-3 empties the weight itself when this ends
        return outputs

    def loss(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        logit_scale: torch.Tensor,
        logit_bias: torch.Tensor | None = None,
        prototypes: torch.Tensor | None = None,
        *,
        labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        align_texts: bool = True,
    ) -> torch.Tensor:
        """The loss of the global batch, a float32 scalar, equal on all ranks, which all call this.

        Args:
            image_embeds, text_embeds, logit_scale, logit_bias, prototypes: what `forward` returned.
            labels: (batch,), integers that mean the same on all ranks: which pairs are positives of each other.
            class_labels: (batch,), numbers of the pictures' prototypes; None leaves the prototypes out.
            align_texts: whether the texts describe the same labels; False where they tell something wider.

        Raises:
            ValueError: as `global_unicl_loss`.
        """
        options: dict[str, Any] = {"reduction": self.reduction, "group": self.group}
        if self.objective == "sigmoid":
            options["logit_bias"] = logit_bias
            loss = global_sigmoid_loss(image_embeds, text_embeds, labels, logit_scale, **options)
        else:
            of_pairs = None if self.objective == "clip" else labels
            loss = global_unicl_loss(image_embeds, text_embeds, of_pairs, logit_scale, **options)
        if prototypes is None:
            return loss
        if class_labels is None:
            return loss + 0 * prototypes.sum()  # wrappers want a gradient for every weight
        dtype = torch.promote_types(prototypes.dtype, torch.float32)
        images, texts, vectors = image_embeds.to(dtype), text_embeds.to(dtype), prototypes.to(dtype)
        logits = self.prototype_scale * images @ vectors.T
        classification = F.cross_entropy(logits, class_labels, label_smoothing=self.label_smoothing, reduction="none")
        loss = loss + self.prototype_weight * mean_over_ranks(classification, self.group)
        if align_texts and self.alignment_weight:
            cosine = F.cosine_similarity(texts, vectors.detach()[class_labels], dim=1)
            loss = loss + self.alignment_weight * mean_over_ranks(1 - cosine, self.group)
        return loss


__all__ = ["OBJECTIVES", "ContrastiveObjective", "lock_image_tower"]
