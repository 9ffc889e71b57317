"""The mixins for image processors, processors and tokenizers, on the classes of the table."""

import subprocess
import tempfile
import unittest
from unittest import mock

import torch
from transformers import CLIPTokenizer, ProcessorMixin

from .entries import (
    DETECTION_IMAGE_PROCESSORS,
    IMAGE_PROCESSORS,
    OPEN_SET_PROCESSOR,
    PROCESSOR,
    TOKENIZER,
    VIDEO_PROCESSOR,
)
from .loader import load
from .reasons import own
from .vocabulary import tokenizer

images = load("test_image_processing_common")
videos = load("test_video_processing_common")


class Settings(images.ImageProcessingTester):
    """Settings that differ from the defaults, so that dropping one shows."""

    SETTINGS = {
        "size": {"shortest_edge": 20},
        "crop_size": {"height": 18, "width": 18},
        "do_resize": True,
        "do_center_crop": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
        "max_aspect_ratio": 50,
    }

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **{**self.SETTINGS, **kwargs})

    def _get_image_processing_classes(self):
        return IMAGE_PROCESSORS


class DetectionSettings(Settings):
    """The detector's: no crop, a batch is padded to its largest picture."""

    SETTINGS = {
        "size": {"shortest_edge": 18, "longest_edge": 30},
        **{name: value for name, value in Settings.SETTINGS.items() if "crop" not in name and name != "size"},
        "do_pad": True,
        "size_divisor": 1,
    }

    def _get_image_processing_classes(self):
        return DETECTION_IMAGE_PROCESSORS


class FlorenceImageProcessorTest(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Settings
    test_cast_dtype = True

    def test_call_numpy_4_channels(self):
        tester = self.image_processor_tester
        tester.num_channels = 4
        pictures = tester.prepare_image_inputs(equal_resolution=False, numpify=True)
        for backend in self.image_processing_classes.values():
            processor = backend(**self.image_processor_dict)
            pixels = processor(pictures, input_data_format="channels_last", return_tensors="pt").pixel_values
            self.assertEqual(tuple(pixels.shape[:2]), (tester.batch_size, 3))
            with self.assertRaisesRegex(ValueError, "image_mean: expected one finite number or three"):
                processor(pictures, image_mean=[0.0] * 4, image_std=[1.0] * 4, do_convert_rgb=False)

    def test_pil_can_run_without_torchvision(self):
        run = subprocess.run

        def run_with_package(command, **options):
            script = command[2].replace(
                "from transformers import", "import transformers_florence\nfrom transformers import"
            )
            assert script != command[2], "the script of the mixin has changed"
            return run([*command[:2], script, *command[3:]], **options)

        with mock.patch.object(subprocess, "run", run_with_package):
            super().test_pil_can_run_without_torchvision()


class FlorenceDetectionImageProcessorTest(FlorenceImageProcessorTest):
    image_processor_tester_class = DetectionSettings


class VideoSettings:
    """Clips, and settings that differ from the defaults. All frames are taken, one by one."""

    batch_size = 5
    num_frames = 8
    num_channels = 3
    min_resolution = 30
    max_resolution = 80
    SETTINGS = {**Settings.SETTINGS, "do_sample_frames": False, "num_frames": 8, "sampling": "segment"}

    def expected_output_video_shape(self, clips) -> tuple[int, ...]:
        """(frames, channels, height, width); a fourth channel is transparency, laid on the matte."""
        crop = self.SETTINGS["crop_size"]
        return self.num_frames, 3, crop["height"], crop["width"]

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return videos.prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            self.min_resolution,
            self.max_resolution,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class FlorenceVideoProcessorTest(videos.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VIDEO_PROCESSOR
    test_cast_dtype = True
    video_processor_dict = VideoSettings.SETTINGS

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoSettings()

    def test_call_sample_frames(self):
        """Upstream's rule first, by which a clip that is too short is an error; then ours, by which it repeats."""
        sample = VIDEO_PROCESSOR.sample_frames

        def never_repeat(processor, metadata, num_frames=None, **options):
            if (num_frames or 0) > metadata.total_num_frames:
                raise ValueError("too short")
            return sample(processor, metadata, num_frames, **options)

        with mock.patch.object(VIDEO_PROCESSOR, "sample_frames", never_repeat):
            super().test_call_sample_frames()
        processor = VIDEO_PROCESSOR(**self.video_processor_dict)
        (clip, *_) = self.video_processor_tester.prepare_video_inputs(return_tensors="torch")
        pixels = processor(clip, do_sample_frames=True, num_frames=16, return_tensors="pt").pixel_values_videos[0]
        alone = processor(clip, return_tensors="pt").pixel_values_videos[0]
        self.assertTrue(torch.equal(pixels, alone.repeat_interleave(2, dim=0)))


class FlorenceProcessorTest(load("test_processing_common").ProcessorTesterMixin, unittest.TestCase):
    processor_class = PROCESSOR

    @classmethod
    def _setup_tokenizer(cls):
        return tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return IMAGE_PROCESSORS["torchvision"]()

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """Upstream compares with the first base, which here is `ManifestMixin`."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name)


class FlorenceZeroShotDetectionProcessorTest(FlorenceProcessorTest):
    processor_class = OPEN_SET_PROCESSOR

    @classmethod
    def _setup_image_processor(cls):
        return DETECTION_IMAGE_PROCESSORS["torchvision"]()


class FlorenceTokenizerTest(
    load("test_tokenization_common").TokenizerTesterMixin,
    load("test_tokenizers_backend_mixin").TokenizersBackendTesterMixin,
    unittest.TestCase,
):
    tokenizer_class = TOKENIZER
    rust_tokenizer_class = TOKENIZER
    from_pretrained_kwargs = {}
    test_seq2seq = False

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        tokenizer().save_pretrained(cls.tmpdirname)
        cls.from_pretrained_id = [cls.tmpdirname]
        cls.tokenizers_list = [(cls.tokenizer_class, cls.tmpdirname, {})]

    def uncut(self):
        """Inside this, texts are left whole unless the call says otherwise, as CLIP's tokenizer does."""
        name = "_get_padding_truncation_strategies"
        return mock.patch.object(TOKENIZER, name, getattr(CLIPTokenizer, name))

    def test_maximum_encoding_length_single_input(self):
        with self.uncut():
            super().test_maximum_encoding_length_single_input()

    def test_maximum_encoding_length_pair_input(self):
        with self.uncut():
            super().test_maximum_encoding_length_pair_input()

    @unittest.skip(
        own("In CLIP's format every text begins with the start token: transformers' CLIPTokenizer needs it too.")
    )
    def test_add_bos_token_without_bos_token(self):
        pass
