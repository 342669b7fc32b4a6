"""The second image of a row: the same wherever and whenever it is made, really another one, or left out and counted."""

import dataclasses
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from vapr.batches.loader import PairLoader, open_loaders
from vapr.batches.second_image import OtherViews, changed
from vapr.batches.survey import show, survey
from vapr.config import Config
from vapr.data.pairs import write_pairs
from vapr.data.sources import read_pairs
from vapr.errors import UserError
from vapr.loss_config import SecondImageConfig

TEXTS = {"prompt": "What is it?", "chosen": "A cat on a mat.", "rejected": "A dog on a mat."}
MAKES = ["crop", "noise", "mask", "black", "retrieved"]


def config_of(folder, make="crop", *, policy="unused", loss=None, rows="pairs.jsonl", **changes) -> Config:
    loss = loss or [{"kind": "sigmoid"}, {"kind": "image", "second_image": {"make": make}}]
    data = {"train": str(folder / rows), "workers": 0, **changes.pop("data", {})}
    raw = {"run_dir": "unused", "policy": {"model": str(policy)}, "data": data, "loss": loss}
    return Config.parse({**raw, "optim": {"pairs_per_step": 3}, **changes})


@pytest.fixture
def folder(tmp_path):
    """Eight rows with a picture each, some of the same picture, one of them with two, and one without."""
    random = np.random.default_rng(0)
    for n in range(4):
        pixels = np.kron(random.integers(0, 255, (8, 8, 3), np.uint8), np.ones((14, 14, 1), np.uint8))
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    rows = [{**TEXTS, "id": f"row-{n}", "images": [f"{n % 4}.png"]} for n in range(8)]
    rows[3]["images"] = ["3.png", "0.png"]
    write_pairs(tmp_path / "pairs.jsonl", [*rows, {**TEXTS, "id": "text"}])
    return tmp_path


def seconds_of(loader: PairLoader, epoch: int = 0) -> dict[str, list[str]]:
    """Content of the second images by row id."""
    start = epoch * loader.steps_per_epoch
    found = {}
    for step in loader.steps(start, start + loader.steps_per_epoch):
        for pair in step.pairs:
            views = dict(zip(pair.roles, pair.paths[2:], strict=True))
            found[pair.id] = [image.content_hash for image in views["second"].images] if views else []
    return found


def loaded(config: Config, epoch: int = 0) -> dict[str, list[str]]:
    with open_loaders(config, say=lambda line: None) as loaders:
        return seconds_of(loaders["train"], epoch)


@pytest.mark.parametrize("make", MAKES)
def test_a_row_has_the_same_one_in_any_order_pack_and_process(make, folder, tiny):
    policy = tiny("qwen2_5_vl")
    first = loaded(config_of(folder, make, policy=policy))
    assert len(first) == 9 and first["text"] == [] and len(first["row-3"]) == 2
    assert all(first[f"row-{n}"] for n in range(8))
    if make in ("crop", "noise", "mask"):
        assert first["row-0"] != first["row-4"]  # one picture, two rows
    for changes in (
        {"data": {"workers": 2}}, {"data": {"shuffle": False}}, {"packing": {"share": "image"}},
        {"packing": {"max_tokens": 150}}, {"optim": {"pairs_per_step": 8}},
    ):  # fmt: skip
        assert loaded(config_of(folder, make, policy=policy, **changes)) == first
    assert loaded(config_of(folder, make, policy=policy), epoch=3) == first
    other_seed = loaded(config_of(folder, make, policy=policy, seed=1))
    assert (other_seed == first) == (make == "black")


def test_it_depends_on_the_row_not_on_the_rows_around_it(folder, tiny):
    first = loaded(config_of(folder, policy=tiny("llava")))
    rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "fewer.jsonl").write_text("".join(rows[:1:-1]))
    fewer = loaded(config_of(folder, policy=tiny("llava"), rows="fewer.jsonl"))
    assert len(fewer) == 7 and all(first[name] == fewer[name] for name in fewer)


def views_of(folder, processor, config, number=0):
    pairs = read_pairs(folder / "pairs.jsonl")
    pair = pairs[number]
    own = tuple(processor.process_image(image) for image in pair.images)
    rejected = own
    if pair.rejected_images is not None:
        rejected = tuple(processor.process_image(image) for image in pair.rejected_images)
    views, left_out = OtherViews(config, processor, pairs).of(pair, own, rejected)
    return own, {view.role: view for view in views}, left_out


def test_a_retrieved_image_is_that_of_another_row(folder, processor):
    rows = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "pairs.jsonl").write_text("".join([rows[3], rows[3].replace("row-3", "other").replace("0.png", "1.png")]))
    pictures = {n: processor.process_image(folder / f"{n}.png").content_hash for n in range(4)}
    _, views, _ = views_of(folder, processor, config_of(folder, "retrieved"))
    assert not views  # the other row begins with the same picture, and its own is not another's
    (folder / "pairs.jsonl").write_text("".join(rows))
    for number in range(8):
        own, views, left_out = views_of(folder, processor, config_of(folder, "retrieved"), number)
        every = set(pictures.values())
        second = views["second"].images
        assert not left_out and len(second) == len(own)
        for image, other in zip(own, second, strict=True):
            assert other.content_hash in every - {image.content_hash}


RAMP = np.stack(np.broadcast_arrays(np.arange(200)[None], np.arange(200)[:, None], 90), -1).astype(np.uint8)
"""Red says the column, green the row."""


def test_a_crop_is_a_small_part():
    areas = []
    for seed in range(60):
        part = changed(RAMP, SecondImageConfig(), np.random.default_rng(seed))
        assert part.shape == RAMP.shape and part.dtype == np.uint8
        across, down = (int(np.ptp(part[..., channel].astype(int))) + 1 for channel in (0, 1))
        assert 0.7 < across / down < 1.43
        areas.append(across * down / 40_000)
    assert min(areas) > 0.007 and max(areas) < 0.21 and max(areas) > 0.15 and min(areas) < 0.03
    wide = SecondImageConfig(area=(0.5, 0.5))
    part = changed(RAMP, wide, np.random.default_rng(0))
    assert np.ptp(part[..., 0].astype(int)) * np.ptp(part[..., 1].astype(int)) == pytest.approx(20_000, rel=0.05)


@pytest.mark.parametrize("area", [None, [0.5, 0.5], [1.0, 1.0]])
def test_a_mask_covers_its_share(area):
    white = np.full((160, 320, 3), 255, np.uint8)
    made = changed(white, SecondImageConfig(make="mask", area=area), np.random.default_rng(0))
    share = round((area or [0.3])[0] * 256) / 256
    assert (made == 0).all(-1).mean() == pytest.approx(share) and set(np.unique(made)) <= {0, 255}


@pytest.mark.parametrize("steps", [1, 200, 500])
def test_noise_has_the_strength_of_its_step(steps):
    """The kept share of the picture is the product of 1 - beta over the steps, beta a sigmoid of them (VCD)."""
    kept = 1.0
    for n in range(steps):
        kept *= 1 - (1 / (1 + math.exp(6 - 12 * n / 999)) * (0.005 - 1e-5) + 1e-5)
    grey = np.full((1344, 672, 3), 128, np.uint8)
    values = changed(grey, SecondImageConfig(make="noise", steps=steps), np.random.default_rng(0)).astype(float)
    sampled = values[::4, ::4] / 127.5 - 1  # the noise is enlarged with the picture
    inside = np.abs(sampled) < 1
    deviation = math.sqrt(1 - kept)
    expected = math.erf(1 / deviation / math.sqrt(2))  # of a normal variable, this share is not clipped
    assert inside.mean() == pytest.approx(expected, abs=0.01)
    assert np.median(np.abs(sampled)) == pytest.approx(0.6745 * deviation, rel=0.03, abs=0.003)


def test_noise_survives_scaling_down():
    """Of a photograph of 2,688 pixels, too: at 336 there is as much of it."""
    grey = np.full((2688, 2688, 3), 128, np.uint8)
    noisy = Image.fromarray(changed(grey, SecondImageConfig(make="noise"), np.random.default_rng(0)))
    small = np.asarray(noisy.resize((336, 336), Image.Resampling.BOX)).astype(float)
    direct = changed(grey[:336, :336], SecondImageConfig(make="noise"), np.random.default_rng(0)).astype(float)
    assert small.std() == pytest.approx(direct.std(), rel=0.05)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (40, 1), (3, 2)])
@pytest.mark.parametrize("make", ["crop", "noise", "mask", "black"])
def test_tiny_pictures(make, size):
    picture = np.random.default_rng(0).integers(1, 255, (*size, 3), np.uint8)
    made = changed(picture, SecondImageConfig(make=make), np.random.default_rng(1))
    assert made.shape == picture.shape and made.dtype == np.uint8
    if make == "mask":
        assert (made == 0).all(-1).any()  # at least a cell


def png(colour, size=(56, 56)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


REASONS = [
    ("black", png("black"), "image: the second image looks the same"),
    ("mask", png("black"), "image: the second image looks the same"),
    ("crop", png("red"), "image: the second image looks the same"),  # any part of it is red
    ("crop", png("red", (1, 1)), "image: the second image looks the same"),
    ("retrieved", png("red"), "image: none of 64 other rows has another image"),
    ("given", png("red"), "image: the row has no rejected_images"),
]


@pytest.mark.parametrize(("make", "picture", "reason"), REASONS)
def test_a_pair_without_a_second_image_is_left_out_and_counted(make, picture, reason, tmp_path, tiny):
    (tmp_path / "one.png").write_bytes(picture)
    write_pairs(tmp_path / "pairs.jsonl", [{**TEXTS, "id": f"{n}", "images": ["one.png"]} for n in range(4)])
    config = config_of(tmp_path, make, policy=tiny("qwen2_5_vl"))
    with open_loaders(config, say=lambda line: None) as loaders:
        assert not any(seconds_of(loaders["train"]).values())
        [message] = loaders["train"].messages
    kind, why = reason.split(": ")
    assert f"no {kind} loss for row" in message and why in message and message.count("\n") == 0
    result = survey(config)
    assert result["left_out"] == {reason: 4} and result["pairs"] == 4
    assert "other views" not in result["tokens"]
    assert re.search(rf"^no {kind} loss for +4  {re.escape(why)}$", show(result), flags=re.MULTILINE)


def test_rows_without_an_image_are_left_out_and_counted(folder, tiny):
    result = survey(config_of(folder, policy=tiny("qwen2_5_vl")))
    assert result["left_out"] == {"image: the row has no image": 1}
    assert "no image loss for" in show(result)


@pytest.mark.parametrize("make", ["crop", "retrieved"])
def test_the_survey_counts_what_second_images_cost(make, folder, tiny):
    """By counting packed tokens with the loss and without it."""
    policy = tiny("qwen2_5_vl")
    with_image = survey(config_of(folder, make, policy=policy))
    without = survey(config_of(folder, policy=policy, loss=[{"kind": "sigmoid"}]))
    added = with_image["sharing"]["tokens_packed"] - without["sharing"]["tokens_packed"]
    assert with_image["tokens"].pop("other views") == added > 0
    assert with_image["tokens"] == without["tokens"] and with_image["images"] == without["images"]
    assert with_image["sharing"]["tokens_unshared"] > without["sharing"]["tokens_unshared"]


OWN = {**TEXTS, "id": "own", "images": ["0.png"], "rejected_images": ["1.png"]}
SYMMETRIC = [{"kind": "symmetric"}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (OWN, None),
        ({**OWN, "rejected_images": ["0.png"]}, "symmetric: images and rejected_images look the same"),
        ({**OWN, "rejected": OWN["chosen"]}, "symmetric: both images have the same answer"),
        ({**TEXTS, "id": "a", "images": ["0.png"]}, "symmetric: the row has no rejected_images"),
        ({**TEXTS, "id": "a"}, "symmetric: the row has no rejected_images"),
    ],
)
def test_which_rows_are_symmetric(row, reason, folder, processor):
    write_pairs(folder / "pairs.jsonl", [row])
    config = config_of(folder, loss=SYMMETRIC)
    _, views, left_out = views_of(folder, processor, config)
    assert left_out == ([] if reason is None else [reason])
    if reason is None:
        pictures = [processor.process_image(folder / f"{n}.png").content_hash for n in range(2)]
        shown = {role: (view.side, view.images[0].content_hash) for role, view in views.items()}
        assert shown == {
            "chosen swapped": ("chosen", pictures[1]), "rejected swapped": ("rejected", pictures[0])
        }  # fmt: skip


def test_a_given_second_image_is_the_rows_own(folder, processor):
    write_pairs(folder / "pairs.jsonl", [OWN])
    _, views, _ = views_of(folder, processor, config_of(folder, "given"))
    assert views["second"].images[0].content_hash == processor.process_image(folder / "1.png").content_hash


def test_a_second_image_of_a_transparent_picture(folder, processor):
    """Changed are the colours that the model is shown."""
    pixels = np.zeros((56, 56, 4), np.uint8)
    pixels[:, :28] = [200, 30, 30, 255]
    Image.fromarray(pixels).save(folder / "0.png")
    own, views, left_out = views_of(folder, processor, config_of(folder, "black"))
    assert not left_out and views["second"].images[0].num_tokens == own[0].num_tokens


def test_rejected_images_without_images_are_a_bad_row(folder):
    write_pairs(folder / "pairs.jsonl", [{**OWN, "images": []}])
    with pytest.raises(UserError, match="'rejected_images' has 1 image.* but 'images' has 0"):
        read_pairs(folder / "pairs.jsonl")[0]


def test_a_place_in_the_data_changes_with_the_second_images(folder, tiny):
    """What was prepared of other second images is no use."""
    places = set()
    for make, seed in (("crop", 0), ("mask", 0), ("crop", 1)):
        with open_loaders(config_of(folder, make, policy=tiny("llava"), seed=seed), say=lambda line: None) as loaders:
            places.add(loaders["train"].place)
    with open_loaders(config_of(folder, policy=tiny("llava"), loss=[{"kind": "sigmoid"}]), say=lambda _: None) as plain:
        places.add(plain["train"].place)
    assert len(places) == 4


def test_row_keys_reach_the_pack(folder, processor):
    from vapr.batches.packing import pack

    write_pairs(folder / "pairs.jsonl", [{**OWN, "beta": 0.25, "margin": 1.5}, {**TEXTS, "id": "b"}])
    pairs = read_pairs(folder / "pairs.jsonl")
    assert (pairs[0].beta, pairs[0].margin) == (0.25, 1.5) and (pairs[1].beta, pairs[1].margin) == (None, 0.0)
    tokenized = [processor.tokenize_pair(pair) for pair in pairs]
    betas = pack(tokenized).betas
    assert betas[0].tolist() == [0.25, 1.5] and betas[1, 0].isnan() and betas[1, 1] == 0
    assert pack(tokenized[1:]).betas is None and pack(tokenized).others is None
    moved = dataclasses.replace(pack(tokenized)).to("meta")
    assert moved.betas.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0}, "'beta' must be above 0, got 0"),
        ({"beta": -0.1}, "'beta' must be a number of at least 0, got -0.1"),
        ({"beta": "high"}, "'beta' must be a number"),
        ({"beta": True}, "'beta' must be a number"),
        ({"margin": -1}, "'margin' must be a number of at least 0, got -1"),
        ({"margin": [1]}, "'margin' must be a number"),
        ({"margin": 10**400}, "'margin' is too large"),
    ],
)
def test_bad_betas_and_margins(change, message, folder):
    write_pairs(folder / "pairs.jsonl", [{**OWN, **change}])
    with pytest.raises(UserError, match=message):
        read_pairs(folder / "pairs.jsonl")[0]


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "sigmoid", "second_image": {"make": "noise"}}, "loss.second_image means nothing to sigmoid"),
        ({"kind": "image", "second_image": {"make": "noise", "area": [0.1, 0.2]}}, "area means nothing to noise; .*crop"),
        ({"kind": "image", "second_image": {"steps": 10}}, "steps means nothing to crop; it belongs to noise"),
        ({"kind": "image", "second_image": {"area": [0.3, 0.2]}}, "the smallest share comes first, got .0.3, 0.2."),
        ({"kind": "image", "second_image": {"area": [0, 0.2]}}, "loss.second_image.area"),
        ({"kind": "image", "second_image": {"make": "blur"}}, "loss.second_image.make.*blur"),
        ({"kind": "image", "second_image": {"made": "crop"}}, "unknown key 'loss.second_image.made'; did you mean 'make'"),
        ({"kind": "image", "second_image": "crop"}, "loss.second_image: a mapping of keys to values is needed"),
        ({"kind": "image", "delta": 1}, "loss.delta means nothing to image; it belongs to anchor, symmetric"),
        ({"kind": "anchor", "consistency": 1}, "loss.consistency means nothing to anchor"),
        ({"kind": "sft", "margin_weight": 1}, "loss.margin_weight means nothing to sft, which has no beta"),
        (
            [{"kind": "image"}, {"kind": "image", "second_image": {"make": "mask"}}],
            "loss: second_image must be the same in every image term",
        ),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(loss, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config_of(tmp_path, loss=loss)


def test_a_written_config_is_read_again(tmp_path):
    for loss in (
        [{"kind": "image", "second_image": {"make": "mask", "area": [0.1, 0.4]}}],
        SYMMETRIC,
        {"kind": "anchor"},
    ):
        config = config_of(tmp_path, loss=loss)
        assert Config.parse(config.as_dict()) == config


def test_paths_of_a_symmetric_pair(folder, processor):
    """Each answer under each image, as tokenising a plain pair of that answer and image gives them."""
    write_pairs(folder / "pairs.jsonl", [OWN])
    pairs = read_pairs(folder / "pairs.jsonl")
    others = OtherViews(config_of(folder, loss=SYMMETRIC), processor, pairs)
    tokenized = processor.tokenize_pair(pairs[0], None, others)
    assert tokenized.roles == ("chosen swapped", "rejected swapped")
    first, second = (
        processor.tokenize_pair(dataclasses.replace(pairs[0], images=(folder / name,), rejected_images=None)).paths
        for name in ("0.png", "1.png")
    )
    for path, plain in zip(tokenized.paths, (first[0], second[1], second[0], first[1]), strict=True):
        assert path.images[0].content_hash == plain.images[0].content_hash
        assert np.array_equal(path.input_ids, plain.input_ids)
        assert np.array_equal(path.position_ids, plain.position_ids)
