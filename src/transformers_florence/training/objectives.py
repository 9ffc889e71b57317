"""What a training minimises, as modules that take a batch and return a loss."""

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling_florence import FlorenceModel


class ContrastivePretraining(nn.Module):
    """The dual encoder's contrastive loss, with one learnt prototype for each label beside it.

    A batch holds a few of the labels; the prototypes stand for all of them. Each is a vector in the space that both
    towers share: the pictures are classified by them, and the texts are drawn to the direction of their label's. On a
    set with a few pictures a label both towers learn several times faster so than from each other's batches alone.
    The prototypes serve the training only and are thrown away.

    Args:
        model: the dual encoder; its `config.loss_reduction` is the loss's form.
        num_labels: how many labels there are in all; 0 for no prototypes.
        prototype_weight: weight of the pictures' cross-entropy; the contrastive loss has weight 1.
        alignment_weight: weight of the texts' 1 - cosine to their prototypes, which this term leaves where they are.
        prototype_scale: factor of the classification's logits, picture times prototype.
        label_smoothing: of the classification.

    Raises:
        ValueError: a negative number of labels or a negative weight.
    """

    def __init__(
        self,
        model: FlorenceModel,
        *,
        num_labels: int = 0,
        prototype_weight: float = 1.0,
        alignment_weight: float = 5.0,
        prototype_scale: float = 20.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if num_labels < 0 or prototype_weight < 0 or alignment_weight < 0:
            raise ValueError(
                "expected num_labels, prototype_weight and alignment_weight of at least 0, got "
                f"{num_labels}, {prototype_weight} and {alignment_weight}"
            )
        self.model = model
        self.prototypes = None
        if num_labels and prototype_weight:
            # Short at first: their direction is soon their own, while unit vectors would keep the one they began with.
            self.prototypes = nn.Parameter(0.03 * torch.randn(num_labels, model.config.projection_dim))
        self.prototype_weight = prototype_weight
        self.alignment_weight = alignment_weight
        self.prototype_scale = prototype_scale
        self.label_smoothing = label_smoothing

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        align_texts: bool = True,
    ) -> torch.Tensor:
        """The loss, a float32 scalar.

        Args:
            pixel_values: (batch, channels, height, width).
            input_ids, attention_mask: (batch, tokens).
            labels: (batch,), integers, which pairs are positives of each other.
            class_labels: (batch,), numbers of the pictures' prototypes; None leaves the prototypes out.
            align_texts: whether the texts describe the same labels; False where they tell something wider.
        """
        output = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, labels=labels
        )
        loss = output.loss
        if self.prototypes is None or class_labels is None:
            return loss
        prototypes = self.prototypes.float()
        logits = self.prototype_scale * output.image_embeds.float() @ prototypes.T
        classification = F.cross_entropy(logits, class_labels, label_smoothing=self.label_smoothing)
        loss = loss + self.prototype_weight * classification
        if align_texts and self.alignment_weight:
            cosine = F.cosine_similarity(output.text_embeds.float(), prototypes.detach()[class_labels], dim=1)
            loss = loss + self.alignment_weight * (1 - cosine).mean()
        return loss


__all__ = ["ContrastivePretraining"]
