"""What a training minimises, as modules that take a batch and return a loss."""

import torch
from torch import nn
from torch.nn import functional as F

from ..modeling_florence import FlorenceModel


class ContrastivePretraining(nn.Module):
    """The dual encoder's contrastive loss, with a classifier of the labels on the image tower beside it.

    With few pictures a label the image tower learns several times faster from a classifier that compares each picture
    with all labels than from the texts of one batch. The classifier serves the training only and is thrown away.

    Args:
        model: the dual encoder; its `config.loss_reduction` is the loss's form.
        num_labels: how many labels there are in all; 0 for no classifier.
        classifier_weight: weight of the classifier's cross-entropy; the contrastive loss has weight 1.
        label_smoothing: of the classifier's cross-entropy.

    Raises:
        ValueError: a negative number of labels or a negative weight.
    """

    def __init__(
        self,
        model: FlorenceModel,
        *,
        num_labels: int = 0,
        classifier_weight: float = 1.0,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        if num_labels < 0 or classifier_weight < 0:
            raise ValueError(
                f"expected num_labels and classifier_weight of at least 0, got {num_labels} and {classifier_weight}"
            )
        self.model = model
        hidden_size = model.config.vision_config.hidden_size
        self.classifier = nn.Linear(hidden_size, num_labels) if num_labels and classifier_weight else None
        self.classifier_weight = classifier_weight
        self.label_smoothing = label_smoothing

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, a float32 scalar.

        Args:
            pixel_values: (batch, channels, height, width).
            input_ids, attention_mask: (batch, tokens).
            labels: (batch,), integers, which pairs are positives of each other.
            class_labels: (batch,), numbers of the classifier's labels; None leaves the classifier out.
        """
        output = self.model(
            input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask, labels=labels
        )
        loss = output.loss
        if self.classifier is not None and class_labels is not None:
            pooled = output.vision_model_output.last_hidden_state.mean(dim=1)  # before the projection
            logits = self.classifier(pooled).float()
            loss = loss + self.classifier_weight * F.cross_entropy(
                logits, class_labels, label_smoothing=self.label_smoothing
            )
        return loss


__all__ = ["ContrastivePretraining"]
