"""Florence (Yuan et al., 2021) for Hugging Face Transformers: public names, and registration with its Auto classes.

Importing the package costs next to nothing: a public name is imported when it is first asked for, and the Auto
classes know Florence as soon as they are imported themselves. What editors and type checkers read is `__init__.pyi`.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .import_hook import ImportHook

PUBLIC = {  # by the module that defines them
    "configuration_florence": ["FlorenceConfig", "FlorenceTextConfig", "FlorenceVisionConfig"],
    "configuration_florence_detection": ["FlorenceDetectionConfig"],
    "configuration_florence_fusion": ["FlorenceCaptioningConfig", "FlorenceFusionConfig"],
    "configuration_florence_video": ["FlorenceVideoConfig", "FlorenceVideoTextConfig"],
    "configuration_florence_zero_shot_detection": ["FlorenceZeroShotDetectionConfig"],
    "image_processing_florence": ["FlorenceImageProcessor"],
    "image_processing_florence_detection": ["FlorenceDetectionImageProcessor"],
    "image_processing_pil_florence": ["FlorenceImageProcessorPil"],
    "integrity": ["verify_checkpoint", "write_manifest"],
    "loading": ["bundled_checkpoint", "load_bundled", "load_checkpoint"],
    "losses_contrastive": ["unicl_loss"],
    "model_card": ["create_model_card"],
    "modeling_florence": ["FlorenceForImageClassification", "FlorenceModel", "FlorenceOutput"],
    "modeling_florence_captioning": ["FlorenceForImageCaptioning"],
    "modeling_florence_detection": ["FlorenceForObjectDetection"],
    "modeling_florence_fusion": ["FlorenceFusionModel"],
    "modeling_florence_fusion_heads": [
        "FlorenceForImageTextRetrieval",
        "FlorenceForPreTraining",
        "FlorenceForQuestionAnswering",
        "fusion_learning_rates",
    ],
    "modeling_florence_text": ["FlorenceTextModel"],
    "modeling_florence_video": ["FlorenceForVideoClassification", "FlorenceVideoModel", "inflate_from_image"],
    "modeling_florence_video_retrieval": ["FlorenceForVideoTextRetrieval"],
    "modeling_florence_vision": ["FlorenceBackbone", "FlorenceVisionModel"],
    "modeling_florence_zero_shot_detection": ["FlorenceForZeroShotObjectDetection"],
    "pipelines": ["FlorenceVisualQuestionAnsweringPipeline"],
    "processing_florence": ["FlorenceProcessor"],
    "processing_florence_zero_shot_detection": ["FlorenceZeroShotDetectionProcessor"],
    "tokenization_florence": ["FlorenceTokenizer"],
    "video_decoding": ["FlorenceVideoError"],
    "video_processing_florence": ["FlorenceVideoProcessor", "sample_frame_indices"],
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names}
# Every Auto class imports this; so do all of transformers' models and pipelines.
AUTO_CLASSES = "transformers.models.auto.configuration_auto"

try:
    __version__ = version("transformers_florence")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """A public name, or one of the package's modules, imported now."""
    if name in MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
        globals()[name] = value  # the next look-up does not come here
        return value
    if name in PUBLIC:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, *PUBLIC})


def _register() -> None:
    importlib.import_module(f"{__name__}.registration").register()


ImportHook(AUTO_CLASSES, ("transformers", __name__), _register).install()

__all__ = sorted(MODULES)
