"""Verdicts that come back from Label Studio and Argilla: exports as their own packages write them (argilla 2.8, label-studio-sdk 2.1)."""

import json
import re
from pathlib import Path

import pytest

from tests.data.test_annotation import SAME, folder, handed_over  # noqa: F401
from tests.data.test_review_verdicts import FIRST, SECOND, with_verdicts  # noqa: F401
from tests.data.test_writers import SHOWN
from vapr.batches import survey
from vapr.data.annotation import TOOLS, right_side
from vapr.data.review_verdicts import read_verdicts
from vapr.errors import UserError

SIDES = {"label-studio": ("left", "right"), "argilla": ("a", "b")}


def picks(selected: object, **more) -> dict:
    """An annotation of Label Studio."""
    region = {"value": {"selected": selected}, "id": "Dx_aB91ISN", "from_name": "right", "to_name": "left_side,right_side",
              "type": "pairwise", "origin": "manual"}  # fmt: skip
    result = [] if selected is None else [region]
    return {"id": 7, "completed_by": 1, "result": result, "was_cancelled": False, "ground_truth": False, **more}


def answered(tool: str, task: dict, *answers: object) -> dict:
    """A task as it is exported after people have answered."""
    if tool == "label-studio":
        return {"id": 3, **task, "annotations": [picks(answer) for answer in answers], "drafts": [], "predictions": []}
    responses = [{"value": answer, "user_id": f"user-{n}"} for n, answer in enumerate(answers)]
    status = "completed" if answers else "pending"
    return {**task, "responses": {"right": responses} if responses else {}, "status": status, "_server_id": "9e19"}


def exported(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def read(path: Path) -> tuple[dict, list[str]]:
    said: list[str] = []
    return read_verdicts(path, said.append), said


@pytest.mark.parametrize("row", [SHOWN, SAME], ids=["answers", "pictures"])
@pytest.mark.parametrize("tool", TOOLS)
def test_who_picks_the_chosen_side_keeps_the_pair(folder, tool, row):  # noqa: F811
    tasks = handed_over(folder, tool, *({**row, "id": f"row-{n}"} for n in range(8)))
    rights = [(task.get("meta") or task["metadata"])["chosen"] for task in tasks]
    assert set(rights) == set(SIDES[tool])
    first, second = SIDES[tool]
    other = {first: second, second: first}
    kept = exported(folder / "kept.json", *(answered(tool, t, r, r) for t, r in zip(tasks, rights, strict=True)))
    assert read(kept) == (dict.fromkeys([f"row-{n}" for n in range(8)], "keep"), [])
    dropped = exported(
        folder / "dropped.json", *(answered(tool, t, other[r]) for t, r in zip(tasks, rights, strict=True))
    )
    assert read(dropped) == (dict.fromkeys([f"row-{n}" for n in range(8)], "drop"), [])
    for task in tasks:  # a tool that keeps nothing but what it shows
        task.pop("meta", None), task.pop("metadata", None)
    assert read(exported(kept, *(answered(tool, t, r) for t, r in zip(tasks, rights, strict=True))))[
        0
    ] == dict.fromkeys([f"row-{n}" for n in range(8)], "keep")


def a_task(tool: str, id: object, *answers: object, **changes) -> dict:
    side = SIDES[tool][0]
    task = (
        {"data": {"id": id}, "meta": {"chosen": side}}
        if tool == "label-studio"
        else {"id": id, "metadata": {"chosen": side}}
    )
    return {**answered(tool, task, *answers), **changes}


@pytest.mark.parametrize("tool", TOOLS)
def test_what_decides_nothing_is_counted_with_the_first(tmp_path, tool):
    first, second = SIDES[tool]
    rows = [
        a_task(tool, "kept", first), a_task(tool, "nobody"), a_task(tool, "nobody-2"), a_task(tool, "torn", first, second),
        a_task(tool, "odd", first, "middle"), a_task(tool, "list", ["a"]), a_task(tool, 7, first), a_task(tool, "", first), 5,
        {"id": "bare"}, a_task(tool, "twice", first), a_task(tool, "twice", second), a_task(tool, "neither", "neither"),
    ]  # fmt: skip
    verdicts, [line] = read(exported(tmp_path / "x.json", *rows))
    assert verdicts == {"kept": "keep", "neither": "drop"}
    assert line == (
        f"{tmp_path / 'x.json'}: 10 without a verdict: 2 no id of a pair (the first: row 7), 2 no task that vapr wrote (the "
        "first: row 9), 2 not answered (the first: 'nobody'), 2 people disagree (the first: 'torn'), 2 an answer that is no "
        "side (the first: 'odd')"
    )


def test_what_was_skipped_in_label_studio_counts_no_more_than_an_empty_answer(tmp_path):
    row = a_task("label-studio", "skipped")
    other_region = {"from_name": "notes", "type": "textarea", "value": {"text": ["hm"]}}
    for annotation in (
        picks("right", was_cancelled=True),
        picks(None),
        {**picks(None), "result": [other_region, 3]},
        3,
    ):
        row["annotations"] = [annotation]
        rows = (row, a_task("label-studio", "kept", "left"))
        verdicts, [line] = read(exported(tmp_path / "x.json", *rows))
        assert verdicts == {"kept": "keep"} and line.endswith(
            "1 without a verdict: 1 not answered (the first: 'skipped')"
        )


def test_what_argilla_has_as_draft_or_discarded(tmp_path):
    rows = (
        a_task("argilla", "draft", "b", status="pending"),
        a_task("argilla", "discarded", None),
        a_task("argilla", "kept", "a", None),
    )
    verdicts, [line] = read(exported(tmp_path / "x.json", *rows))
    assert verdicts == {"kept": "keep"} and "2 not answered (the first: 'draft')" in line


def test_the_folder_that_argilla_writes(tmp_path):
    (tmp_path / "judged").mkdir()
    exported(tmp_path / "judged" / "records.json", a_task("argilla", "kept", "a"))
    assert read(tmp_path / "judged") == ({"kept": "keep"}, [])
    with pytest.raises(UserError, match=r"verdicts: .*empty/records\.json: no such file"):
        (tmp_path / "empty").mkdir()
        read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (json.dumps([a_task("argilla", "kept", "a")])[:-9], "x.json: not valid JSON (.*); export it again"),
        ("[" * 100_000, "x.json: not valid JSON (.*); export it again"),
        ("[]", "holds no task that vapr wrote for people; export Label Studio's tasks as JSON .not JSON-MIN., or"),
        ('[{"id": 1, "annotation_id": 4, "left": "x", "right": "left"}]', "holds no task .* .not JSON-MIN."),
        (json.dumps([a_task("argilla", "x"), a_task("argilla", "y")]),
         "x.json: holds no verdict; 2 without a verdict: 2 not answered .the first: 'x'."),
    ],
    ids=["cut short", "nested", "empty", "JSON-MIN", "nothing answered"],
)  # fmt: skip
def test_a_file_that_decides_nothing_is_one_line(tmp_path, text, line):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError) as caught:
        read(tmp_path / "x.json")
    assert re.search(line, str(caught.value)) and "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_training_leaves_out_what_people_dropped_there(with_verdicts, tmp_path):  # noqa: F811
    rows = [a_task("label-studio", FIRST, "right"), a_task("label-studio", SECOND, "left"), a_task("label-studio", "gone", "left"),
            a_task("label-studio", "open")]  # fmt: skip
    exported(tmp_path / "verdicts.jsonl", *rows)
    result = survey.survey(with_verdicts)
    assert (result["rows"], result["pairs"]) == (8, 7)


def test_a_side_is_drawn_by_the_id_alone():
    assert {right_side(f"row-{n}") for n in range(20)} == {"first", "second"}
    assert right_side("\ud800") in ("first", "second")  # what JSON may hold
