"""Several candidates for an answer: who asks for them, what ends them, which becomes the pair; several editors."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from vapr.editing.config import EditConfig
from vapr.editing.draft.candidates import NOT_CHOSEN, SAME_CANDIDATE
from vapr.editing.draft.draft import Draft
from vapr.editing.draft.editor import TRUE_HERE, Editor
from vapr.editing.draft.mix import Mix
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.turns import Turn
from vapr.errors import UserError
from vapr.llm.request import Reply, Request

CATEGORIES = load_categories(["object"])
ANSWER = "The man holds a kite over there."
RUBRIC = "The kite must become something that flies."


def turn(number: int = 0, answer: str = ANSWER) -> Turn:
    question = f"What is the man holding? {number}"
    prompt = ({"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},)
    return Turn(number, 0, f"rows.json:{number + 1}", f"row-{number}", "coco", None, (Path(f"{number}.png"),),
                (f"{number}.png",), prompt, question, answer)  # fmt: skip


def edit_to(word: str, find: str = "kite") -> str:
    return json.dumps({"edits": [{"find": find, "replace": word, "category": "object", "why_wrong": "no"}]})


class Model:
    """Answers each kind of request with its own function of the request."""

    engine, num_gpus = "test", 0

    def __init__(self, name: str = "model", **answers) -> None:
        self.name, self.revision, self.answers = name, f"revision of {name}", answers
        self.asked: dict[str, list[Request]] = {}

    def ask(self, requests, on_reply=lambda: None):
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Reply:
        [kind] = request.schema["properties"]
        self.asked.setdefault(kind, []).append(request)
        said = self.answers[kind]
        return Reply(said.pop(0) if isinstance(said, list) else said(request))


def edited(model, turns, *settings: str, **more) -> list[Draft]:
    config = EditConfig.load(None, settings)
    drafts, _ = Editor(config, CATEGORIES, model, **more).edit(turns, "shard")
    return drafts


def ends(draft: Draft) -> list[tuple[str, str | None]]:
    return [(candidate.status, candidate.reason) for candidate in draft.candidates]


def test_each_candidate_has_its_own_seed_and_the_first_that_of_a_job_without():
    one, three = (Model(edits=[edit_to("rope")] * n) for n in (1, 3))
    edited(one, [turn()])
    [draft] = edited(three, [turn()], "ask.candidates=3")
    seeds = [request.seed for request in three.asked["edits"]]
    assert len(set(seeds)) == 3 and seeds[0] == one.asked["edits"][0].seed
    assert len({json.dumps(request.messages) for request in three.asked["edits"]}) == 1
    assert ends(draft) == [("chosen", None), ("same", SAME_CANDIDATE), ("same", SAME_CANDIDATE)]
    assert (draft.status, draft.rejected) == ("accepted", "The man holds a rope over there.")


def test_what_the_checks_refuse_is_not_chosen_and_nobody_is_asked_again():
    model = Model(edits=["prose", edit_to("kite"), edit_to("rope")])
    [draft] = edited(model, [turn()], "ask.candidates=3")
    assert (draft.status, draft.attempts, draft.raw) == ("accepted", 1, edit_to("rope"))
    assert [status for status, _ in ends(draft)] == ["refused", "refused", "chosen"]
    assert draft.refused == [] and all(verdict.passed for verdict in draft.verdicts)


def test_only_where_all_are_refused_they_are_asked_for_again():
    model = Model(edits=[*["prose"] * 2, edit_to("rope"), edit_to("bag")])
    [draft] = edited(model, [turn()], "ask.candidates=2")
    assert (draft.status, draft.attempts, draft.refused) == ("accepted", 2, ["the reply is not JSON"])
    assert "Your last edit was refused: the reply is not JSON." in model.asked["edits"][2].messages[-1]["content"]
    assert len({request.seed for request in model.asked["edits"]}) == 4
    [draft] = edited(Model(edits=["prose"] * 4), [turn()], "ask.candidates=2", "ask.attempts=2")
    assert (draft.status, draft.reason, len(draft.candidates)) == ("failed", "the reply is not JSON", 4)


def test_the_blind_check_chooses_among_candidates():
    model = Model(
        edits=[edit_to("lamp"), edit_to("rope")],
        both_can_be_true=lambda request: json.dumps({"both_can_be_true": "lamp" in request.messages[-1]["content"]}),
    )
    [draft] = edited(model, [turn()], "ask.candidates=2", "checks.blind=true")
    assert draft.rejected == "The man holds a rope over there."
    assert ends(draft)[0] == ("rejected", "blind check: both answers could be true of one image")
    model = Model(edits=[edit_to("lamp"), "prose"], both_can_be_true=lambda request: '{"both_can_be_true": true}')
    [draft] = edited(model, [turn()], "ask.candidates=2", "checks.blind=true")
    assert (draft.status, draft.reason) == ("rejected", "blind check: both answers could be true of one image")


def test_the_verifier_chooses_among_candidates():
    def look(request: Request) -> str:
        task = json.loads(request.messages[-1]["content"][-1]["text"])
        right = "A" if task["A"] == ANSWER else "B"
        return json.dumps({"right": "both" if "lamp" in task["A"] + task["B"] else right})

    verifier = Model("verifier", right=look)
    [draft] = edited(
        Model(edits=[edit_to("lamp"), edit_to("rope")]), [turn()], "ask.candidates=2",
        verifier=verifier, pictures=lambda image: "data:",
    )  # fmt: skip
    assert draft.rejected == "The man holds a rope over there." and len(verifier.asked["right"]) == 4
    assert ends(draft)[0] == ("rejected", "verifier: the image does not tell the two answers apart")
    assert draft.verdicts[-1].name == "verifier" and draft.verdicts[-1].value == 2


def test_a_true_answer_is_no_candidate():
    other = Turn(
        **{
            **{name: getattr(turn(), name) for name in Turn.__slots__},
            "number": 1,
            "answer": "The man holds a rope over there.",
        }
    )
    model = Model(edits=[edit_to("rope"), edit_to("bag"), *[edit_to("lamp", "rope")] * 2])
    drafts = edited(model, [turn(), other], "ask.candidates=2")
    assert drafts[0].rejected == "The man holds a bag over there." and ends(drafts[0])[0] == ("rejected", TRUE_HERE)


# The judge


def judge(points: dict[str, object]):
    """Gives points by the word that a wrong answer holds; anything else than a number is the whole reply."""

    def say(request: Request) -> str:
        wrong = json.loads(request.messages[-1]["content"])["wrong_answer"]
        given = next(number for word, number in points.items() if word in wrong)
        return json.dumps({"score": given}) if isinstance(given, int) else str(given)

    return say


def test_a_judge_decides_by_the_user_s_rubric():
    model = Model(
        edits=[edit_to("rope"), edit_to("bird"), edit_to("bag")], score=judge({"rope": 3, "bird": 9, "bag": 0})
    )
    [draft] = edited(model, [turn()], "ask.candidates=3", f"ask.rubric={RUBRIC}")
    assert draft.rejected == "The man holds a bird over there." and draft.score == 9
    assert ends(draft) == [("not_chosen", NOT_CHOSEN), ("chosen", None), ("not_chosen", NOT_CHOSEN)]
    verdict = draft.verdicts[-1]
    assert (verdict.name, verdict.passed, verdict.value) == ("judge", True, 9.0)
    request = model.asked["score"][0]
    assert RUBRIC in request.messages[0]["content"]
    assert json.loads(request.messages[1]["content"]) == {
        "question": "What is the man holding? 0", "true_answer": ANSWER, "wrong_answer": "The man holds a rope over there.",
    }  # fmt: skip


def test_another_model_may_judge_and_is_not_asked_about_one_candidate():
    other = Model("judge", score=judge({"rope": 3, "bird": 9}))
    model = Model(edits=[edit_to("rope"), edit_to("bird"), edit_to("rope"), "prose"])
    drafts = edited(model, [turn(0), turn(1)], "ask.candidates=2", f"ask.rubric={RUBRIC}", judge=other)
    assert [draft.score for draft in drafts] == [9, None] and len(other.asked["score"]) == 2


@pytest.mark.parametrize(
    "prose", ["It is fine, I would say 10 of 10.", '{"score": 11}', '{"score": "9"}', "9", "[]", ""]
)
def test_a_judge_that_answers_prose_gives_no_points(prose):
    model = Model(edits=[edit_to("rope"), edit_to("bird")], score=judge({"rope": prose, "bird": 0}))
    [draft] = edited(model, [turn()], "ask.candidates=2", f"ask.rubric={RUBRIC}")
    assert draft.rejected == "The man holds a bird over there." and draft.score == 0
    [verdict] = [verdict for verdict in draft.candidates[0].verdicts if verdict.name == "judge"]
    assert verdict.passed and verdict.value is None and verdict.note.startswith("no points: ")


def test_a_judge_that_never_gives_points_leaves_the_other_rules():
    model = Model(edits=[edit_to("long rope"), edit_to("bird")], score=lambda request: "prose")
    [draft] = edited(model, [turn()], "ask.candidates=2", f"ask.rubric={RUBRIC}")
    assert (draft.status, draft.rejected, draft.score) == ("accepted", "The man holds a bird over there.", None)


# Balance


def test_of_equal_candidates_the_words_stay_in_balance():
    """One candidate of each answer is "rope", which would tell; the others differ."""
    others = ["belt", "bowl", "cane", "coin", "drum", "fork", "lamp", "leaf", "mask", "vase"]
    replies = [edit_to(word) for other in others for word in ("rope", other)]
    drafts = edited(Model(edits=list(replies)), [turn(n) for n in range(10)], "ask.candidates=2")
    assert max(Counter(draft.edits[0].to for draft in drafts).values()) == 1
    first = edited(Model(edits=replies[::2]), [turn(n) for n in range(10)])
    assert Counter(draft.edits[0].to for draft in first) == {"rope": 10}


def test_what_another_answer_holds_goes_into_this_one():
    """A rope taken out there and put in here: the word tells nothing."""
    turns = [turn(0), turn(1, "The man holds a rope over there.")]
    replies = [edit_to("lamp"), edit_to("rope"), edit_to("lamp", "rope"), edit_to("kite", "rope")]
    drafts = edited(Model(edits=replies), turns, "ask.candidates=2")
    assert [draft.edits[0].to for draft in drafts] == ["rope", "kite"]


def test_rejected_answers_are_as_often_longer_as_shorter():
    turns = [turn(n) for n in range(10)]
    replies = [edit_to(word) for n in range(10) for word in (f"w{n}onder", f"b{n}")]  # letters more, letters less
    drafts = edited(Model(edits=replies), turns, "ask.candidates=2")
    longer = sum(len(draft.rejected) > len(draft.turn.answer) for draft in drafts)
    assert longer == 5


def test_the_choice_repeats():
    words = ["rope", "bag", "cup", "fan", "hat", "jar"]
    rng = random.Random(3)
    replies = [edit_to(rng.choice(words)) for _ in range(60)]
    turns = [turn(n) for n in range(20)]
    one, other = (edited(Model(edits=list(replies)), turns, "ask.candidates=3") for _ in range(2))
    assert [draft.rejected for draft in one] == [draft.rejected for draft in other]


# Several editors


def test_editors_share_the_answers_by_their_weights():
    names = {"big": 3.0, "small": 1.0}
    models = {name: Model(name, edits=lambda request: edit_to("rope")) for name in names}
    mix = Mix([(models[name], weight) for name, weight in names.items()], seed=0)
    turns = [turn(n) for n in range(400)]
    drafts = edited(mix, turns)
    counts = Counter(draft.editor for draft in drafts)
    assert counts.total() == 400 and 260 < counts["big"] < 340  # 300, and four standard deviations of 8.7
    assert {name: len(model.asked["edits"]) for name, model in models.items()} == counts
    # An answer's editor follows from the answer and the seed alone.
    again = edited(mix, turns[300:])
    assert [draft.editor for draft in again] == [draft.editor for draft in drafts[300:]]
    other_seed = Mix([(models[name], weight) for name, weight in names.items()], seed=1)
    assert [other_seed.of(one).name for one in turns] != [draft.editor for draft in drafts]


def test_each_editor_asks_again_and_judges_for_itself():
    def model(name: str) -> Model:
        return Model(
            name, edits=lambda request: edit_to("rope") if "refused" in request.messages[-1]["content"] else "prose",
            both_can_be_true=lambda request: '{"both_can_be_true": false}',
        )  # fmt: skip

    one, other = model("one"), model("other")
    drafts = edited(Mix([(one, 1.0), (other, 1.0)]), [turn(n) for n in range(20)], "checks.blind=true")
    counts = Counter(draft.editor for draft in drafts)
    assert {draft.attempts for draft in drafts} == {2} and counts.total() == 20 and len(counts) == 2
    for asked in (one, other):
        assert len(asked.asked["edits"]) == 2 * counts[asked.name]
        assert len(asked.asked["both_can_be_true"]) == counts[asked.name]


def test_two_editors_of_one_name_would_not_be_told_apart():
    with pytest.raises(UserError, match="editors: two of them are the model same; name each model once"):
        Mix([(Model("same"), 1.0), (Model("same"), 1.0)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("ask.candidates=0",), "ask.candidates"),
        (("ask.candidates=2", "ask.temperature=0"), "at ask.temperature 0 all candidates of an answer are the same"),
        (("ask.rubric=short",), "ask.rubric ranks candidates, and ask.candidates is 1"),
        (("ask.candidates=2", "ask.judge=m"), "ask.judge needs ask.rubric"),
        (("editors={a: 1}",), "editors"),
        (("editors={a: 1, b: 0}",), "editors.b: a weight must be above 0, got 0"),
    ],
)
def test_settings_that_contradict_themselves(settings, message):
    with pytest.raises(UserError, match=message):
        EditConfig.load(None, settings)
