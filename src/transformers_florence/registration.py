"""Registration with transformers' Auto classes, so that a folder's `config.json` alone says which class it needs."""

import importlib

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
    AutoProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
)
from transformers.utils import is_torchvision_available

from .configuration_florence import FlorenceConfig, FlorenceTextConfig, FlorenceVisionConfig
from .configuration_florence_detection import FlorenceDetectionConfig
from .configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig
from .configuration_florence_video import FlorenceVideoConfig
from .image_processing_florence import FlorenceImageProcessor
from .image_processing_pil_florence import FlorenceImageProcessorPil
from .modeling_florence import FlorenceForImageClassification, FlorenceModel
from .modeling_florence_captioning import FlorenceForImageCaptioning
from .modeling_florence_fusion import FlorenceFusionModel
from .modeling_florence_fusion_heads import FlorenceForPreTraining, FlorenceForQuestionAnswering
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_video import FlorenceForVideoClassification, FlorenceVideoModel
from .modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel
from .pipelines import register_pipelines
from .processing_florence import FlorenceProcessor
from .tokenization_florence import FlorenceTokenizer
from .video_processing_florence import FlorenceVideoProcessor


def _register_detector() -> None:
    model = importlib.import_module(f"{__package__}.modeling_florence_detection").FlorenceForObjectDetection
    processors = importlib.import_module(f"{__package__}.image_processing_florence_detection")
    AutoModelForObjectDetection.register(FlorenceDetectionConfig, model, exist_ok=True)
    AutoImageProcessor.register(
        FlorenceDetectionConfig,
        image_processor_classes={"torchvision": processors.FlorenceDetectionImageProcessor},
        exist_ok=True,
    )


def register() -> None:
    """Tell the Auto classes which of ours belong to which configuration; a second call changes nothing."""
    for config in (
        FlorenceConfig,
        FlorenceVisionConfig,
        FlorenceTextConfig,
        FlorenceVideoConfig,
        FlorenceDetectionConfig,
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
        AutoVideoProcessor.register(FlorenceVideoConfig, FlorenceVideoProcessor, exist_ok=True)
        _register_detector()
    for config in (FlorenceConfig, FlorenceFusionConfig, FlorenceCaptioningConfig):
        AutoProcessor.register(config, FlorenceProcessor, exist_ok=True)
    # Not for FlorenceConfig: pipelines that need no text would then make up a tokenizer for folders without one. A
    # folder that has one names its class in tokenizer_config.json.
    AutoTokenizer.register(FlorenceTextConfig, tokenizer_class=FlorenceTokenizer, exist_ok=True)
    register_pipelines()


__all__ = ["register"]
