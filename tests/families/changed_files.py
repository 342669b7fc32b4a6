"""Models whose files say something else than they should."""

import json
from pathlib import Path

from vapr.batches.model_config import load_model_config
from vapr.batches.tokenize import Processor


def change(folder: Path, file: str, **settings) -> None:
    """Give a JSON file of a model other settings."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def processor_of(folder: Path) -> Processor:
    return Processor(str(folder), load_model_config(str(folder)), "pil")
