"""vapr data and vapr audit --model on every family, whose tokens, images and log-probs are the processor's and the model's.

vapr plan is judged in tests/plan; vapr eval and vapr export where a family's own tests are.
"""

from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.conftest import EVERY_FAMILY, FAMILIES
from vapr.audit.measure import audit
from vapr.batches.loader import open_processor
from vapr.batches.survey import survey
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs

ROWS = 8


@pytest.fixture(params=sorted({*EVERY_FAMILY} - {*FAMILIES}))
def family(request) -> str:
    return request.param


@pytest.fixture
def rows(photo_rows) -> list[dict]:
    """With one image, several and none."""
    several = [row for row in photo_rows if len(row.get("images", [])) > 1][:2]
    without = [row for row in photo_rows if not row.get("images")][:2]
    return [*photo_rows[: ROWS - 4], *several, *without]


def test_data_counts_what_the_processor_makes(make_config, family, rows, photo_root):
    config = make_config(family=family, rows=rows)
    processor = open_processor(config)
    tokenized = [processor.tokenize_pair(pair) for pair in read_pairs(config.data.train, image_root=photo_root)]
    found = survey(config)
    assert found["pairs"] == ROWS and found["skipped"]["rows"] == 0
    paths = [pair.paths[0] for pair in tokenized]
    assert found["tokens"]["image"] == sum(int((p.input_ids == processor.image_token_id).sum()) for p in paths) > 0
    assert found["tokens"]["image"] + found["tokens"]["prompt text"] == sum(p.completion_start for p in paths)


def test_an_audit_asks_the_model_with_and_without_images(tiny, family, rows, photo_root, tmp_path, make_config):
    write_pairs(tmp_path / "set.jsonl", rows)
    pairs = read_pairs(tmp_path / "set.jsonl", image_root=photo_root)
    found = audit({"set": pairs}, model=str(tiny(family)))["sets"]["set"]["model"]
    processor = open_processor(make_config(family=family))
    plain = oracles.load_model(Path(tiny(family)), family)
    with torch.no_grad():
        sums = [
            [float(oracles.completion_logps(plain, family, path).sum()) for path in processor.tokenize_pair(pair).paths]
            for pair in pairs
        ]
    margins = [chosen - rejected for chosen, rejected in sums]
    assert found["asked"] == ROWS and found["skipped"]["rows"] == 0
    assert found["with_image"]["margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-3)
    assert found["blind"]["margin"] != pytest.approx(found["with_image"]["margin"], abs=1e-3)
