"""The categories, the nouns and the rows with planted difficulties, read without the code that uses them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

EDITING = Path(__file__).parents[3] / "vapr" / "editing" / "rules"
FILES = sorted((EDITING / "categories").glob("*.yaml"))
CATEGORIES = sorted((yaml.safe_load(file.read_text()) for file in FILES), key=lambda category: category["order"])
BY_NAME = {category["name"]: category for category in CATEGORIES}
NAMES = {
    "object", "attribute", "count", "size", "action", "spatial", "existence", "scene", "text", "comparison",
    "referential", "caption", "reasoning",
}  # fmt: skip
KEYS = {
    "name", "title", "order", "applies", "values", "values_of", "change", "keep", "mode", "min_edits", "max_edits", "checks", "examples",
}  # fmt: skip
CHECKS = {"other_value", "other_number", "opposite", "not_related", "polarity", "other_text", "conclusion"}
PATTERNS = ("question", "answer", "not_question", "not_answer")
CONTEXTS = ("before", "after", "not_before", "not_after", "not_around")
COCO = """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|parking meter|bench|bird|
cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|suitcase|frisbee|ski|snowboard|sports ball|kite|
baseball bat|baseball glove|skateboard|surfboard|tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|
orange|broccoli|carrot|hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|mouse|remote|keyboard|
cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|teddy bear|hair drier|toothbrush"""

INSTRUCTIONS = Path(__file__).parents[1] / "instructions"
ROWS = json.loads((INSTRUCTIONS / "rows.json").read_text())
EXPECTED = [json.loads(line) for line in (INSTRUCTIONS / "expected.jsonl").read_text().splitlines()]


def rule(question: str, answer: str) -> tuple[str, str] | None:
    """The category and the id of the first rule that fits."""
    for category in CATEGORIES:
        for one in category["applies"]:
            text = {"question": question, "answer": answer}
            wanted = all(re.search(one[key], text[key], re.I) for key in ("question", "answer") if key in one)
            unwanted = any(re.search(one[f"not_{key}"], text[key], re.I) for key in text if f"not_{key}" in one)
            words = len(answer.split())
            if (
                wanted
                and not unwanted
                and one.get("min_answer_words", 0) <= words <= one.get("max_answer_words", words)
            ):
                return category["name"], one["id"]
    return None


def turns() -> dict[tuple[str, int], tuple[str, str]]:
    """Question and answer of every turn."""
    said = {}
    for row in ROWS:
        texts = [message["value"].replace("<image>\n", "") for message in row["conversations"]]
        for turn, pair in enumerate(zip(texts[::2], texts[1::2], strict=True)):
            said[row["id"], turn] = pair
    return said


TURNS = turns()


def test_there_are_thirteen_categories_each_in_the_file_of_its_name():
    assert {category["name"] for category in CATEGORIES} == NAMES == {file.stem for file in FILES}
    assert len({category["order"] for category in CATEGORIES}) == 13


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category["name"])
def test_shape(category):
    assert set(category) <= KEYS and KEYS - set(category) <= {"values", "values_of"}
    assert category["mode"] == ("rewrite" if category["name"] == "reasoning" else "edits")
    assert 1 <= category["min_edits"] <= category["max_edits"] <= 4
    assert category["checks"] and set(category["checks"]) <= CHECKS
    ids = [one["id"] for one in category["applies"]]
    assert len(ids) == len(set(ids))
    for one in category["applies"]:
        assert set(one) <= {"id", *PATTERNS, "min_answer_words", "max_answer_words"}
        assert {"question", "answer"} & set(one)
        for key in set(PATTERNS) & set(one):
            re.compile(one[key], re.I)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category["name"])
def test_closed_sets(category):
    sets = category.get("values") or []
    assert len({one["name"] for one in sets}) == len(sets)
    for one in sets:
        assert set(one) <= {"name", "groups", "same", "by_noun", "by_source", "adjective", "said_of", *CONTEXTS}
        members = [member for group in one["groups"] for member in group]
        assert all(
            isinstance(member, str) for member in members
        )  # YAML makes booleans of yes and no, integers of digits
        assert len(members) == len(set(members)), "a value in two groups could be swapped for a wrong opposite"
        for alike in one.get("same", []):
            assert len(set(alike)) == len(alike) > 1
        for key in set(CONTEXTS) & set(one):
            for pattern in one[key]:
                re.compile(pattern, re.I)


@pytest.mark.parametrize("category", CATEGORIES, ids=lambda category: category["name"])
def test_examples(category):
    assert 3 <= len(category["examples"]) <= 4
    for example in category["examples"]:
        answer = example["answer"]
        if category["mode"] == "rewrite":
            rejected = example["rewritten"]
        else:
            assert category["min_edits"] <= len(example["edits"]) <= category["max_edits"]
            rejected = answer
            for edit in example["edits"]:
                assert set(edit) == {"find", "replace", "why_wrong"}
                assert answer.count(edit["find"]) == 1, edit
                rejected = rejected.replace(edit["find"], edit["replace"])
        assert rejected != answer
        assert 0.9 <= len(rejected.split()) / len(answer.split()) <= 1.1, rejected
        assert rule(example["question"], answer)[0] == category["name"]


def test_no_noun_stands_in_two_places():
    seen = Counter()

    def walk(entry):
        if isinstance(entry, str):
            seen.update(name.lower() for name in entry.split("|"))
            return
        assert len(entry) == 1
        for name, kinds in entry.items():
            walk(name)
            for kind in kinds:
                walk(kind)

    for name, entries in yaml.safe_load((EDITING / "nouns.yaml").read_text()).items():
        walk({name: entries})
    assert [name for name, times in seen.items() if times > 1] == []
    missing = {name for name in COCO.replace("\n", "").split("|") if name not in seen}
    assert missing == set()


def test_every_answer_has_its_expectation():
    assert len({row["id"] for row in ROWS}) == len(ROWS) >= 240
    assert [(one["id"], one["turn"]) for one in EXPECTED] == list(TURNS)
    assert {one["category"] for one in EXPECTED} == {*NAMES, None}


def test_rows_have_the_shape_of_llava():
    for row in ROWS:
        speakers = [message["from"] for message in row["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2)
        first = row["conversations"][0]["value"]
        assert first.startswith("<image>\n") == ("image" in row)
        assert sum(message["value"].count("<image>") for message in row["conversations"]) == ("image" in row)


def reason_to_skip(row: dict, question: str, answer: str, seen: set) -> str | None:
    if "image" not in row:
        return "no image"
    if not answer.strip():
        return "empty"
    if re.search(r"\[\s*0\.\d+\s*,", answer):
        return "coordinates"
    if re.fullmatch(r"\W*[A-Z]\W*", answer):
        return "letter"
    return "duplicate" if (row["image"], question, answer) in seen else None


def test_what_is_skipped():
    rows, seen = {row["id"]: row for row in ROWS}, set()
    for one in EXPECTED:
        row, (question, answer) = rows[one["id"]], TURNS[one["id"], one["turn"]]
        assert one["skip"] == reason_to_skip(row, question, answer, seen), one
        assert (one["skip"] is None) == (one["category"] is not None), one
        assert one["skip"] is None or one["values"] == one["never"] == []
        seen.add((row.get("image"), question, answer))


def test_the_rules_choose_the_expected_category_or_none():
    undecided = 0
    for one in EXPECTED:
        if one["skip"] is None:
            chosen = rule(*TURNS[one["id"], one["turn"]])
            assert chosen is None or chosen[0] == one["category"], one
            undecided += chosen is None
    assert undecided < len(EXPECTED) / 10


def test_expected_values_are_members_that_can_be_swapped():
    for one in EXPECTED:
        answer = TURNS[one["id"], one["turn"]][1]
        place = 0
        for value in one["values"]:
            place = answer.index(value["text"], place) + len(value["text"])  # in order of occurrence
            category = BY_NAME[one["category"]]
            sources = [category, *(BY_NAME[name] for name in category.get("values_of", []))]
            (found,) = (a for source in sources for a in source.get("values", []) if a["name"] == value["set"])
            (group,) = (group for group in found["groups"] if value["text"].lower() in group)
            alike = {name for names in found.get("same", []) if value["text"].lower() in names for name in names}
            assert set(group) - alike - {value["text"].lower()}, value


def test_what_must_survive_stands_in_the_answer_and_holds_no_value():
    for one in EXPECTED:
        rest = answer = TURNS[one["id"], one["turn"]][1]
        for kept in one["never"]:
            assert kept in answer, one
            rest = rest.replace(kept, " ")
        for text, times in Counter(value["text"] for value in one["values"]).items():
            assert len(re.findall(rf"\b{re.escape(text)}\b", rest)) >= times, one
