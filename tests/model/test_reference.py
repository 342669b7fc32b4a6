"""The caches of reference log-probs and image features: found by content, sound after damage, built ahead, resumed."""

import dataclasses
import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tests.runs import final_bytes, losses
from vapr.batches.tokenize import Processor
from vapr.config import Config
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.model import image_features, reference, sharded_cache
from vapr.model.policy import load_policy
from vapr.model.policy_id import open_cache_folder
from vapr.model.sharded_cache import ShardedCache
from vapr.training import fill_caches as prepare
from vapr.training import trainer

NO_SHARD = "cut short, or not of safetensors"


def shards(tmp_path: Path, name: str = "reference") -> list[Path]:
    return sorted((tmp_path / name).glob("*/*.safetensors"))


def flip_a_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_damaged_value_costs_one_completion(make_config, tmp_path, capsys):
    trainer.train(make_config("before"))
    expected = losses(make_config("before"))
    files = shards(tmp_path)
    for shard in files:
        flip_a_bit(shard, -1)  # in the last value of the last record
    capsys.readouterr()
    trainer.train(make_config("after"))
    printed = capsys.readouterr()
    assert printed.err.count("is damaged; values that it lost are computed again") == len(files) > 0
    assert f" {len(files)} computed" in printed.out
    assert losses(make_config("after")) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            lambda file: flip_a_bit(file, int.from_bytes(file.read_bytes()[:8], "little") + 12),
            "its checksum does not match",
        ),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), NO_SHARD),
        (lambda file: file.write_bytes(b""), NO_SHARD),
        (lambda file: file.write_bytes(b"not a shard at all, but long enough"), NO_SHARD),
    ],
    ids=["index", "cut short", "empty", "something else"],
)
def test_a_damaged_shard_is_set_aside_and_computed_again(make_config, tmp_path, capsys, damage, reason):
    trainer.train(make_config("before"))
    for shard in shards(tmp_path):
        damage(shard)
    capsys.readouterr()
    trainer.train(make_config("after"))
    out = capsys.readouterr().out
    assert f"is damaged ({reason}); set aside as" in out and " 48 computed" in out
    assert losses(make_config("after")) == losses(make_config("before"))


def cut_shards_after(monkeypatch, tmp_path: Path, step: int) -> None:
    """Every shard is emptied once so many steps were taken."""
    real, taken = trainer.Engine.step, []

    def step_and_cut(engine):
        real(engine)
        taken.append(1)
        if len(taken) == step:
            for shard in shards(tmp_path):
                shard.open("r+b").truncate(100)

    monkeypatch.setattr(trainer.Engine, "step", step_and_cut)


def test_a_cache_cut_short_during_a_run_with_adapters_is_computed_again(make_config, tmp_path, monkeypatch, capsys):
    trainer.train(make_config("whole"))
    cut_shards_after(monkeypatch, tmp_path, step=3)
    capsys.readouterr()
    trainer.train(make_config("cut"))
    assert "is damaged; values that it lost are computed again" in capsys.readouterr().err
    assert losses(make_config("cut")) == pytest.approx(losses(make_config("whole")), abs=1e-6)


def test_a_cache_cut_short_during_full_fine_tuning_stops_it_and_resuming_heals_it(make_config, tmp_path, monkeypatch):
    whole = make_config("whole", lora=False)
    trainer.train(whole)
    cut_shards_after(monkeypatch, tmp_path, step=3)
    cut = make_config("cut", lora=False, checkpoint={"every": 100})
    with pytest.raises(
        UserError, match=r"reference cache changed since the run began; .* the 3 steps before it are saved"
    ):
        trainer.train(cut)
    monkeypatch.undo()
    trainer.train(cut, resume=True)
    assert final_bytes(cut) == final_bytes(whole)


def test_many_shards_are_found_like_one(make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharded_cache, "FLUSH_BYTES", 1)  # a shard a pack
    trainer.train(make_config("before", packing={"max_tokens": 190}))
    assert len(shards(tmp_path)) > 8
    capsys.readouterr()
    trainer.train(make_config("after"))
    assert ", 0 computed" in capsys.readouterr().out


def test_prepared_values_are_all_found(make_config, capsys):
    config = make_config()
    counts = prepare.prepare(config)["reference"]
    assert (counts["found"], counts["computed"], counts["on disk"]) == (0, 48, 48)
    assert prepare.prepare(config)["reference"]["computed"] == 0
    trainer.train(config)
    assert " found in the cache, 0 computed" in capsys.readouterr().out


class _Crash(Exception):
    pass


def test_a_killed_preparation_goes_on_where_it_was(make_config, monkeypatch, capsys):
    config = make_config(packing={"max_tokens": 2048})
    monkeypatch.setattr(prepare, "SECONDS_BETWEEN_SAVES", 0.0)
    real, packs = reference.Reference.logps, []

    def crashing(self, batch, features=None):
        packs.append(len(batch.pairs))
        if len(packs) == 3:
            raise _Crash
        return real(self, batch, features)

    monkeypatch.setattr(reference.Reference, "logps", crashing)
    with pytest.raises(_Crash):
        prepare.prepare(config)
    monkeypatch.setattr(reference.Reference, "logps", real)
    counts = prepare.prepare(config)["reference"]
    assert "2 of 3 steps were prepared before" in capsys.readouterr().err
    assert (counts["found"], counts["computed"], counts["on disk"]) == (0, 16, 48)


def test_lost_values_void_the_note_of_what_was_prepared(make_config, tmp_path):
    config = make_config()
    prepare.prepare(config)
    for shard in shards(tmp_path):
        shard.unlink()
    assert prepare.prepare(config)["reference"]["computed"] == 48


def test_a_changed_row_costs_that_row(make_config, photo_rows):
    prepare.prepare(make_config())
    rows = [dict(row) for row in photo_rows[:24]]
    rows[7]["rejected"] = "Something else."
    rows[7].pop("edits", None)
    counts = prepare.prepare(make_config(rows=rows))["reference"]
    assert (counts["found"], counts["computed"]) == (47, 1)


def test_damaged_values_are_found_before_full_fine_tuning_begins(make_config, tmp_path, capsys):
    config = make_config(lora=False)
    prepare.prepare(config)
    for shard in shards(tmp_path):
        flip_a_bit(shard, -1)
    assert prepare.prepare(config)["reference"]["computed"] == 48
    assert "is damaged (a value's checksum does not match); set aside" in capsys.readouterr().err
    trainer.train(config)


def test_a_changed_image_is_noticed_although_its_row_is_the_same(make_config, photo_rows, photo_root, tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for name in {name for row in photo_rows[:24] for name in row.get("images", [])}:
        shutil.copy(photo_root / name, root / name)
    config = make_config(data={"train": str(tmp_path / "pairs.jsonl"), "image_root": str(root)})
    prepare.prepare(config)
    name = photo_rows[0]["images"][0]
    Image.open(root / name).convert("RGB").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(root / name)
    showing = sum(name in row.get("images", []) for row in photo_rows[:24])
    counts = prepare.prepare(config)["reference"]
    assert counts["computed"] == 2 * showing and counts["found"] == 48 - 2 * showing


def test_rows_skipped_in_an_earlier_preparation_are_still_told(make_config, photo_rows, photo_root, tmp_path):
    rows = [dict(row) for row in photo_rows[:24]]
    del rows[3]["chosen"]
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root), "on_bad_row": "skip"}
    config = make_config(rows=rows, data=data)
    assert [list(prepare.prepare(config)["skipped"]) for _ in range(2)] == [[f"{tmp_path}/pairs.jsonl:4"]] * 2


def test_every_row_of_a_mixture_is_prepared_once(make_config, photo_rows, photo_root, tmp_path):
    from vapr.data.pairs import write_pairs

    write_pairs(tmp_path / "more.jsonl", photo_rows[24:40])
    sources = [
        {"path": str(tmp_path / "pairs.jsonl"), "weight": 2},
        {"path": str(tmp_path / "more.jsonl"), "weight": 0.25},
    ]
    config = make_config(data={"train": sources, "image_root": str(photo_root)})
    assert prepare.prepare(config)["reference"]["computed"] == 2 * 40


def test_nothing_to_prepare_is_said(make_config):
    with pytest.raises(UserError, match="simpo needs no reference, and features.cache is false"):
        prepare.prepare(make_config(loss={"kind": "simpo"}))


def with_features(make_config, tmp_path, name: str, **changes) -> Config:
    return make_config(name, features={"cache": True, "cache_dir": str(tmp_path / "features")}, **changes)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_cached_features_change_no_loss(make_config, tmp_path, family, capsys):
    plain = make_config("plain", family=family, reference={"cache_dir": str(tmp_path / "one")})
    trainer.train(plain)
    for name in ("first", "second"):
        cached = with_features(
            make_config, tmp_path, name, family=family, reference={"cache_dir": str(tmp_path / "two")}
        )
        trainer.train(cached)
        assert losses(cached) == pytest.approx(losses(plain), abs=1e-5)
    assert "features   about 6 images x" in capsys.readouterr().out
    assert shards(tmp_path, "features")


def test_prepared_features_spare_the_tower(make_config, tmp_path, monkeypatch):
    config = with_features(make_config, tmp_path, "run")
    counts = prepare.prepare(config)["features"]
    assert counts["computed"] == counts["on disk"] == 6
    monkeypatch.setattr(image_features, "image_features", lambda *_: 1 / 0)
    trainer.train(config)


def test_a_cache_of_answers_tokenised_by_themselves_is_never_hit(make_config, tmp_path):
    """What vapr did before, for LLaVA: another key, in another folder, so its notes of what is prepared say nothing."""
    config = make_config("run", family="llava")
    policy = load_policy(config.policy)
    processor = Processor(config.policy.model, policy.base.config, "pil")
    pair = next(iter(read_pairs(Path(config.data.train), image_root=config.data.image_root)))
    path = processor.tokenize_pair(pair).paths[0]
    text = " " + pair.chosen[0]["content"][0]["text"] + " "
    alone = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    before = dataclasses.replace(path, input_ids=np.concatenate([path.input_ids[: path.completion_start], alone]))
    root = tmp_path / "reference"
    cache = reference.Reference(policy, str(root))
    assert cache.key(before) != cache.key(path)
    old_folder, _ = open_cache_folder(policy, "reference", str(root), version=2)
    assert cache.folder != old_folder


def test_another_transformers_makes_prepare_look_again(make_config, tmp_path, monkeypatch):
    """What becomes of transparency is the library's to say: a note of what was prepared is of one version."""
    config = make_config("run")
    prepare.prepare(config)
    notes = set((tmp_path / "reference").glob("*/prepared-*.json"))
    monkeypatch.setattr(prepare.transformers, "__version__", "5.20.99")
    prepare.prepare(config)
    assert len(set((tmp_path / "reference").glob("*/prepared-*.json")) - notes) == len(notes) == 1


def test_damaged_features_are_computed_again(make_config, tmp_path, capsys):
    trainer.train(with_features(make_config, tmp_path, "before"))
    for shard in shards(tmp_path, "features"):
        flip_a_bit(shard, -1)
    capsys.readouterr()
    trainer.train(with_features(make_config, tmp_path, "after"))
    assert "is damaged; values that it lost are computed again" in capsys.readouterr().err
    assert losses(with_features(make_config, tmp_path, "after")) == pytest.approx(
        losses(with_features(make_config, tmp_path, "before")), abs=2e-6
    )


def test_features_that_do_not_fit_the_disk_are_refused_before_any_work(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(UserError, match=r"features.cache: about 6 images x .* do not fit"):
        prepare.prepare(with_features(make_config, tmp_path, "run"))


def test_features_of_a_trained_tower_are_refused(make_config):
    with pytest.raises(UserError, match=r"features.cache: the features change when policy.train names"):
        make_config(features={"cache": True}, policy={"model": "x", "train": {"vision_tower": True}})


def test_cache_files_hold_no_pickle(make_config, tmp_path):
    prepare.prepare(with_features(make_config, tmp_path, "run"))
    for file in (*shards(tmp_path), *shards(tmp_path, "features")):
        content = file.read_bytes()
        assert isinstance(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]), dict)


def record(key: bytes, values: np.ndarray) -> bytes:
    return key + zlib.crc32(key + values.tobytes()).to_bytes(4, "little") + values.tobytes()


def test_shards_of_earlier_versions_are_found(tmp_path):
    """The format of the files, written out: whoever changes it makes every cache on users' disks worthless."""
    keys = [bytes([n]) * 16 for n in (1, 200)]
    values = [np.arange(n, dtype=np.float32) for n in (3, 7)]
    starts = np.array([0, 20 + 4 * 3])
    index = {"heads": np.array([int.from_bytes(key[:8], "big") for key in keys], np.uint64), "starts": starts}
    index["lengths"] = np.array([3, 7], np.int32)
    crc32 = zlib.crc32(b"".join(index[name].tobytes() for name in ("heads", "starts", "lengths")))
    records = np.frombuffer(b"".join(map(record, keys, values)), np.uint8)
    save_file({**index, "records": records}, tmp_path / "a.safetensors", {"crc32": str(crc32), "reference": "{}"})
    cache = ShardedCache(tmp_path, b"{}", np.float32)
    assert len(cache) == 2 and [cache.get(key).tolist() for key in keys] == [value.tolist() for value in values]
    assert cache.get(b"\2" * 16) is None and not cache.messages


def filled_cache(folder: Path, num_shards: int) -> tuple[ShardedCache, list[bytes]]:
    folder.mkdir(exist_ok=True)
    cache = ShardedCache(folder, b"{}", np.float32)
    keys = [hashlib.sha256(bytes([n])).digest()[:16] for n in range(4 * num_shards)]
    for number, key in enumerate(keys, start=1):
        cache.put(key, np.full(number, number, np.float32))
        if number % 4 == 0:
            cache.flush()
    return cache, keys


def test_every_flipped_bit_of_a_shard_is_noticed(tmp_path):
    cache, keys = filled_cache(tmp_path / "whole", 1)
    content = (cache.folder / cache.shards[0]).read_bytes()
    for place in range(8 + int.from_bytes(content[:8], "little"), len(content)):
        folder = tmp_path / str(place)
        shutil.copytree(cache.folder, folder)
        flip_a_bit(folder / cache.shards[0], place)
        damaged = ShardedCache(folder, b"{}", np.float32)
        found = [damaged.get(key) for key in keys]
        assert sum(values is None for values in found) in (1, 4) and len(damaged.messages) == 1
        assert all(values is None or values.tolist() == [n] * n for n, values in enumerate(found, start=1))


def test_verify_sets_aside_only_damaged_shards(tmp_path):
    cache, keys = filled_cache(tmp_path / "cache", 3)
    flip_a_bit(cache.folder / cache.shards[1], -1)
    (cache.folder / cache.shards[2]).open("r+b").truncate(200)
    cache.verify()
    assert len(cache) == 4 and len(cache.messages) == 2 and len(list(cache.folder.glob("*.damaged"))) == 2
    assert sum(cache.get(key) is not None for key in keys) == 4


def test_a_shard_that_another_run_sets_aside_meanwhile_is_no_mistake(tmp_path, monkeypatch):
    cache, _ = filled_cache(tmp_path / "cache", 2)
    gone = cache.folder / cache.shards[0]
    monkeypatch.setattr(Path, "glob", lambda self, _: [gone.with_name("gone.safetensors"), gone])
    assert len(ShardedCache(cache.folder, b"{}", np.float32)) == 4
