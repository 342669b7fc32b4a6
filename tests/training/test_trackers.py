"""Trackers get what metrics.jsonl gets, and a resumed run goes on with the same curves."""

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import metrics
from tests.test_cli import assert_one_line_error, vapr
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.errors import UserError
from vapr.training import trainer


class _Crash(Exception):
    pass


@pytest.fixture
def tracked(make_config, photo_rows, photo_root, tmp_path, monkeypatch):
    """``tracked(name)`` -> config of a run that crashed at its fifth step, after a checkpoint at the fourth, and went on."""

    def run(*names: str) -> Config:
        write_pairs(tmp_path / "held_out.jsonl", photo_rows[24:30])
        data = {
            "train": str(tmp_path / "pairs.jsonl"),
            "eval": str(tmp_path / "held_out.jsonl"),
            "image_root": str(photo_root),
        }
        config = make_config("my-run", data=data, trackers=list(names), checkpoint={"every": 4, "keep": 2})
        write = trainer.MetricsLog.write

        def crashing(log, step, values):
            write(log, step, values)
            if step == 5:
                raise _Crash

        monkeypatch.setattr(trainer.MetricsLog, "write", crashing)
        with pytest.raises(_Crash):
            trainer.train(config)
        monkeypatch.setattr(trainer.MetricsLog, "write", write)
        trainer.train(config, resume=True)
        return config

    return run


def logged(config: Config, key: str) -> dict[int, float]:
    return {entry["step"]: pytest.approx(entry[key], rel=1e-6) for entry in metrics(config) if key in entry}


KEYS = ("loss", "rewards/chosen", "eval/loss")


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tracked("tensorboard")
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard"))
    events.Reload()
    for key in KEYS:
        points = events.Scalars(key)
        assert len(points) == len({point.step for point in points})
        assert {point.step: point.value for point in points} == logged(config, key)


def test_trackio(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config = tracked("trackio")
    [name] = SQLiteStorage.get_runs("vapr")
    assert name.startswith("my-run-")
    rows = SQLiteStorage.get_logs("vapr", name)
    for key in KEYS:
        points = [(row["step"], row[key]) for row in rows if key in row]
        assert len(points) == len(dict(points)) and dict(points) == logged(config, key)


def test_mlflow(tracked, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((tmp_path / "mlflow").as_uri())
    config = tracked("mlflow")
    client = mlflow.MlflowClient()
    [run] = client.search_runs([client.get_experiment_by_name("vapr").experiment_id])
    assert (run.info.run_name, run.info.status) == ("my-run", "FINISHED")
    for key in KEYS:
        points = [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, key)]
        assert len(points) == len(dict(points)) and dict(points) == logged(config, key)


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Records of a log in LevelDB's format, https://github.com/google/leveldb/blob/main/doc/log_format.md."""
    place, whole = 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits the rest of a block
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, last
            yield whole
            whole = b""


def test_wandb(tracked, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = tracked("wandb")
    assert wandb.run is None  # finished
    found: dict[str, list[tuple[int, float]]] = {}
    files = sorted(Path(config.run_dir).glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # two files of one run, to be synced as one
    for file in files:
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for key in KEYS:
                    if key in row:
                        found.setdefault(key, []).append((row["_step"], row[key]))
    for key in KEYS:
        assert len(found[key]) == len(dict(found[key])) and dict(found[key]) == logged(config, key)


def test_an_uninstalled_tracker_is_named_before_anything_is_loaded(make_config, monkeypatch):
    config = make_config(trackers=["tensorboard", "wandb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    monkeypatch.setattr(trainer, "open_loaders", None)
    with pytest.raises(UserError, match="trackers: wandb is not installed; pip install wandb, or leave it out"):
        trainer.train(config)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[wand]", "trackers.0: should be 'tensorboard', 'wandb', 'trackio' or 'mlflow', got 'wand'"),
        ("[wandb, wandb]", "trackers must be names without repetition, got ['wandb', 'wandb']"),
        ("wandb", "trackers: should be a list such as [tensorboard, wandb], got 'wandb'"),
    ],
)
def test_mistakes_are_one_line(make_config, tmp_path, value, message):
    (tmp_path / "run.json").write_text(json.dumps(make_config().as_dict()))
    assert_one_line_error(vapr("train", "run.json", "--set", f"trackers={value}", cwd=tmp_path), message)


def test_no_tracker_is_no_file(make_config):
    config = make_config(trackers=[], optim={"lr": 1e-3, "pairs_per_step": 8, "max_steps": 1})
    trainer.train(config)
    assert len(metrics(config)) == 1 and not (Path(config.run_dir) / "tensorboard").exists()
