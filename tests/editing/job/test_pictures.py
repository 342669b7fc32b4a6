"""vapr edit with ``picture``: the answer stays, and what stands beside its rejected side is another picture."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.editing import edit_jobs
from tests.editing.edit_command import assert_refused, edit, talk
from tests.editing.edit_jobs import contents, killed, pairs_in, rejects_in, run_until, start_of
from vapr.cli import main
from vapr.data.sources import read_pairs
from vapr.editing.config import EditConfig
from vapr.editing.job.run import run

COLOURS = ("red", "blue", "green", "yellow")
BOX = [12, 10, 20, 16]


def row(n: int, answer: str, question: str, **changes) -> dict:
    turns = talk(("human", f"<image>\n{question}"), ("gpt", answer))
    return {"id": f"row-{n}", "image": f"{n}.png", "conversations": turns, "boxes": [BOX], **changes}


def rows() -> list[dict]:
    """24 cars and boats of four colours with a box each, and what cannot be placed."""
    made = []
    for n in range(24):
        thing = ("car", "boat")[n % 2]
        made.append(row(n, f"The {thing} is {COLOURS[n // 2 % 4]}.", f"What color is the {thing}?"))
    made[4]["boxes"] = [[12, 10, 200, 16]]
    made[5]["boxes"] = []
    made[6]["boxes"] = [[0, 0, 64, 48]]
    made[7] = row(7, "No, there is not.", "Is there a boat?")
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for n in range(24):
        Image.fromarray(random.integers(0, 255, (48, 64, 3), np.uint8)).save(folder / f"{n}.png")
    return edit_jobs.write_source(folder, rows())


def config(*change: str, **more) -> EditConfig:
    return EditConfig.parse({"turns_per_shard": 8, "picture": {"change": list(change), **more}}, "test")


def job(source: Path, out: Path, *change: str, **more) -> dict:
    return run(start_of(source, out, config=config(*change, **more)), print)


def opened(out: Path, pair: dict) -> tuple[np.ndarray, np.ndarray]:
    paths = [Path(pair[key][0]["path"]) for key in ("images", "rejected_images")]
    files = [path if path.is_absolute() else out / path for path in paths]
    return tuple(np.asarray(Image.open(file).convert("RGB")) for file in files)


def test_a_mask_covers_the_box_and_nothing_else(source, tmp_path):
    ledger = job(source, tmp_path / "out", "mask")
    pairs = pairs_in(tmp_path / "out")
    assert ledger["accepted"] == len(pairs) == 20 and ledger["categories"]["mask"]["accepted"] == 20
    for pair in pairs:
        before, after = opened(tmp_path / "out", pair)
        where = np.zeros((48, 64), bool)
        where[10:26, 12:32] = True
        assert pair["chosen"] == pair["rejected"] and pair["category"] == "mask" and pair["edits"] == []
        assert (before[~where] == after[~where]).all() and len(np.unique(after[where], axis=0)) == 1
        [check] = pair["checks"]
        assert check["name"] == "changed" and check["value"] == pytest.approx(320 / 3072, abs=0.001)
        assert json.loads(pair["provenance"]["plan"]) == {"change": "mask", "boxes": [[12, 10, 32, 26]]}


def test_what_cannot_be_changed_is_counted_with_the_reason(source, tmp_path):
    job(source, tmp_path / "out", "mask")
    reasons = {reject["place"].rpartition(":")[2]: reject["reason"] for reject in rejects_in(tmp_path / "out")}
    assert reasons == {
        "5": "box outside of the picture: [12.0, 10.0, 200.0, 16.0] of 64 x 48 pixels",
        "6": "no boxes",
        "7": "more of the picture would change than picture.changed allows: 1.000",
        "8": "the answer denies something, which a picture with less in it does not refute",
    }


def test_a_crop_does_without_the_box(source, tmp_path):
    job(source, tmp_path / "out", "crop", changed=[0.1, 0.6])
    for pair in pairs_in(tmp_path / "out"):
        before, after = opened(tmp_path / "out", pair)
        part = Image.fromarray(before[:, 32:])  # right of the box: half of the picture, the largest part
        assert (after == np.asarray(part.resize((after.shape[1], after.shape[0]), Image.Resampling.BICUBIC))).all()
        assert pair["checks"][0]["value"] == pytest.approx(0.5)


def test_other_pictures_are_swapped_between_rows_that_refute_each_other(source, tmp_path):
    job(source, tmp_path / "out", "other")
    pairs = pairs_in(tmp_path / "out")
    assert len(pairs) >= 16
    said = {f"{n}.png": row["conversations"][1]["value"] for n, row in enumerate(rows())}
    swapped = {}
    for pair in pairs:
        own, other = (Path(pair[key][0]["path"]).name for key in ("images", "rejected_images"))
        assert said[own].split()[:3] == said[other].split()[:3] and said[own] != said[other]
        swapped[own] = other
    assert all(swapped[other] == own for own, other in swapped.items())
    assert not (tmp_path / "out" / "images").exists()


def test_kinds_are_mixed_and_one_takes_the_place_of_another(source, tmp_path):
    ledger = job(source, tmp_path / "out", "mask", "blur", "other")
    accepted = {name: counts.get("accepted", 0) for name, counts in ledger["categories"].items()}
    assert min(accepted[name] for name in ("mask", "blur", "other-picture")) >= 2
    by_place = {pair["provenance"]["place"].rpartition(":")[2]: pair["category"] for pair in pairs_in(tmp_path / "out")}
    for line in "567":  # without a usable box, so another picture or nothing
        assert by_place.get(line, "other-picture") == "other-picture"
    assert len(by_place) > 20


def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(source, tmp_path):
    changes = ("mask", "blur", "crop", "other")
    job(source, tmp_path / "unbroken", *changes)
    start = start_of(source, tmp_path / "out", config=config(*changes))
    killed(run_until, "vapr.editing.draft.picture_editor", "PictureEditor._written", 9, start)
    assert len(pairs_in(tmp_path / "out")) < len(pairs_in(tmp_path / "unbroken"))
    run(start, print)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    kept, made = ({f.name: f.read_bytes() for f in (tmp_path / name / "images").iterdir()} for name in ("out", "unbroken"))  # fmt: skip
    assert kept == made


def test_growing_targets_end_with_the_pairs_of_one_run(source, tmp_path):
    job(source, tmp_path / "whole", "mask", "other")
    for target in (3, 9, None):
        run(start_of(source, tmp_path / "out", config=config("mask", "other"), target=target), print)
        assert target is None or len(pairs_in(tmp_path / "out")) == target
    by_id = [{pair["id"]: pair for pair in pairs_in(tmp_path / name)} for name in ("whole", "out")]
    assert by_id[0] == by_id[1]


def test_a_picture_that_is_there_is_never_replaced(source, tmp_path):
    job(source, tmp_path / "first", "mask")
    name = next((tmp_path / "first" / "images").iterdir()).name
    (tmp_path / "out" / "images").mkdir(parents=True)
    shutil.copy(tmp_path / "first" / "job.json", tmp_path / "out" / "job.json")
    (tmp_path / "out" / "images" / name).write_bytes(b"mine")
    code, stderr = edit(source, "--out", tmp_path / "out", "--set", "picture.change=mask", "--set", "turns_per_shard=8")
    assert code == 2 and stderr.count("\n") == 1 and "is not the picture that its name stands for" in stderr
    assert (tmp_path / "out" / "images" / name).read_bytes() == b"mine"


def test_pictures_as_jpeg(source, tmp_path):
    job(source, tmp_path / "out", "blur", jpeg=90)
    files = list((tmp_path / "out" / "images").iterdir())
    assert len(files) == 20 and all(file.suffix == ".jpg" and Image.open(file).format == "JPEG" for file in files)


def test_a_picture_that_cannot_be_read_is_a_failed_answer(source, tmp_path):
    shutil.copytree(source.parent, tmp_path / "in")
    whole = (tmp_path / "in" / "0.png").read_bytes()
    (tmp_path / "in" / "0.png").write_bytes(whole[: len(whole) // 2])  # its header can be read
    (tmp_path / "in" / "1.png").write_bytes(b"no picture")
    ledger = job(tmp_path / "in" / source.name, tmp_path / "out", "mask")
    assert ledger["accepted"] == 18 and sum(ledger["failed"].values()) == 2
    (tmp_path / "in" / "0.png").write_bytes(whole)
    start = start_of(tmp_path / "in" / source.name, tmp_path / "out", config=config("mask"), retry_failed=True)
    assert run(start, print)["accepted"] == 19


def test_a_trial_shows_the_changes_and_writes_nothing(source, tmp_path):
    options = ["--limit", "24", "--set", "picture.change=[mask, other]"]
    result = CliRunner().invoke(main, ["edit", str(source), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert "the region of the answer is painted over: 10." in result.stdout
    assert (
        "a picture in which something else is true of the same thing; the other picture's answer: The" in result.stdout
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "picture.change=smudge"), "picture.change"),
        (("--set", "picture.change=[]"), "picture.change"),
        (("--set", "picture.relative=true"), "'picture.change' is missing"),
        (("--set", "picture.change=mask", "--set", "picture.changed=[0.5, 0.1]"), "the smaller one first"),
        (("--set", "picture.change=mask", "--set", "picture.jpeg=0"), "picture.jpeg"),
        (("--set", "picture.change=mask", "--set", "checks.blind=true"), "checks.blind is about edited answers"),
        (("--set", "picture.change=mask", "--set", "editors={a: 1, b: 1}"), "editors is about edited answers"),
        (("--set", "picture.change=mask", "--set", "ask.candidates=2"), "ask.candidates is about edited answers"),
        (("--set", "picture.change=mask", "--set", "checks.patterns=[dog]"), "checks.patterns is about edited answers"),
        (("--set", "picture.change=mask", "--explain", "1"), "--explain: tells how answers are edited"),
        (("--set", "picture.change=mask", "--editor", "some/model"), "pictures are changed by rules"),
        (("--set", "picture.change=mask", "--column", "boxes=where"), "has no column 'where'"),
    ],
)
def test_mistakes_are_one_line(source, tmp_path, arguments, message):
    assert_refused(message, source, "--out", tmp_path / "out", *arguments)


def test_a_wrong_order_of_the_numbers_says_the_way_out(source, tmp_path):
    result = CliRunner().invoke(
        main, ["edit", str(source), "--out", str(tmp_path / "out"), "--set", "picture.change=mask", "--set", "picture.relative=true"]
    )  # fmt: skip
    assert "box outside of the picture" in result.stdout
    assert "[way out: picture.boxes and picture.relative say what the numbers are]" in result.stdout


def test_boxes_are_no_unused_column_of_a_job_that_uses_them(source, tmp_path):
    ledger = job(source, tmp_path / "pictures", "mask")
    assert "boxes" not in ledger["source"]["unused_columns"]
    ledger = run(start_of(source, tmp_path / "texts"), print)
    assert ledger["source"]["unused_columns"] == {"boxes": 23}  # an empty list says nothing


def test_the_ledger_counts_rules_as_the_editor(source, tmp_path):
    ledger = job(source, tmp_path / "out", "mask")
    assert {name: counts["accepted"] for name, counts in ledger["editors"].items()} == {"rules": ledger["accepted"]}
    assert ledger["candidates"] is None and ledger["judge"] is None


def test_the_card_says_what_the_pairs_are(source, tmp_path):
    job(source, tmp_path / "out", "mask", "other")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rejected for `rejected_images`, which show something else (mask, other)" in card
    assert "edited to carry" not in card


def test_the_audit_says_by_kind_how_much_changed(source, tmp_path):
    job(source, tmp_path / "out", "mask", "other")
    result = CliRunner().invoke(main, ["audit", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    [one] = json.loads(result.stdout)["sets"].values()
    assert set(one["pictures"]["kinds"]) == {"mask", "other-picture"}
    assert one["pictures"]["kinds"]["mask"]["changed"]["median"] == pytest.approx(320 / 3072, rel=0.2)


def test_the_pairs_are_read_and_trained_on(source, tmp_path, make_config, tiny):
    from vapr.training import trainer

    job(source, tmp_path / "out", "mask", "blur", "crop", "other")
    pairs = read_pairs(tmp_path / "out")
    assert all(pair.rejected_images is not None and pair.chosen == pair.rejected for pair in pairs)
    loss = [{"kind": "sigmoid"}, {"kind": "image", "second_image": {"make": "given"}}]
    data = {"train": str(tmp_path / "out"), "workers": 0}
    policy = {"model": str(tiny("qwen2_vl")), "dtype": "float32"}
    run_config = make_config(loss=loss, data=data, policy=policy, optim={"lr": 1e-3, "pairs_per_step": 8})
    trainer.train(run_config)
    lines = [json.loads(line) for line in (Path(run_config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "image_pairs" in line]
    assert sum(step["image_pairs"] for step in steps) == len(pairs)
