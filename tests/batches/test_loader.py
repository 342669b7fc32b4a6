"""Which pairs a step holds: mixtures, images side by side, and an order that depends on seed and epoch alone."""

import itertools
from collections import Counter

import numpy as np
import pytest

from vapr.batches.loader import PairLoader, load_pairs, open_loaders
from vapr.batches.model_config import load_model_config
from vapr.batches.survey import stops_training, survey
from vapr.batches.tokenize import Processor
from vapr.config import Config, SourceConfig
from vapr.data.pairs import Pairs, write_pairs
from vapr.data.sources import open_sets
from vapr.errors import UserError

ROW = {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


@pytest.fixture
def two_sets(tmp_path):
    """Ten rows and four rows."""
    for name, size in (("a", 10), ("b", 4)):
        write_pairs(tmp_path / f"{name}.jsonl", [{**ROW, "id": f"{name}{n}"} for n in range(size)])
    return tmp_path


def sets_of(path, **options) -> list:
    return open_sets(SourceConfig(path=str(path), **options))


def mixed(folder, *weights: float) -> Pairs:
    return Pairs(
        [part for name, w in zip("ab", weights, strict=True) for part in sets_of(folder / f"{name}.jsonl", weight=w)]
    )


def loader_of(pairs, processor, seed: int = 7, shuffle: bool = True, share: str = "pair") -> PairLoader:
    config = Config.parse({
        "run_dir": "unused", "policy": {"model": "unused"}, "seed": seed, "packing": {"share": share},
        "data": {"train": "unused", "workers": 0, "shuffle": shuffle}, "optim": {"pairs_per_step": 4},
    })  # fmt: skip
    return load_pairs(config, pairs, processor)


def test_weights_say_how_often_a_row_is_seen_in_an_epoch(two_sets, processor):
    pairs = mixed(two_sets, 0.5, 2.5)
    loader = loader_of(pairs, processor)
    assert loader.pairs_per_epoch == 5 + 10 and loader.steps_per_epoch == 4
    epochs = [Counter(loader.order(epoch).tolist()) for epoch in range(2)]
    for seen in epochs:
        assert sum(seen[n] for n in range(10)) == 5 and max(seen[n] for n in range(10)) == 1
        assert sorted(seen[n] for n in range(10, 14)) == [2, 2, 3, 3]
    assert epochs[0] != epochs[1]  # another half
    assert Counter(n for e in range(40) for n in loader.order(e).tolist() if n < 10).keys() == set(range(10))
    assert sorted(loader.once().order(0).tolist()) == list(range(14))


def test_part_of_a_set_is_another_part_each_epoch_until_all_was_seen(two_sets, processor):
    for shuffle in (True, False):
        loader = loader_of(mixed(two_sets, 0.2, 1), processor, shuffle=shuffle)
        seen = [[n for n in loader.order(epoch).tolist() if n < 10] for epoch in range(5)]
        assert all(len(part) == 2 for part in seen) and sorted(n for part in seen for n in part) == list(range(10))


def test_a_weight_counts_the_rows_of_a_source_not_of_each_file(tmp_path, processor):
    for number in range(20):
        write_pairs(tmp_path / f"{number:02d}.jsonl", [{**ROW, "id": f"{number}-{n}"} for n in range(2)])
    loader = loader_of(Pairs(sets_of(tmp_path, weight=0.25)), processor)
    assert loader.pairs_per_epoch == 10 and len(set(loader.order(0).tolist())) == 10


def test_a_weight_that_leaves_no_row_is_refused(two_sets, tiny, processor):
    config = config_for(tiny, {"train": {"path": str(two_sets / "b.jsonl"), "weight": 0.1}})
    refused = pytest.raises(UserError, match="weight 0.1 of 4 rows is less than one row an epoch; raise it")
    with refused, open_loaders(config):
        pass


def test_the_order_by_image_does_not_depend_on_where_the_images_lie(tmp_path, processor, monkeypatch):
    orders = []
    for place in ("x", "y"):
        folder = tmp_path / place
        folder.mkdir()
        for name in "abcdef":
            (folder / f"{name}.png").write_bytes(b"any")
        write_pairs(
            folder / "pairs.jsonl", [{**ROW, "id": str(n), "images": [f"{'abcdef'[n % 6]}.png"]} for n in range(30)]
        )
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"cache-{place}"))
        orders.append(loader_of(Pairs(sets_of(folder / "pairs.jsonl")), processor, share="image").order(1).tolist())
    assert orders[0] == orders[1]


def test_the_order_is_a_function_of_seed_and_epoch(two_sets, processor):
    pairs = mixed(two_sets, 1, 1)
    for share in ("pair", "image"):
        orders = [loader_of(pairs, processor, share=share).order(epoch).tolist() for epoch in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2] and all(sorted(order) == list(range(14)) for order in orders)
    assert loader_of(pairs, processor, seed=8).order(0).tolist() != loader_of(pairs, processor).order(0).tolist()
    assert loader_of(pairs, processor, shuffle=False).order(3).tolist() == list(range(14))


def test_a_step_far_ahead_is_the_same_as_if_one_had_walked_there(two_sets, processor):
    pairs = mixed(two_sets, 1, 1)
    walked = [[pair.id for pair in step.pairs] for step in loader_of(pairs, processor).steps(0, 12)]
    assert [[p.id for p in step.pairs] for step in loader_of(pairs, processor).steps(9, 12)] == walked[9:]


def test_pairs_of_one_image_stand_together(photo_root, tmp_path, processor):
    names = ["coffee.png", "chelsea.png", "rocket.jpg"]
    rows = [{**ROW, "id": str(n), "images": [names[n % 3]] if n % 4 else []} for n in range(24)]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    pairs = Pairs(sets_of(tmp_path / "pairs.jsonl", image_root=str(photo_root)))
    assert pairs.num_images == 3
    order = loader_of(pairs, processor, share="image").order(0)
    shown = [rows[n]["images"][0] for n in order if rows[n]["images"]]
    assert sum(a != b for a, b in itertools.pairwise(shown)) == 2  # three runs of one image each
    alone = [n for n in order if not rows[n]["images"]]
    assert np.ptp([order.tolist().index(n) for n in alone]) > len(alone)  # rows without image are no group


def config_for(tiny, data: dict, **changes) -> Config:
    return Config.parse({
        "run_dir": "unused",
        "policy": {"model": str(tiny("qwen2_5_vl")), "dtype": "float32"},
        "data": {"workers": 0, **data},
        "optim": {"pairs_per_step": 4},
        **changes,
    })  # fmt: skip


def test_data_settings_reach_every_set(two_sets, tiny, processor, capsys):
    sources = [{"path": str(two_sets / "a.jsonl"), "weight": 0.5}, {"path": str(two_sets / "b.jsonl"), "format": "trl"}]
    with open_loaders(config_for(tiny, {"train": sources, "format": "vapr"})) as loaders:
        loader = loaders["train"]
    assert [part.format for part in loader.pairs.sets] == ["vapr", "trl"]
    out = capsys.readouterr().out
    assert "a.jsonl (10 rows, format vapr, weight 0.5)" in out and "checked all rows; 0 have images" in out


def test_the_survey_counts(tiny, tmp_path, photo_root):
    """Two pairs on one photograph, one without, one bad, one too long: every figure can be counted by hand."""
    rows = [
        {**ROW, "id": "1", "images": ["coffee.png"]},
        {**ROW, "id": "2", "images": ["coffee.png"], "chosen": "A cat.", "rejected": "A cup."},
        {**ROW, "id": "3"},
        {**ROW, "id": "4", "images": ["nothing.png"]},
        {**ROW, "id": "5", "chosen": "word " * 3000},
    ]
    write_pairs(tmp_path / "pairs.jsonl", rows)
    data = {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root)}
    config = config_for(tiny, data, packing={"max_tokens": 1000})
    result = survey(config)
    assert (result["rows"], result["pairs"], result["pairs_with_images"], result["images"]) == (5, 3, 2, 1)
    assert result["sets"] == [f"{tmp_path}/pairs.jsonl (5 rows, format vapr)"]
    folder = str(tiny("qwen2_5_vl"))
    processor = Processor(folder, load_model_config(folder))
    pairs = Pairs(sets_of(tmp_path / "pairs.jsonl", image_root=str(photo_root)))
    tokenized = [processor.tokenize_pair(pairs[n]) for n in range(3)]
    paths = [path for pair in tokenized for path in pair.paths]
    assert result["tokens"]["image"] == 2 * tokenized[0].paths[0].images[0].num_tokens
    assert result["sharing"]["tokens_unshared"] == sum(len(path.input_ids) for path in paths)
    prompts = sum(pair.paths[0].completion_start for pair in tokenized)
    assert result["tokens"]["image"] + result["tokens"]["prompt text"] == prompts
    kinds = ("answers' common beginning", "chosen, rest", "rejected, rest")
    assert result["sharing"]["tokens_packed"] == prompts + sum(result["tokens"][kind] for kind in kinds)
    assert result["longest"][0]["tokens"] == max(len(path.input_ids) for path in paths)
    assert result["skipped"]["rows"] == 2
    reasons = {entry["reason"]: entry["rows"] for entry in result["skipped"]["reasons"]}
    assert sorted(reasons.values()) == [1, 1] and any("not found" in reason for reason in reasons)
    assert "nothing.png" in stops_training(config, result) or "tokens" in stops_training(config, result)
    skipping = config_for(tiny, {**data, "on_bad_row": "skip", "too_long": "skip"}, packing={"max_tokens": 1000})
    assert stops_training(skipping, survey(skipping)) is None


def test_a_pair_with_two_images_shares_nothing_in_the_survey(tiny, tmp_path, photo_root):
    row = {**ROW, "rejected": ROW["chosen"], "images": ["coffee.png"], "rejected_images": ["rocket.jpg"]}
    write_pairs(tmp_path / "pairs.jsonl", [row])
    result = survey(config_for(tiny, {"train": str(tmp_path / "pairs.jsonl"), "image_root": str(photo_root)}))
    assert sum(result["tokens"].values()) == result["sharing"]["tokens_unshared"]
    assert result["tokens"]["answers' common beginning"] == 0 and result["images"] == 2
