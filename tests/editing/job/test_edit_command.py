"""``vapr edit`` as a person meets it: what it reads, a trial, what it says first and last."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("pyarrow", reason="pyarrow is not installed")

from tests.editing.edit_command import GOOD, assert_refused, edit, pairs_of, row, write
from vapr.cli import main
from vapr.data.pair import Edit
from vapr.editing.draft import checks
from vapr.editing.draft import trades as plan
from vapr.editing.job import summary
from vapr.editing.job.trial import word_diff

pytest_plugins = ["tests.editing.edit_command"]


def shown(*arguments: object, code: int = 0) -> tuple[str, str]:
    """stdout and stderr."""
    result = CliRunner().invoke(main, ["edit", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


# What it reads


def test_images_elsewhere(folder, tmp_path):
    elsewhere = tmp_path / "pictures"
    elsewhere.mkdir()
    (folder / "cat.png").rename(elsewhere / "cat.png")
    message = "the images of 2 of 2 rows cannot be read; the first: "
    assert_refused(f"{message}{folder}/sft.jsonl:1: image 'cat.png' not found (looked for", folder / "sft.jsonl")
    assert_refused("--image-root names the folder that image paths start at", folder / "sft.jsonl")
    assert edit(folder / "sft.jsonl", "--image-root", elsewhere) == (0, "")
    assert {pair["images"][0]["path"] for pair in pairs_of(folder)} == {str(elsewhere / "cat.png")}


def test_unreadable_images_come_before_anything_else(folder):
    """Rows without images beside them are not the reason."""
    talk = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}]
    source = write(folder, [*(row(id=n, image=f"coco/{n}.png") for n in "ab"), {"id": "c", "conversations": talk}])
    assert_refused(
        f"sft.jsonl: the images of 2 of 3 rows cannot be read; the first: {source}:1: image 'coco/a.png' not found",
        source,
    )
    assert_refused("no answer to edit in the others: 1 x no image", source)


def test_some_unreadable_images_are_said_first(folder):
    source = write(folder, [row(id="x", image="gone.png"), *GOOD, {"id": "y", "image": "cat.png"}])
    code, stderr = edit(source)
    lines = stderr.splitlines()
    assert code == 0 and lines[0].startswith(
        f"the images of 1 of 4 rows cannot be read; the first: {source}:1: image 'gone.png' not found (looked for "
    )
    assert lines[1] == "1 of 4 rows cannot be read; scan.json says why, row by row"
    assert len(pairs_of(folder)) == 2


def test_columns_and_split(folder):
    for split, numbers in (("train", ("two", "three")), ("test", ("five", "six", "seven", "nine"))):
        rows = [
            {"q": f"How many cats are on page {id}?", "a": f"There are {n} cats.", "img": "cat.png"}
            for id, n in zip("abcd", numbers, strict=False)
        ]
        write(folder, rows, f"{split}-0.jsonl")
    (folder / "sft.jsonl").unlink()
    columns = [word for name in ("question=q", "answer=a", "images=img") for word in ("--column", name)]
    out = ("--out", folder / "out")
    assert edit(folder, *columns, "--split", "test", *out) == (0, "")
    assert len(pairs_of(folder)) == 4
    assert_refused(
        "source.columns: unknown key 'chosen'; known: question, answer, images", folder, "--column", "chosen=a", *out
    )


def test_the_shape_of_rows_that_have_two(folder):
    both = [
        {
            **one,
            "messages": [
                {"role": "user", "content": f"How many cats? {one['id']}"},
                {"role": "assistant", "content": answer},
            ],
        }
        for one, answer in zip(GOOD, ("Nine.", "Eleven."), strict=True)
    ]
    source = write(folder, both)
    assert edit(source, "--format", "messages") == (0, "")
    chosen = {pair["chosen"][0]["content"][0]["text"] for pair in pairs_of(folder)}
    assert chosen == {"Nine.", "Eleven."}
    other = ("--out", folder / "other")
    assert_refused("no prompt and answer; this row has id, image, conversations, messages", source, "--format", "prompt", *other)  # fmt: skip


# A trial


def test_a_trial_shows_and_writes_nothing(folder):
    rows = [row(f"There are {n} cats.", id=id) for id, n in zip("abcd", ("two", "three", "four", "five"), strict=True)]
    rows += [row("A kitten.", id="what")]
    source = write(folder, rows)
    stdout, _ = shown(source, "--out", folder / "out", "--limit", 20)
    assert stdout.count("[-") == stdout.count("{+") == 4
    assert "  answer    There are [-two-]{+" in stdout
    assert "trial       5 rows, 5 answers to edit; nothing was written\naccepted    4 pairs\n" in stdout
    assert "no pair     1 x needs a language model: no value of a closed set [way out: --editor MODEL]" in stdout
    assert stdout.splitlines()[-1].startswith(f"next        vapr edit {source} --out {folder}/out ...")
    assert not (folder / "out").exists()
    assert edit(source, "--set", "seed=5", "--limit", 3)[0] == 0
    assert edit(source, "--set", "seed=7")[0] == 0  # no other settings are in the way
    assert len(pairs_of(folder)) == 4
    before = sorted(file.read_bytes() for file in (folder / "out").rglob("*") if file.is_file())
    assert edit(source, "--limit", 3)[0] == 0  # nor is the job touched by a trial of others
    assert sorted(file.read_bytes() for file in (folder / "out").rglob("*") if file.is_file()) == before


def test_a_trial_for_programs(folder):
    stdout, _ = shown(folder / "sft.jsonl", "--out", folder / "out", "--limit", 2, "--json")
    result = json.loads(stdout)
    assert (result["rows"], result["accepted"], result["reasons"]) == (2, 2, {})
    assert [answer["rejected"] for answer in result["answers"]] == ["There are three cats.", "There are two cats."]


def test_a_trial_takes_the_rows_that_the_seed_draws(folder):
    source = write(folder, [row(f"There are {n} cats.", id=f"row {n}") for n in range(2, 60)])

    def places(seed):
        stdout, _ = shown(source, "--out", folder / "out", "--limit", 5, "--json", "--set", f"seed={seed}")
        return [answer["place"] for answer in json.loads(stdout)["answers"]]

    assert len(places(1)) == 5 and places(1) == places(1) != places(2)


@pytest.mark.parametrize("option", [("--target", "3"), ("--retry-failed",), ("--ray",)], ids=lambda words: words[0])
def test_what_a_trial_has_not(folder, option):
    assert_refused(f"--limit: a trial has no {option[0]}", folder / "sft.jsonl", "--limit", 2, *option)


def test_a_trial_names_what_cannot_be_read(folder):
    source = write(folder, [row(id="x", image="gone.png"), *GOOD])
    stdout, stderr = shown(source, "--out", folder / "out", "--limit", 3)
    assert "the images of 1 of 3 rows cannot be read; the first: " in stderr
    assert "left out    1 x image cannot be read [way out: --image-root" in stdout
    source = write(folder, [row(image="gone.png")])
    assert_refused("nothing to edit in 1 rows: the images of 1 of 1 rows cannot be read; the first: ", source, "--limit", 9)  # fmt: skip


def test_a_word_diff():
    def plain(text, fg):
        return text

    edits = [Edit(0, 3, "No"), Edit(14, 14, " not")]
    assert word_diff("Yes, there are.", edits, plain) == "[-Yes-]{+No+}, there are{+ not+}."


# The end


def test_the_end_says_what_comes_next(folder):
    rows = [*GOOD, row("There are two cats.", id="c"), row("A kitten.", id="d")]
    stdout, _ = shown(write(folder, rows), "--out", folder / "out")
    out = folder / "out"
    assert f"{plan.NO_PARTNER} [way out: more rows, or plan.balance=uniform]" in stdout
    assert f"{plan.NEEDS_MODEL}: {plan.NO_VALUE} [way out: --editor MODEL]" in stdout
    lines = [line.split("#")[0].strip() for line in stdout.splitlines()[-3:]]
    assert lines == [
        f"next        vapr view {out} --out {out}-review.html",
        f"vapr audit {out}",
        f"vapr train run.yaml --set data.train={out}",
    ]


def test_the_end_of_a_job_without_pairs(folder):
    stdout, _ = shown(write(folder, [row("A kitten.", id="d")]), "--out", folder / "out")
    assert stdout.splitlines()[-1].startswith(f"next        vapr edit ... --out {folder}/out-2 --editor MODEL")


def test_the_end_at_a_target(folder):
    rows = [row(f"There are {n} cats.", id=id) for id, n in zip("abcd", ("two", "three", "four", "five"), strict=True)]
    stdout, _ = shown(write(folder, rows), "--out", folder / "out", "--target", 2)
    assert f"next        vapr edit ... --out {folder}/out --target N" in stdout


def test_every_reason_has_its_way_out():
    """Those of checks, too: their names begin the reasons."""
    for reason in (plan.PARTNER_LOST, plan.LONG_QUESTION, plan.NEITHER, "cut off after N tokens", "HTTP N: no"):
        assert summary.way_out(reason) != summary.ANOTHER_EDITOR
    assert (
        summary.way_out(f"{checks.Verdict('length', False).name}: N words")
        == "checks.length_ratio, or another --editor"
    )
    assert summary.way_out("find must occur exactly once in the answer") == summary.ANOTHER_EDITOR


def test_paths_with_spaces_are_quoted(folder):
    stdout, _ = shown(folder / "sft.jsonl", "--out", folder / "my pairs")
    assert f"vapr audit '{folder}/my pairs'" in stdout
    assert Image.open(folder / "cat.png").size == (8, 8) and Path(folder / "my pairs" / "pairs").is_dir()
