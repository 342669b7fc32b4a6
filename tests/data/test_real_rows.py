"""Public preference and instruction files, from the folder that VAPR_REAL_DATA names. Their pictures are drawn here."""

import json
import os
from pathlib import Path
from zlib import crc32

import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from tests.editing.edit_jobs import pairs_in
from vapr.audit.measure import audit
from vapr.cli import main
from vapr.data.sources import read_pairs


def real(*parts: str) -> Path:
    """A file of the folder; the test is skipped where there is none."""
    if not (folder := os.environ.get("VAPR_REAL_DATA")):
        pytest.skip("VAPR_REAL_DATA is not set")
    return Path(folder).joinpath(*parts)


def draw(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 40), (crc32(file.name.encode()) % 256, 90, 40)).save(file)


@pytest.fixture
def ha_dpo(tmp_path) -> tuple[Path, list[dict]]:
    """HA-DPO's file beside a picture for each of its ids, where Visual Genome has them; and its rows."""
    file = real("prefs", "ha_dpo", "pope_data.200.json")
    rows = json.loads(file.read_text())
    for row in rows:
        draw(tmp_path / "VG_100K" / f"{row['image_id']}.jpg")
    (tmp_path / file.name).symlink_to(file)
    return tmp_path / file.name, rows


def run_config(folder: Path, source: Path, model: Path, **data: object) -> Path:
    raw = {
        "run_dir": str(folder / "run"),
        "policy": {"model": str(model), "dtype": "float32", "lora": {"rank": 2}},
        "data": {"train": str(source), "workers": 0, **data},
        "optim": {"pairs_per_step": 4, "max_steps": 1},
        "reference": {"cache_dir": str(folder / "reference")},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def texts(pair) -> tuple[str, str, str]:
    return tuple(side[-1]["content"][-1]["text"] for side in (pair.prompt, pair.chosen, pair.rejected))


def test_ha_dpo_is_read_as_a_format_and_by_columns(ha_dpo):
    file, rows = ha_dpo
    wanted = [(row["question"], row["chosen"], row["reject"]) for row in rows if not row["correct"]]
    assert 0 < len(wanted) < len(rows) == 200
    pairs = read_pairs(file)
    assert pairs.sets[0].format == "ha-dpo"
    assert [texts(pair) for pair in pairs] == wanted and len(pairs.skipped) == len(rows) - len(wanted)
    assert all(pair.images[0].parent.name == "VG_100K" for pair in pairs)
    columns = {"prompt": "question", "rejected": "reject"}  # chosen has its name already
    by_columns = read_pairs(file, columns=columns, images_needed=False)
    assert [texts(pair) for pair in by_columns] == [(row["question"], row["chosen"], row["reject"]) for row in rows]


def test_ha_dpo_is_surveyed_audited_and_trained_on_for_a_step(ha_dpo, tiny, tmp_path):
    file, rows = ha_dpo
    config = run_config(tmp_path, file, tiny("qwen2_5_vl"))
    found = CliRunner().invoke(main, ["data", str(config), "--json"])
    assert found.exit_code == 0, found.stderr
    survey = json.loads(found.stdout)["train"]
    wrong = [row for row in rows if not row["correct"]]
    assert (survey["rows"], survey["rows_read"]) == (200, 200)
    [reason] = survey["skipped"]["reasons"]
    assert reason["reason"] == "no preference: marked correct"
    assert reason["rows"] == survey["skipped"]["rows"] == 200 - survey["pairs"] == 200 - len(wrong)
    assert survey["pairs_with_images"] == len(wrong)
    trained = CliRunner().invoke(main, ["train", str(config)])
    assert trained.exit_code == 0, trained.stderr
    [step] = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert step["loss"] == pytest.approx(0.693147, abs=1e-4)
    audited = audit({"ha-dpo": read_pairs(file, images_needed=False)})["sets"]["ha-dpo"]
    assert audited["pairs"] == len(wrong) and audited["skipped"]["rows"] == 200 - len(wrong)


def test_llava_instruct_goes_through_vapr_edit_with_rules(tmp_path):
    file = real("prefs", "llava_instruct", "llava90_instruct.json")
    rows = {row["id"]: row for row in json.loads(file.read_text())}
    for row in rows.values():
        draw(tmp_path / row["image"])
    (tmp_path / file.name).symlink_to(file)
    arguments = ["--out", str(tmp_path / "out"), "--json", "--set", "plan.balance=uniform"]
    ran = CliRunner().invoke(main, ["edit", str(tmp_path / file.name), *arguments])
    assert ran.exit_code == 0, ran.stderr
    ledger = json.loads(ran.stdout)
    assert (ledger["source"]["rows"], ledger["source"]["bad_rows"], ledger["source"]["unused_columns"]) == (90, 0, {})
    pairs = pairs_in(tmp_path / "out")
    assert ledger["accepted"] == len(pairs) > 0
    left = sum(ledger["rejected"].values())
    assert left >= 80 and any(reason.startswith("needs a language model: ") for reason in ledger["rejected"])
    for pair in pairs:
        chosen, rejected = (pair[side][0]["content"][0]["text"] for side in ("chosen", "rejected"))
        said = rows[pair["provenance"]["source_id"]]["conversations"]
        assert (said[0]["value"], said[1]["value"]) == (f"<image>\n{pair['prompt'][0]['content'][1]['text']}", chosen)
        for edit in reversed(pair["edits"]):  # from the end, so that the places before it stay
            assert chosen[edit["start"] : edit["end"]] == edit["from"]
            chosen = chosen[: edit["start"]] + edit["to"] + chosen[edit["end"] :]
        assert chosen == rejected
    assert len(list(read_pairs(tmp_path / "out"))) == len(pairs)


def test_llava_instruct_is_no_data_to_train_on(tiny, tmp_path):
    file = real("prefs", "llava_instruct", "llava90_instruct.json")
    for arguments in (["train", str(run_config(tmp_path, file, tiny("qwen2_5_vl")))], ["audit", str(file)]):
        refused = CliRunner().invoke(main, arguments)
        assert (
            refused.exit_code == 2
            and f"Error: {file}:1: 'rejected' is missing: this row looks like instruction data" in refused.stderr
        )
