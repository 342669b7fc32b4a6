"""What the tests of batches share."""

import pytest

from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor


@pytest.fixture
def processor(tiny) -> Processor:
    folder = str(tiny("qwen2_5_vl"))
    return Processor(folder, load_model_config(folder))
