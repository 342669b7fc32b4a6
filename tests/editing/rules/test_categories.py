"""Categories as data: loading, the user's own, rules and closed sets."""

import copy

import pytest
import yaml

from vapr.editing.rules.categories import Categories, Category, ClosedSet, Rule, load_categories, read_category
from vapr.errors import UserError

MINE = {
    "name": "mood", "title": "Mood", "order": 5, "applies": [{"id": "asks-mood", "question": r"\bmood\b"}],
    "values": [{"name": "moods", "groups": [["happy", "sad"], ["calm", "wild"]], "same": [["happy", "glad"]]}],
    "change": "The mood.", "keep": "The rest.", "checks": ["other_value"],
    "examples": [{"question": "Q", "answer": "A happy dog", "edits": [{"find": "happy", "replace": "sad", "why_wrong": "no"}]}],
}  # fmt: skip


def write(folder, **changes) -> str:
    mine = copy.deepcopy(MINE)
    for key, value in changes.items():
        if value is None:
            del mine[key]
        else:
            mine[key] = value
    (folder / "mine.yaml").write_text(yaml.safe_dump(mine))
    return str(folder / "mine.yaml")


def test_all_load_in_their_order():
    categories = load_categories()
    assert len(categories.names) == 13 and categories.names[0] == "existence" and categories.names[-1] == "object"
    assert [one.order for one in categories.all] == sorted(one.order for one in categories.all)
    assert "count" in categories and "mood" not in categories
    assert categories.digest == load_categories().digest != load_categories(["count"]).digest


def test_some_load_by_name():
    assert load_categories(["count", "existence"]).names == ["existence", "count"]
    with pytest.raises(UserError, match=r"plan\.categories: no category 'cuont'; there are .*count"):
        load_categories(["cuont"])


def test_a_users_category_is_added(tmp_path):
    categories = load_categories(None, [write(tmp_path)])
    assert categories.names[0] == "mood" and len(categories.names) == 14
    assert load_categories(["mood"], [write(tmp_path)]).names == ["mood"]
    assert [(one.name, rule) for one, rule in categories.by_rule("What is the mood?", "Yes")] == [
        ("mood", "mood:asks-mood"), ("existence", "existence:bare-yes-no"),
    ]  # fmt: skip


def test_a_users_category_of_a_known_name_replaces_it(tmp_path):
    categories = load_categories(None, [write(tmp_path, name="count")])
    assert len(categories.names) == 13 and categories["count"].title == "Mood"


def test_a_caption_has_the_values_of_others(tmp_path):
    names = {closed.name for closed in load_categories()["caption"].values}
    assert {"colours", "number-word", "left-right", "weather"} <= names and "yes-no" not in names
    assert "colours" in {closed.name for closed in load_categories(["caption"])["caption"].values}
    replaced = load_categories(None, [write(tmp_path, name="attribute")])
    assert "moods" in {closed.name for closed in replaced["caption"].values}
    with pytest.raises(UserError, match="category 'mood': values_of names 'nothing'; there are"):
        load_categories(None, [write(tmp_path, values_of=["nothing"])])


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"title": None}, "title: Field required"), ({"colour": 1}, "colour: Extra inputs"), ({"name": "My Mood"}, "name: "),
        ({"checks": ["polarty"]}, r"checks\.0: "), ({"min_edits": 3, "max_edits": 2}, r"max_edits \(2\) is below min_edits \(3\)"),
        ({"applies": [{"id": "x", "question": "(" }]}, "applies"), ({"order": "first"}, "order: "),
        ({"examples": [{"question": "Q", "answer": "A dog", "edits": [{"find": "cat", "replace": "x", "why_wrong": "y"}]}]}, "'cat' must occur once"),
        ({"examples": [{"question": "Q", "answer": "A dog"}]}, "an example needs 'edits'"),
        ({"mode": "rewrite"}, "an example of a rewrite needs 'rewritten'"),
        ({"values": [{"name": "x", "groups": [["a", True]]}]}, r"values\.0\.groups\.0\.1: "),
        ({"values": [{"name": "x", "groups": [["a", "b"]], "before": ["["]}]}, "values"),
    ],
)  # fmt: skip
def test_mistakes_are_told_with_file_and_key(tmp_path, changes, place):
    with pytest.raises(UserError, match=rf"mine\.yaml: .*{place}") as error:
        read_category(tmp_path / write(tmp_path, **changes))
    assert "\n" not in str(error.value)


def test_files_that_are_no_categories(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_categories(None, [str(tmp_path / "none.yaml")])
    for text, reason in (("a: [", "not valid YAML"), ("- a", r"mine\.yaml: "), ("", r"mine\.yaml: ")):
        (tmp_path / "mine.yaml").write_text(text)
        with pytest.raises(UserError, match=reason):
            read_category(tmp_path / "mine.yaml")


def test_everything_that_a_rule_gives_must_hold():
    rule = Rule(
        id="x",
        question="colou?r",
        answer="^the",
        not_question="why",
        not_answer="blue",
        min_answer_words=2,
        max_answer_words=4,
    )
    assert rule.fits("What COLOR?", "The red hat")
    for question, answer in (("What size?", "The red hat"), ("What color?", "A red hat"), ("Why that color?", "The red hat"),
                             ("What color?", "The blue hat"), ("What color?", "The"), ("What color?", "The very big red hat")):  # fmt: skip
        assert not rule.fits(question, answer)


def found(closed: ClosedSet, text: str) -> list[tuple[int, str]]:
    return [(value.start, value.text) for value in closed.find(text)]


def test_values_are_whole_words_and_the_longest():
    closed = ClosedSet(name="x", groups=[["in", "in front of", "behind"], ["red"]])
    assert found(closed, "In front of it, behind tinned redness, in red") == [
        (0, "In front of"),
        (16, "behind"),
        (39, "in"),
        (42, "red"),
    ]
    assert [value.group for value in closed.find("in red")] == [0, 1]
    assert found(closed, "behınd İn İT RED") == [(13, "RED")]  # patterns that ignore case take these for an i


def test_patterns_beside_a_value():
    closed = ClosedSet(name="x", groups=[["left", "right"]], before=["the $", "^$"], after=["^ side", "^$"], not_before=["not the $"], not_after=["^ side of"])  # fmt: skip
    assert found(closed, "the left side") == [(4, "left")]
    assert found(closed, "left") == [(0, "left")]
    for text in ("a left side", "the left hand", "not the left side", "the left side of it"):
        assert found(closed, text) == []


def test_patterns_around_a_value():
    closed = ClosedSet(name="x", groups=[["orange", "red"]], not_around=[r"an orange\."])
    assert found(closed, "an orange hat") == [(3, "orange")] and found(closed, "It is an orange.") == []


def test_near_synonyms_need_not_be_transitive():
    closed = ClosedSet(name="x", groups=[["grey", "silver", "white"]], same=[["grey", "silver"], ["silver", "white"]])
    assert closed.alike("Grey", "silver") and closed.alike("silver", "WHITE") and closed.alike("grey", "grey")
    assert not closed.alike("grey", "white")


def test_of_overlapping_values_the_longest_of_the_first():
    category = Category(name="x", title="", order=1, change="", keep="", values=[
        ClosedSet(name="one", groups=[["top", "left"]]), ClosedSet(name="two", groups=[["top left", "bottom right"]])])  # fmt: skip
    assert [(value.set.name, value.text) for value in category.find_values("at the top left, left of it")] == [
        ("two", "top left"),
        ("one", "left"),
    ]


def test_the_first_rule_of_each_category_in_their_order():
    rules = [{"id": "never", "question": "zzz"}, {"id": "a", "question": "."}, {"id": "b", "question": "."}]
    made = [
        Category(name=name, title="", order=order, change="", keep="", applies=rules)
        for name, order in (("y", 2), ("x", 2), ("z", 1))
    ]
    assert [(one.name, rule) for one, rule in Categories(made).by_rule("?", "!")] == [
        ("z", "z:a"),
        ("x", "x:a"),
        ("y", "y:a"),
    ]
