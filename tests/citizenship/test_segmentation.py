"""The image tower inside transformers' own segmentation models: UperNet and Mask2Former."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from tests.tiny_florence import save_tiny, tiny_vision_config
from transformers_florence import FlorenceBackbone

STAGES = ["stage1", "stage2", "stage3", "stage4"]
CLASSES = 3


def backbone_config():
    return tiny_vision_config(
        depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_padding="pad", out_features=STAGES, drop_path_rate=0.0
    )


def upernet() -> UperNetForSemanticSegmentation:
    config = UperNetConfig(
        backbone_config=backbone_config(),
        hidden_size=16,
        pool_scales=[1, 2],
        use_auxiliary_head=False,
        num_labels=CLASSES,
    )
    return UperNetForSemanticSegmentation(config)


def halves() -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures of two colours each, three in all, and a class for each colour."""
    pixel_values, labels = torch.zeros(2, 3, 64, 48), torch.zeros(2, 64, 48, dtype=torch.long)
    pixel_values[0, 0, :, :24], pixel_values[0, 1, :, 24:] = 2.0, 2.0
    pixel_values[1, 1, :, :24], pixel_values[1, 2, :, 24:] = 2.0, 2.0
    labels[0, :, 24:] = labels[1, :, :24] = 1
    labels[1, :, 24:] = 2
    return pixel_values, labels


def test_upernet_learns_two_pictures_on_our_tower():
    model = upernet().train()
    assert type(model.backbone) is FlorenceBackbone
    pixel_values, labels = halves()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(25):
        optimizer.zero_grad()
        output = model(pixel_values, labels=labels)
        output.loss.backward()
        if step == 0:
            tower = {name: each.grad for name, each in model.backbone.named_parameters()}
            assert all(grad is not None and grad.any() for grad in tower.values())
        optimizer.step()
    assert (output.logits.argmax(dim=1) == labels).float().mean() > 0.95


def test_upernet_on_a_trained_tower(tmp_path):
    """As a user starts: the segmentation model is built from its configuration, the tower's weights are put in."""
    dual = save_tiny(tmp_path, vision_config=tiny_vision_config(depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]))
    model = upernet().eval()
    tower = FlorenceBackbone.from_pretrained(tmp_path, window_padding="pad", out_features=STAGES)
    model.backbone.load_state_dict(tower.state_dict())
    for name, weight in model.backbone.vision_model.state_dict().items():
        assert_close(weight, dual.vision_model.state_dict()[name], rtol=0, atol=0)
    model.save_pretrained(tmp_path / "segmenter")
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "segmenter")
    with torch.no_grad():
        assert_close(again(halves()[0]).logits, model(halves()[0]).logits)


@pytest.mark.parametrize("size", [(64, 64), (50, 77)])
def test_mask2former_trains_on_our_tower(size):
    config = Mask2FormerConfig(
        backbone_config=backbone_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=4,
        train_num_points=16,
        num_labels=CLASSES,
    )
    model = Mask2FormerForUniversalSegmentation(config).train()
    masks = torch.zeros(2, *size)
    masks[0, :, :20], masks[1, :, 20:] = 1, 1
    output = model(torch.randn(1, 3, *size), mask_labels=[masks], class_labels=[torch.tensor([0, 2])])
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert all(each.grad.any() for each in model.model.pixel_level_module.encoder.vision_model.parameters())
