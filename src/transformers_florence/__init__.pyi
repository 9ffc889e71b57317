from .configuration_florence import FlorenceConfig as FlorenceConfig
from .configuration_florence import FlorenceTextConfig as FlorenceTextConfig
from .configuration_florence import FlorenceVisionConfig as FlorenceVisionConfig
from .image_processing_florence import FlorenceImageProcessor as FlorenceImageProcessor
from .image_processing_pil_florence import FlorenceImageProcessorPil as FlorenceImageProcessorPil
from .integrity import verify_checkpoint as verify_checkpoint
from .integrity import write_manifest as write_manifest
from .loading import bundled_checkpoint as bundled_checkpoint
from .loading import load_bundled as load_bundled
from .loading import load_checkpoint as load_checkpoint
from .losses_contrastive import unicl_loss as unicl_loss
from .model_card import create_model_card as create_model_card
from .modeling_florence import FlorenceForImageClassification as FlorenceForImageClassification
from .modeling_florence import FlorenceModel as FlorenceModel
from .modeling_florence import FlorenceOutput as FlorenceOutput
from .modeling_florence_text import FlorenceTextModel as FlorenceTextModel
from .modeling_florence_vision import FlorenceBackbone as FlorenceBackbone
from .modeling_florence_vision import FlorenceVisionModel as FlorenceVisionModel
from .processing_florence import FlorenceProcessor as FlorenceProcessor
from .tokenization_florence import FlorenceTokenizer as FlorenceTokenizer

__version__: str
