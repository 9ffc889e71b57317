"""A dual encoder of clips and texts small enough for a test."""

import torch

from tests.oracles import randomize
from tests.tiny_florence import SIDE, tiny_config
from transformers_florence.configuration_florence_video import FlorenceVideoTextConfig
from transformers_florence.modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval


def retrieval_config(**overrides) -> FlorenceVideoTextConfig:
    config = FlorenceVideoTextConfig.from_dual_encoder(tiny_config(), num_frames=4, temporal_window_size=2)
    for name, value in overrides.items():
        setattr(config, name, value)
    return config


def tiny_retrieval(**overrides) -> FlorenceForVideoTextRetrieval:
    return randomize(FlorenceForVideoTextRetrieval(retrieval_config(**overrides))).eval()


def random_clips(count: int = 3, frames: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, frames, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
