"""Registration with transformers' Auto classes, so that a folder's `config.json` alone says which class it needs."""

import importlib
from typing import Any

from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
)
from transformers.utils import is_torchvision_available

from .configuration_florence import FlorenceConfig, FlorenceTextConfig, FlorenceVisionConfig
from .configuration_florence_detection import FlorenceDetectionConfig
from .configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig
from .configuration_florence_video import FlorenceVideoConfig, FlorenceVideoTextConfig
from .configuration_florence_zero_shot_detection import FlorenceZeroShotDetectionConfig
from .image_processing_florence import FlorenceImageProcessor
from .image_processing_pil_florence import FlorenceImageProcessorPil
from .modeling_florence import FlorenceForImageClassification, FlorenceModel
from .modeling_florence_captioning import FlorenceForImageCaptioning
from .modeling_florence_fusion import FlorenceFusionModel
from .modeling_florence_fusion_heads import FlorenceForPreTraining, FlorenceForQuestionAnswering
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_video import FlorenceForVideoClassification, FlorenceVideoModel
from .modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval
from .modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel
from .pipelines import register_pipelines
from .processing_florence import FlorenceProcessor
from .tokenization_florence import FlorenceTokenizer
from .video_processing_florence import FlorenceVideoProcessor


def _register_detectors() -> None:
    """What computes with torchvision's boxes: imported here, because the package works without torchvision."""

    def found(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"{__package__}.{module}"), name)

    detector = found("modeling_florence_detection", "FlorenceForObjectDetection")
    AutoModelForObjectDetection.register(FlorenceDetectionConfig, detector, exist_ok=True)
    detector = found("modeling_florence_zero_shot_detection", "FlorenceForZeroShotObjectDetection")
    AutoModelForZeroShotObjectDetection.register(FlorenceZeroShotDetectionConfig, detector, exist_ok=True)
    processor = found("image_processing_florence_detection", "FlorenceDetectionImageProcessor")
    for config in (FlorenceDetectionConfig, FlorenceZeroShotDetectionConfig):
        AutoImageProcessor.register(config, image_processor_classes={"torchvision": processor}, exist_ok=True)
    processor = found("processing_florence_zero_shot_detection", "FlorenceZeroShotDetectionProcessor")
    AutoProcessor.register(FlorenceZeroShotDetectionConfig, processor, exist_ok=True)


def register() -> None:
    """Tell the Auto classes which of ours belong to which configuration; a second call changes nothing."""
    for config in (
        FlorenceConfig,
        FlorenceVisionConfig,
        FlorenceTextConfig,
        FlorenceVideoConfig,
        FlorenceVideoTextConfig,
        FlorenceDetectionConfig,
        FlorenceZeroShotDetectionConfig,
        FlorenceFusionConfig,
        FlorenceCaptioningConfig,
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(FlorenceConfig, FlorenceModel, exist_ok=True)
    AutoModel.register(FlorenceVisionConfig, FlorenceVisionModel, exist_ok=True)
    AutoModel.register(FlorenceTextConfig, FlorenceTextModel, exist_ok=True)
    AutoModelForZeroShotImageClassification.register(FlorenceConfig, FlorenceModel, exist_ok=True)
    AutoModelForImageClassification.register(FlorenceVisionConfig, FlorenceForImageClassification, exist_ok=True)
    # A dual encoder's checkpoint starts a classifier too, but `AutoModelForImageClassification.register` takes one
    # config.
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(FlorenceConfig, FlorenceForImageClassification, exist_ok=True)
    AutoBackbone.register(FlorenceVisionConfig, FlorenceBackbone, exist_ok=True)
    AutoModel.register(FlorenceVideoConfig, FlorenceVideoModel, exist_ok=True)
    AutoModelForVideoClassification.register(FlorenceVideoConfig, FlorenceForVideoClassification, exist_ok=True)
    AutoModel.register(FlorenceVideoTextConfig, FlorenceForVideoTextRetrieval, exist_ok=True)
    AutoModel.register(FlorenceFusionConfig, FlorenceFusionModel, exist_ok=True)
    AutoModelForVisualQuestionAnswering.register(FlorenceFusionConfig, FlorenceForQuestionAnswering, exist_ok=True)
    AutoModelForPreTraining.register(FlorenceFusionConfig, FlorenceForPreTraining, exist_ok=True)
    AutoModelForImageTextToText.register(FlorenceCaptioningConfig, FlorenceForImageCaptioning, exist_ok=True)
    with_pictures = (
        FlorenceConfig,
        FlorenceVisionConfig,
        FlorenceVideoConfig,
        FlorenceFusionConfig,
        FlorenceCaptioningConfig,
    )
    for config in with_pictures:
        AutoImageProcessor.register(
            config,
            image_processor_classes={"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil},
            exist_ok=True,
        )
    if is_torchvision_available():  # else all but what computes with it
        for config in (FlorenceVideoConfig, FlorenceVideoTextConfig):
            AutoVideoProcessor.register(config, FlorenceVideoProcessor, exist_ok=True)
        _register_detectors()
    for config in (FlorenceConfig, FlorenceFusionConfig, FlorenceCaptioningConfig):
        AutoProcessor.register(config, FlorenceProcessor, exist_ok=True)
    # Not for FlorenceConfig: pipelines that need no text would then make up a tokenizer for folders without one. A
    # folder that has one names its class in tokenizer_config.json.
    AutoTokenizer.register(FlorenceTextConfig, tokenizer_class=FlorenceTokenizer, exist_ok=True)
    register_pipelines()


__all__ = ["register"]
