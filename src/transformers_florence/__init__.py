"""Florence (Yuan et al., 2021) for Hugging Face Transformers: public names, and registration with its Auto classes."""

from importlib.metadata import PackageNotFoundError, version

from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

from .configuration_florence import FlorenceConfig, FlorenceTextConfig, FlorenceVisionConfig
from .image_processing_florence import FlorenceImageProcessor
from .image_processing_pil_florence import FlorenceImageProcessorPil
from .integrity import verify_checkpoint, write_manifest
from .loading import bundled_checkpoint, load_bundled, load_checkpoint
from .losses_contrastive import unicl_loss
from .model_card import create_model_card
from .modeling_florence import FlorenceForImageClassification, FlorenceModel, FlorenceOutput
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel
from .processing_florence import FlorenceProcessor
from .tokenization_florence import FlorenceTokenizer

try:
    __version__ = version("transformers_florence")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

for _config in (FlorenceConfig, FlorenceVisionConfig, FlorenceTextConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(FlorenceConfig, FlorenceModel, exist_ok=True)
AutoModel.register(FlorenceVisionConfig, FlorenceVisionModel, exist_ok=True)
AutoModel.register(FlorenceTextConfig, FlorenceTextModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(FlorenceConfig, FlorenceModel, exist_ok=True)
AutoModelForImageClassification.register(FlorenceVisionConfig, FlorenceForImageClassification, exist_ok=True)
# A dual encoder's checkpoint starts a classifier too, but `AutoModelForImageClassification.register` takes one config.
MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.register(FlorenceConfig, FlorenceForImageClassification, exist_ok=True)
AutoBackbone.register(FlorenceVisionConfig, FlorenceBackbone, exist_ok=True)
for _config in (FlorenceConfig, FlorenceVisionConfig):
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil},
        exist_ok=True,
    )
AutoProcessor.register(FlorenceConfig, FlorenceProcessor, exist_ok=True)
# Not for FlorenceConfig: pipelines that need no text would then make up a tokenizer for folders without one. A folder
# that has one names its class in tokenizer_config.json.
AutoTokenizer.register(FlorenceTextConfig, tokenizer_class=FlorenceTokenizer, exist_ok=True)

__all__ = [
    "FlorenceBackbone",
    "FlorenceConfig",
    "FlorenceForImageClassification",
    "FlorenceImageProcessor",
    "FlorenceImageProcessorPil",
    "FlorenceModel",
    "FlorenceOutput",
    "FlorenceProcessor",
    "FlorenceTextConfig",
    "FlorenceTextModel",
    "FlorenceTokenizer",
    "FlorenceVisionConfig",
    "FlorenceVisionModel",
    "bundled_checkpoint",
    "create_model_card",
    "load_bundled",
    "load_checkpoint",
    "unicl_loss",
    "verify_checkpoint",
    "write_manifest",
]
