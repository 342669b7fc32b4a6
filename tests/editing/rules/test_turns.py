"""Instruction data in its shapes, as turns; what is left out, and why."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from vapr.editing.config import EditConfig, FilterConfig, SourceConfig
from vapr.editing.job.folder import Job
from vapr.editing.rules.turns import InstructionData, Turn, why_left_out
from vapr.errors import BadRow, UserError


def draw(file: Path) -> bytes:
    picture = io.BytesIO()
    Image.new("RGB", (4, 4), (len(str(file)) % 256, 7, 9)).save(picture, "PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(picture.getvalue())
    return picture.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name in ("coco/cat.png", "dog.png"):
        draw(tmp_path / name)
    return tmp_path


def read(folder: Path, *rows: dict, name: str = "data.jsonl", **source) -> list[list[Turn]]:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = InstructionData(str(folder / name), SourceConfig(**source))
    return [data.turns(n) for n in range(len(data))]


def shown(turn: Turn) -> list[tuple[str, list[str]]]:
    """Roles, and texts with an image part as None."""
    return [(m["role"], [part.get("text") for part in m["content"]]) for m in turn.prompt]


CAT = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


def test_llava_row_of_two_answers_keeps_what_was_said_before(folder):
    more = [{"from": "human", "value": "What color?"}, {"from": "gpt", "value": "Grey."}]
    (turns,) = read(folder, {"id": "7", "image": "coco/cat.png", "conversations": CAT + more})
    assert [(t.number, t.question, t.answer) for t in turns] == [
        (0, "What is it?", "A cat."),
        (1, "What color?", "Grey."),
    ]
    assert shown(turns[0]) == [("user", [None, "What is it?"])]
    assert shown(turns[1]) == [("user", [None, "What is it?"]), ("assistant", ["A cat."]), ("user", ["What color?"])]
    assert [t.images for t in turns] == [(folder / "coco/cat.png",)] * 2
    assert {(t.source_id, t.source, t.where, t.row) for t in turns} == {("7", "coco", f"{folder}/data.jsonl:1", 0)}


ROWS = {
    "llava json": {"image": "dog.png", "conversations": [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]},
    "no placeholder": {"image": "dog.png", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
    "messages": {"images": ["dog.png"], "messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]},
    "parts": {"images": ["dog.png"], "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]}]},
    "vapr": {"images": ["dog.png"], "prompt": "Q?", "chosen": "A.", "rejected": "B."},
    "trl": {"images": ["dog.png"], "prompt": [{"role": "user", "content": "Q?"}], "completion": [{"role": "assistant", "content": "A."}]},
    "question and answer": {"image": "dog.png", "question": "Q?", "answer": "A."},
    "placeholder in the question": {"image": "dog.png", "question": "<image>\nQ?", "answer": "A."},
    "nulls as in parquet": {"image": "dog.png", "question": "Q?", "answer": "A.", "messages": None, "licence": None},
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_shapes_say_the_same(folder, row):
    ((turn,),) = read(folder, row)
    assert shown(turn) == [("user", [None, "Q?"])]
    assert (turn.question, turn.answer, turn.images, turn.licence) == ("Q?", "A.", (folder / "dog.png",), None)


def test_json_list(folder):
    (folder / "rows.json").write_text(json.dumps([ROWS["llava json"], ROWS["messages"]]))
    data = InstructionData(str(folder / "rows.json"), SourceConfig())
    assert [data.turns(n)[0].answer for n in range(len(data))] == ["A.", "A."]
    assert data.where(1) == f"{folder}/rows.json:2"


def test_system_message_stays_in_front(folder):
    ((turn,),) = read(folder, {**ROWS["llava json"], "system": "Be brief."})
    assert shown(turn) == [("system", ["Be brief."]), ("user", [None, "Q?"])]


def test_an_image_of_a_later_question_is_not_the_earlier_ones(folder):
    later = [{"from": "human", "value": "And <image>\nthis?"}, {"from": "gpt", "value": "A dog."}]
    (turns,) = read(folder, {"images": ["coco/cat.png", "dog.png"], "conversations": CAT + later})
    assert [len(turn.images) for turn in turns] == [1, 2]
    assert turns[1].images == (folder / "coco/cat.png", folder / "dog.png")
    assert shown(turns[1])[-1] == ("user", ["And ", None, "this?"])


def test_several_images_without_placeholder_go_first(folder):
    ((turn,),) = read(folder, {"images": ["coco/cat.png", "dog.png"], "question": "Same?", "answer": "No"})
    assert shown(turn) == [("user", [None, None, "Same?"])]


def test_mapped_columns(folder):
    row = {"q": {"texts": ["Q?", "other"]}, "a": {"best": "A."}, "pic": {"file": "dog.png"}}
    columns = {"question": "q.texts.0", "answer": "a.best", "images": "pic.file"}
    ((turn,),) = read(folder, row, columns=columns)
    assert (turn.question, turn.answer, turn.images) == ("Q?", "A.", (folder / "dog.png",))


def test_mapped_columns_go_before_a_conversation_in_the_row(folder):
    row = {"image": "dog.png", "q": "What is it?", "a": "A dog.", "messages": [{"role": "user", "content": "Hello"}]}
    ((turn,),) = read(folder, row, columns={"question": "q", "answer": "a"})
    assert (turn.question, turn.answer) == ("What is it?", "A dog.")


def test_parquet_with_bytes(folder):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    picture = draw(folder / "x.png")
    rows = [{"q": "Q?", "a": {"b": ["A."]}, "image": {"bytes": picture, "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    data = InstructionData(str(folder / "rows.parquet"), SourceConfig(columns={"question": "q", "answer": "a.b.0"}))
    (turn,) = data.turns(0)
    assert (turn.question, turn.answer, turn.images) == ("Q?", "A.", (picture,))
    assert turn.source == "rows.parquet"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "dog.png"}, "no conversations, messages, or prompt and answer; this row has image"),
        ({"image": "none.png", "question": "Q?", "answer": "A."}, "none.png"),
        ({"image": "dog.png", "conversations": [{"from": "human", "value": "Q?"}]}, "no answer in this row"),
        ({"images": ["dog.png"], "conversations": [{"from": "human", "value": "<image><image>Q?"}, CAT[1]]}, r"places 2 image\(s\) but the row has 1"),
        ({"conversations": CAT}, r"places 1 image\(s\) but the row has 0"),
        ({"image": "dog.png", "images": ["coco/cat.png"], "question": "Q?", "answer": "A."}, "both 'images' and 'image' hold images"),
        ({"image": "dog.png", "conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "<image>"}]}, "an answer holds an image part"),
        ([1], "a row must be an object"),
    ],
)  # fmt: skip
def test_bad_rows_say_where_and_why(folder, row, reason):
    with pytest.raises(BadRow, match=rf"/data\.jsonl:1: .*{reason}"):
        read(folder, row)


def test_images_outside_the_root_are_refused(folder):
    with pytest.raises(BadRow, match=r"data\.jsonl:1: "):
        read(folder, {"image": "../dog.png", "question": "Q?", "answer": "A."}, image_root=str(folder / "coco"))
    with pytest.raises(UserError, match=r"source\.image_root: .*: no such folder"):
        read(folder, ROWS["vapr"], image_root=str(folder / "nowhere"))


def test_source_names_and_licences(folder):
    row = {"image": "coco/cat.png", "question": "Q?", "answer": "A."}
    rows = [
        row,
        {**row, "image": "dog.png"},
        {**row, "dataset": "gqa", "licence": "MIT"},
        {**row, "image": str(folder / "dog.png")},
    ]
    turns = [turn for (turn,) in read(folder, *rows, licence="CC0")]
    assert [turn.source for turn in turns] == ["coco", "data.jsonl", "gqa", "data.jsonl"]
    assert [turn.licence for turn in turns] == ["CC0", "CC0", "MIT", "CC0"]
    assert [turn.source for (turn,) in read(folder, *rows, name="llava.jsonl")] == [
        "coco",
        "llava.jsonl",
        "gqa",
        "llava.jsonl",
    ]


def test_the_users_name_of_a_source_goes_first(folder):
    (folder / "d.jsonl").write_text(json.dumps({**ROWS["vapr"], "dataset": "gqa"}) + "\n")
    assert InstructionData(str(folder / "d.jsonl"), SourceConfig(name="mine")).turns(0)[0].source == "mine"


def test_digest_tells_images_prompt_and_answer_apart(folder):
    row = {"image": "coco/cat.png", "question": "Q?", "answer": "A."}
    same, other, question, answer = (turn.digest() for (turn,) in read(
        folder, {**row, "id": "x"}, {**row, "image": "dog.png"}, {**row, "question": "R?"}, {**row, "answer": "B."}))  # fmt: skip
    assert len({same, other, question, answer}) == 4
    assert read(folder, row)[0][0].digest() == same


def test_digest_does_not_tell_where_the_source_lies(folder, monkeypatch):
    row = {"image": "coco/cat.png", "question": "Q?", "answer": "A."}
    here = read(folder, row)[0][0].digest()
    shutil.copytree(folder, folder / "there" / "again")
    monkeypatch.chdir(folder / "there")
    rooted = [read(folder, row, name="there/rooted.jsonl", image_root=root)[0][0] for root in ("again", "../")]
    typed = [InstructionData(name, SourceConfig()).turns(0)[0] for name in ("again/data.jsonl", "./again/*.jsonl")]
    named = read(folder / "there/again", {**row, "image": str(folder / "there/again/coco/cat.png")})[0][0]
    assert {turn.digest() for turn in [*rooted, *typed, named]} == {here}


def test_pictures_of_one_name_in_two_folders_are_two(folder):
    row = {"image": "cat.png", "question": "Q?", "answer": "A."}
    for place in ("coco", "coco2"):
        draw(folder / place / "cat.png")
        (folder / place / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = InstructionData(str(folder / "coco*" / "rows.jsonl"), SourceConfig())
    assert len({data.turns(n)[0].digest() for n in range(2)}) == len(data) == 2


def left_out(folder: Path, question: str, answer: str, **filters) -> str | None:
    ((turn,),) = read(folder, {"image": "dog.png", "question": question, "answer": answer})
    return why_left_out(turn, FilterConfig(**filters))


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Where?", "[0.12, 0.3, 0.5, 0.8]", "coordinates in the answer"), ("Where?", "At (0.5, 0.25).", "coordinates in the answer"),
        ("Where?", "<box>12 3</box>", "coordinates in the answer"), ("Where?", "(12, 40, 300, 280)", "coordinates in the answer"),
        ("Where?", "On the left (2 cats, 3 dogs).", None), ("How many?", "[2]", None),
        ("What?\nA. cat\nB. dog", "B", "the letter of an option"), ("What?\nA. cat\nB. dog", "A", "the letter of an option"),
        ("What?\nA. cat\nB. dog", "(A)", "the letter of an option"), ("Which?", "C.", "the letter of an option"),
        ("What letter is on the hat?", "A", None), ("What?\nA. cat\nB. dog", "The answer is B.", "the letter of an option"),
        ("What?\nA. cat\nB. dog", "A cat", None),
        ("Who wrote this book?", "Ann Lee", "question like "), ("What?", "   ", "empty answer"), ("What?", "A cat", None),
        ("What?", "cat " * 401, "answer longer than 400 words"),
    ],
)  # fmt: skip
def test_filters(folder, question, answer, reason):
    found = left_out(folder, question, answer)
    assert found == reason if reason is None else found.startswith(reason)


def test_filters_can_be_set(folder):
    assert left_out(folder, "Where?", "[0.1, 0.2, 0.3, 0.4]", coordinates=False) is None
    assert left_out(folder, "What?\nA. cat\nB. dog", "B", letters=False) is None
    assert left_out(folder, "What?", "A cat", min_answer_words=3) == "answer shorter than 3 words"
    assert left_out(folder, "What hat?", "Red", skip_questions=[r"\bHAT\b"]) == r"question like \bHAT\b"
    ((turn,),) = read(folder, {"question": "What?", "answer": "A cat"})
    assert why_left_out(turn, FilterConfig()) == "no image" and why_left_out(turn, FilterConfig(no_image=False)) is None


def test_what_is_left_out_is_counted(folder):
    row = {"image": "dog.png", "question": "Q?", "answer": "A cat"}
    rows = [
        row,
        row,
        {**row, "answer": "B"},
        {**row, "image": None},
        {**row, "image": "none.png"},
        {**row, "answer": "A dog"},
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scan = Job(folder / "job", str(folder / "data.jsonl"), EditConfig(), {}).scan
    assert {key: scan[key] for key in ("rows", "turns", "eligible", "bad_rows")} == {
        "rows": 6,
        "turns": 5,
        "eligible": 2,
        "bad_rows": 1,
    }
    assert scan["filtered"] == {"the letter of an option": 1, "no image": 1, "duplicate of an earlier answer": 1}
    assert scan["turns"] == scan["eligible"] + sum(Counter(scan["filtered"]).values())
