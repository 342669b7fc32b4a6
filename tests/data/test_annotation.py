"""Pairs handed over to Label Studio and Argilla, in the shapes that their own packages read (label-studio-sdk 2.1, argilla 2.8)."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest
from click.testing import CliRunner
from PIL import Image

from tests.data.test_writers import IMAGE, SHOWN, TOLD, message, pairs_of, text
from vapr.cli import main
from vapr.data.annotation import TOOLS
from vapr.data.convert import convert
from vapr.errors import UserError

SAME = {**SHOWN, "id": "same", "rejected": SHOWN["chosen"], "rejected_images": ["dog.png"]}


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (56, 40), "red").save(tmp_path / "cat.png")
    Image.new("RGB", (56, 40), "blue").save(tmp_path / "dog.png")
    return tmp_path


def rows_of(folder: Path, tool: str) -> list[dict]:
    return json.loads((folder / ("tasks.json" if tool == "label-studio" else "tasks/records.json")).read_text())


def handed_over(folder: Path, tool: str, *rows: dict) -> list[dict]:
    result = convert(pairs_of(folder, *rows), tool, folder / ("tasks.json" if tool == "label-studio" else "tasks"))
    assert result["written"] == len(rows)
    return rows_of(folder, tool)


def test_a_task_of_label_studio(folder):
    [task] = handed_over(folder, "label-studio", {**SHOWN, "category": "colour"})
    right, wrong = (task["meta"]["chosen"], {"left": "right", "right": "left"}[task["meta"]["chosen"]])
    assert task["data"] == {
        "id": "shown", "prompt": "Which colour?", "images": ["/data/local-files/?d=cat.png"], "category": "colour",
        right: "It is\nred.", wrong: "It is\n“blue”.",
    }  # fmt: skip


@pytest.mark.parametrize(("rows", "kind"), [([SHOWN], "Text"), ([SAME], "Image")])
def test_the_labelling_config_names_what_tasks_hold(folder, rows, kind):
    [task] = handed_over(folder, "label-studio", *rows)
    config = ElementTree.fromstring((folder / "tasks.xml").read_text())
    used = {value[1:] for tag in config.iter() for key, value in tag.items() if key in ("value", "valueList") and value.startswith("$")}  # fmt: skip
    assert used <= set(task["data"])
    [pairwise] = config.iter("Pairwise")
    compared = {tag.get("name"): tag for tag in config.iter(kind)}
    assert [compared[name].get("value") for name in pairwise.get("toName").split(",")] == ["$left", "$right"]


def test_records_of_argilla(folder):
    [record] = handed_over(folder, "argilla", {**SHOWN, "category": "colour"})
    right, wrong = ("answer_a", "answer_b") if record["metadata"]["chosen"] == "a" else ("answer_b", "answer_a")
    assert record == {
        "id": "shown",
        "fields": {"prompt": "Which colour?", "image": str(folder / "cat.png"), right: "It is\nred.", wrong: "It is\n“blue”."},
        "metadata": {"chosen": record["metadata"]["chosen"], "category": "colour"},
        "suggestions": {}, "responses": {}, "vectors": {},
    }  # fmt: skip
    settings = json.loads((folder / "tasks" / ".argilla" / "settings.json").read_text())
    assert {field["name"] for field in settings["fields"]} == set(record["fields"])
    assert {field["name"]: field["settings"]["type"] for field in settings["fields"]}["image"] == "image"
    assert {entry["name"]: entry["visible_for_annotators"] for entry in settings["metadata"]}["chosen"] is False
    assert json.loads((folder / "tasks" / ".argilla" / "dataset.json").read_text())["name"] == "tasks"


@pytest.mark.parametrize("tool", TOOLS)
def test_the_right_side_is_first_as_often_as_second_and_the_same_again(folder, tool):
    rows = [{**SHOWN, "id": f"row-{n}"} for n in range(60)]
    made = handed_over(folder, tool, *rows)
    sides = [(row.get("meta") or row["metadata"])["chosen"] for row in made]
    assert 20 <= sides.count(sides[0]) <= 40
    again = folder / "again"
    again.mkdir()
    for name in ("cat.png", "dog.png"):
        Image.open(folder / name).save(again / name)
    assert [(row.get("meta") or row["metadata"])["chosen"] for row in handed_over(again, tool, *rows)] == sides


@pytest.mark.parametrize("tool", TOOLS)
def test_two_pictures_of_one_answer(folder, tool):
    [row] = handed_over(folder, tool, SAME)
    if tool == "label-studio":
        shown, right = row["data"], row["meta"]["chosen"]
        names = {side: parse_qs(urlparse(shown[side]).query)["d"][0] for side in ("left", "right")}
    else:
        shown, right = row["fields"], row["metadata"]["chosen"]
        names = {side: Path(shown[f"image_{side}"]).name for side in ("a", "b")}
    assert shown["answer"] == "It is\nred." and names.pop(right) == "cat.png" and [*names.values()] == ["dog.png"]


def test_pictures_elsewhere_are_copied_for_label_studio(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "a picture.png"
    Image.new("RGB", (5, 5)).save(elsewhere)
    far = {**SHOWN, "images": [str(elsewhere)]}
    [task] = handed_over(folder, "label-studio", far)
    name = parse_qs(urlparse(task["data"]["images"][0]).query)["d"][0]
    assert name.startswith("tasks_images/") and (folder / name).read_bytes() == elsewhere.read_bytes()
    [record] = handed_over(folder, "argilla", far)
    assert record["fields"]["image"] == str(elsewhere)


def test_several_turns_and_pictures(folder):
    turns = [
        message("user", IMAGE, IMAGE, text("Same?")),
        message("assistant", text("No.")),
        message("user", text("Why?")),
    ]
    row = {**SHOWN, "images": ["cat.png", "dog.png"], "prompt": turns}
    [task] = handed_over(folder, "label-studio", row)
    assert task["data"]["prompt"] == "user: Same?\n\nassistant: No.\n\nuser: Why?"
    assert [url[-7:] for url in task["data"]["images"]] == ["cat.png", "dog.png"]
    with pytest.raises(UserError, match=r"in.jsonl:1: argilla's layout shows one picture here; this pair has 2"):
        convert(pairs_of(folder, row), "argilla", folder / "tasks")
    assert not any((folder / "tasks").iterdir())


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("first", "second", "line"),
    [
        (SHOWN, SAME, "the first pair compares two answers, and .* has one layout for all"),
        (SAME, SHOWN, "the first pair compares two pictures"),
        (SHOWN, TOLD, "layout shows a picture, and this pair has none"),
    ],
)
def test_what_does_not_fit_is_refused_by_row(folder, tool, first, second, line):
    pairs = pairs_of(folder, first, second)
    out = folder / "out" / ("tasks.json" if tool == "label-studio" else "tasks")
    with pytest.raises(UserError, match=f"in.jsonl:2: .*{line}.*--on-bad-row skip leaves such rows out"):
        convert(pairs, tool, out)
    assert not [file for file in out.parent.rglob("*") if file.is_file()]
    pairs.on_bad_row = "skip"
    assert convert(pairs, tool, out)["written"] == 1


def test_the_command_says_what_comes_next(folder):
    pairs_of(folder, {**SHOWN, "weight": 0.5, "licence": "MIT"})

    def run(*arguments: object):
        return CliRunner().invoke(main, ["convert", str(folder / "in.jsonl"), *map(str, arguments)])

    result = run("--to", "label-studio", "--out", folder / "tasks.json")
    assert result.exit_code == 0, result.output
    assert f"LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT={folder} label-studio" in result.stdout
    assert "lost       'weight' of 1 pairs" in result.stdout and "lost       'licence' of 1 pairs" in result.stdout
    assert f'rg.Dataset.from_disk("{folder / "tasks"}"' in run("--to", "argilla", "--out", folder / "tasks").stdout
    for arguments, line in (
        (("--to", "argilla", "--out", folder / "tasks"), "already exists"),
        (("--to", "argilla", "--out", folder / "x.json"), "written as a folder"),
        (("--to", "label-studio", "--out", folder / "x.jsonl"), "written as .json"),
        (("--to", "labelstudio", "--out", folder / "x.json"), "vapr, trl"),
    ):
        refused = run(*arguments)
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1 and line in refused.stderr
    (folder / "tasks2.xml").write_text("mine")
    refused = run("--to", "label-studio", "--out", folder / "tasks2.json")
    assert refused.exit_code == 2 and "tasks2.xml: already exists" in refused.stderr
    assert (folder / "tasks2.xml").read_text() == "mine"


def test_help_and_docs_name_the_tools():
    helped = CliRunner().invoke(main, ["convert", "--help"], terminal_width=200).output
    docs = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(tool in helped and f"--to {tool}" in docs for tool in TOOLS)
