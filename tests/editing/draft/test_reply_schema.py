"""What the schema of a reply lets a model say, on the grammar compiler that vLLM uses; and what is held to bounds."""

import json
from pathlib import Path

import pytest

from vapr.editing.config import EditConfig
from vapr.editing.draft.editor import Editor
from vapr.editing.draft.prompts import BadReply, edit_schema, read_edits, read_rewrite
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.turns import Turn
from vapr.llm.request import Reply

CATEGORIES = load_categories()
QUESTION, SIGN = "What does the sign say?", 'The stop sign has the word "stop" on it.'
EDIT = {"find": '"stop"', "replace": '"slow"', "category": "text", "why_wrong": 'It says "stop".'}


def turn(question: str = QUESTION, answer: str = SIGN) -> Turn:
    prompt = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},)
    return Turn(0, 0, "rows.json:1", "row-0", "coco", None, (Path("0.png"),), ("0.png",), prompt, question, answer)


def allows(schema: dict, reply: object) -> bool:
    """Whether the grammar of the schema, compiled as vLLM does under ``disable_any_whitespace``, takes a reply."""
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed (it comes with vLLM)")
    from xgrammar.testing import _is_grammar_accept_string

    grammar = xgrammar.Grammar.from_json_schema(json.dumps(schema), any_whitespace=False)
    return bool(_is_grammar_accept_string(grammar, json.dumps(reply)))


@pytest.mark.parametrize("category", CATEGORIES.all, ids=lambda category: category.name)
def test_the_grammar_lets_a_model_quote(category):
    said = [{**EDIT, "category": category.name}] * category.min_edits
    rewritten = {"rewritten": SIGN.replace("stop", "slow"), "why_wrong": EDIT["why_wrong"]}
    assert allows(edit_schema(category), rewritten if category.mode == "rewrite" else {"edits": said})


def test_the_grammar_still_holds_a_reply_to_its_shape():
    schema = edit_schema(CATEGORIES["text"])
    assert not allows(schema, {"edits": []})
    assert not allows(schema, {"edits": [EDIT] * 3})
    assert not allows(schema, {"edits": [{**EDIT, "category": "colour"}]})
    assert not allows(schema, {"edits": [{**EDIT, "more": "x"}]})


class Says:
    """A language model that gives one reply after the other."""

    name, revision, engine, num_gpus = "says", "1", "test", 0

    def __init__(self, *replies: dict) -> None:
        self.replies = list(replies)
        self.asked: list[str] = []

    def ask(self, requests, on_reply=lambda: None):
        self.asked += [request.messages[-1]["content"] for request in requests]
        return [Reply(json.dumps(self.replies.pop(0))) for _ in requests]


def test_a_quotation_is_edited():
    (draft,), _ = Editor(EditConfig(), CATEGORIES, Says({"edits": [EDIT]})).edit([turn()], "s")
    assert (draft.status, draft.rejected) == ("accepted", 'The stop sign has the word "slow" on it.')
    assert draft.attempts == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({**EDIT, "why_wrong": "x" * 201}, "edits.0.why_wrong: String should have at most 200 characters"),
        ({**EDIT, "find": ""}, "edits.0.find: String should have at least 1 character"),
    ],
    ids=["why_wrong", "find"],
)
def test_what_is_out_of_bounds_is_asked_for_again(bad, problem):
    with pytest.raises(BadReply, match=problem):
        read_edits(json.dumps({"edits": [bad]}), CATEGORIES["text"])
    llm = Says({"edits": [bad]}, {"edits": [EDIT]})
    (draft,), _ = Editor(EditConfig(), CATEGORIES, llm).edit([turn()], "s")
    assert (draft.status, draft.attempts, draft.refused) == ("accepted", 2, [f"the reply does not fit: {problem}"])
    assert f"Your last edit was refused: the reply does not fit: {problem}." in llm.asked[1]
    (draft,), _ = Editor(EditConfig(), CATEGORIES, Says(*[{"edits": [bad]}] * 3)).edit([turn()], "s")
    assert (draft.status, draft.reason) == ("failed", f"the reply does not fit: {problem}")


def test_a_rewrite_is_held_to_bounds_too():
    with pytest.raises(BadReply, match="why_wrong: String should have at most 200 characters"):
        read_rewrite(json.dumps({"rewritten": "A dog.", "why_wrong": "x" * 201}))
