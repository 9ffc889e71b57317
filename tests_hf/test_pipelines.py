"""PipelineTesterMixin on tiny checkpoints of the classes of the table."""

import unittest

from .pipelines import CHECKPOINTS, load_mixin, served, write_checkpoints


class FlorencePipelinesTest(load_mixin().PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = served()

    @classmethod
    def setUpClass(cls):
        write_checkpoints(CHECKPOINTS)
