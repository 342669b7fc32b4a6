"""A run's export, through untouched transformers."""

from pathlib import Path

import torch

from tests import oracles
from vapr.batches.loader import open_processor
from vapr.batches.packing import pack
from vapr.data.sources import read_pairs
from vapr.training.export import export


def exported_logps(config, family: str, image_root: Path, out: Path):
    """Export a run, and return the model, and its mean log-probs of chosen and rejected in ``data.eval``, (2,)."""
    export(Path(config.run_dir), out)
    pairs = read_pairs(config.data.eval, image_root=image_root)
    batch = pack([open_processor(config).tokenize_pair(pair) for pair in pairs])
    model = oracles.load_model(out, family)
    with torch.no_grad():
        return model, oracles.pair_logps(model, family, batch).mean(0)
