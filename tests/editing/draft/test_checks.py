"""Each check with pairs that hold it and pairs that do not."""

import dataclasses

import pytest

from vapr.data.pair import Edit
from vapr.editing.config import CheckConfig
from vapr.editing.draft.checks import Verdict, check_pair
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.nouns import Nouns, WordNet
from vapr.editing.rules.operations import Operation, apply, changed_spans
from vapr.errors import UserError

CATEGORIES = load_categories()
NOUNS = Nouns()
LONG = "The man in the red shirt is sitting on a bench near the old gate of the park."  # 18 words


def verdicts(chosen: str, rejected: str, category: str, nouns: Nouns = NOUNS, **limits) -> dict[str, Verdict]:
    config = dataclasses.replace(CheckConfig(), **limits)
    edits = changed_spans(chosen, rejected)
    return {one.name: one for one in check_pair(chosen, rejected, edits, CATEGORIES[category], config, nouns)}


def failed(*args, **kwargs) -> list[str]:
    return [name for name, verdict in verdicts(*args, **kwargs).items() if not verdict.passed]


def test_a_good_pair_passes_everything():
    found = verdicts(LONG, LONG.replace("red", "blue"), "attribute")
    assert list(found) == [
        "different",
        "characters",
        "length",
        "distance",
        "style",
        "repeats",
        "marks",
        "edits",
        "other_value",
    ]
    assert all(verdict.passed and not verdict.note for verdict in found.values())
    assert (found["length"].value, found["edits"].value) == (1.0, 1.0)
    assert found["distance"].value == round(1 / 19, 4)  # 18 words and a full stop


@pytest.mark.parametrize("rejected", ["Red  hat.", "red hat", "RED HAT!", "Red-hat"])
def test_more_than_case_space_and_punctuation_must_change(rejected):
    assert "different" in failed("Red hat", rejected, "attribute")


def test_length_and_distance_limits():
    base = " ".join(f"word{n}" for n in range(20))
    for more, passed in ((2, True), (3, False)):
        longer = base + " more" * more
        assert ("length" not in failed(base, longer, "object")) == passed
    assert "length" in failed(base, longer, "object")
    assert "length" not in failed(base, longer, "object", length_ratio=(0.8, 1.2))
    nine = " ".join(f"word{n}" for n in range(9))
    assert "length" not in failed(nine, nine + " more", "object")  # 1.11, but one word only
    assert "length" in failed(nine, nine + " more", "object", hard_length_ratio=(0.9, 1.1))
    for changed, passed in ((7, True), (8, False)):
        words = base.split()
        other = " ".join(["other"] * changed + words[changed:])
        assert ("distance" not in failed(base, other, "object")) == passed  # 0.35 of 20 words is 7
    assert "distance" not in failed(base, other, "object", max_edit_distance=0.4)


def test_short_answers_may_change_whole_but_stay_short():
    assert failed("Red", "Green", "attribute") == []
    assert failed("A cat", "Two dogs on it", "object") == ["length"]
    assert failed("A cat", "A big dog", "object") == []
    assert "length" in failed("2", "There are three dogs", "count")


@pytest.mark.parametrize(
    ("rejected", "what"),
    [
        (LONG.replace("red", "blue")[:-1], "ends full stop"),
        (LONG.replace("red", "blue")[:-1] + "!", "ends full stop, ends exclamation mark"),
        (LONG.replace("red", "blue").replace("The", "the"), "starts upper"),
        (LONG.replace("red shirt is", "blue shirt might be"), "hedges"),
        (LONG.replace("The man", "I see the man"), "first person"),
        (LONG.replace("red", "**blue**"), "markdown marks"),
        (LONG.replace("bench ", "bench\n"), "sentences, line breaks"),
    ],
)
def test_style_must_stay(rejected, what):
    found = verdicts(LONG, rejected, "attribute")
    assert found["style"].note == f"style changed: {what}"
    assert "style" not in verdicts(LONG, rejected, "attribute", style=False)


def test_number_of_edits():
    assert failed(LONG, LONG.replace("red", "blue").replace("bench", "wall").replace("park", "zoo"), "attribute") == [
        "edits"
    ]
    caption = LONG.replace("red", "blue")
    assert failed(LONG, caption, "caption") == ["edits"]
    assert failed(LONG, caption.replace("bench", "wall"), "caption") == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [
        ("It is grey.", "It is silver.", False), ("It is grey.", "It is green.", True), ("It is tan.", "It is beige.", False),
        ("It is mauve.", "It is green.", True),  # outside the set: others judge
        ("It is red.", "It is crimson.", True),  # known limit: a synonym that no list has
    ],
)  # fmt: skip
def test_other_value(chosen, rejected, passed):
    assert verdicts(chosen, rejected, "attribute")["other_value"].passed == passed


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [
        ("The left one is larger.", "The left one is smaller.", True), ("It is larger.", "It is bigger.", False),
        ("It is larger.", "It is taller.", False), ("The cup is larger.", "The bowl is larger.", True),
    ],
)  # fmt: skip
def test_opposite(chosen, rejected, passed):
    assert verdicts(chosen, rejected, "comparison")["opposite"].passed == passed


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [
        ("There are two dogs.", "There are three dogs.", True), ("There are two dogs.", "There are 2 dogs.", False),
        ("There are twenty-one dogs.", "There are 22 dogs.", True), ("1,200 people", "1,300 people", True),
        ("There are two dogs.", "There are many dogs.", False), ("There are at least two dogs.", "There are at least three dogs.", False),
        ("About 20 cars.", "About 30 cars.", False), ("There are two dogs.", "There is at least one dog.", False),
        ("There are no dogs.", "There are two dogs.", True), ("A single cup.", "Two cups.", True),
    ],
)  # fmt: skip
def test_other_number(chosen, rejected, passed):
    assert verdicts(chosen, rejected, "count")["other_number"].passed == passed


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [
        ("It is a dog.", "It is a cat.", True), ("It is a dog.", "It is an animal.", False), ("It is a dog.", "It is a puppy.", False),
        ("A sofa.", "A couch.", False), ("A sofa.", "An armchair.", True), ("Two dogs.", "Two dog.", False),
        ("A man.", "A woman.", True), ("A man.", "A person.", False), ("A gizmo.", "A gizmos.", False),
    ],
)  # fmt: skip
def test_not_related(chosen, rejected, passed):
    assert verdicts(chosen, rejected, "object")["not_related"].passed == passed


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [("It says STOP.", "It says GO.", True), ("It says stop-sign.", "It says STOP SIGN.", False), ("3:45", "9:20", True), ("3:45", "345", False)],
)  # fmt: skip
def test_other_text(chosen, rejected, passed):
    assert ("other_text" not in failed(chosen, rejected, "text")) == passed


@pytest.mark.parametrize(
    ("chosen", "rejected", "passed"),
    [("Yes.", "No.", True), ("No, he is not.", "Yes, he is.", True), ("Yes.", "Maybe.", False), ("Yes, a dog.", "Yes, a cat.", False)],
)  # fmt: skip
def test_polarity(chosen, rejected, passed):
    assert verdicts(chosen, rejected, "existence")["polarity"].passed == passed


def test_a_rewrite_changes_argument_and_conclusion():
    chosen = "The street is wet and people carry umbrellas. It has probably rained a short while ago here."
    both = "The street is dry and people carry sunshades. It has probably been hot a short while ago here."
    assert failed(chosen, both, "reasoning") == []
    assert failed(chosen, chosen.replace("wet", "dry"), "reasoning") == ["conclusion"]
    assert failed(chosen, chosen.replace("rained", "snowed"), "reasoning") == ["conclusion"]  # from the same argument


def test_notes_can_be_acted_on():
    notes = [v.note for v in verdicts("There are two dogs.", "There are 2 dogs.", "count").values() if not v.passed]
    assert notes == ["'2' is the same number as 'two'"]


def test_a_span_that_was_widened_by_its_article_counts_once():
    chosen = "It is an orange hat."
    rejected, edits = apply(chosen, [Operation("orange", "red")])
    assert edits == [Edit(6, 15, "a red")]
    names = [
        v.name
        for v in check_pair(chosen, rejected, edits, CATEGORIES["attribute"], CheckConfig(), NOUNS)
        if not v.passed
    ]
    assert names == ["other_value"]  # orange and red are too near


# WordNet's files: offsets in data.noun are bytes from its start, as wndb(5WN) says

LICENCE = "  1 This software and database is being provided to you\n"


def synset(lemmas: list[str], pointers: list[str], gloss: str) -> str:
    words = " ".join(f"{lemma} 0" for lemma in lemmas)
    pointed = "".join(f" {pointer}" for pointer in pointers)
    return f"05 n {len(lemmas):02x} {words} {len(pointers):03d}{pointed} | {gloss}  \n"


def write_wordnet(folder):
    """animal <- dog, domestic_dog <- poodle; cat is nobody's kind; dog has a third sense that is cat's."""
    offsets, text = {}, LICENCE
    for name, lemmas, above in (("animal", ["animal"], None), ("dog", ["dog", "domestic_dog"], "animal"),
                                ("poodle", ["poodle"], "dog"), ("man", ["man", "dog"], None), ("cat", ["cat"], None)):  # fmt: skip
        offsets[name] = len(text.encode())
        pointers = [f"@ {offsets[above]:08d} n 0000"] if above else ["~ 00000000 n 0000"]
        text += f"{offsets[name]:08d} " + synset(lemmas, pointers, f"what a {name} is; café")
    (folder / "data.noun").write_text(text, encoding="utf-8")
    index = LICENCE
    senses = {"animal": ["animal"], "cat": ["cat"], "dog": ["dog", "man", "cat"], "domestic_dog": ["dog"], "man": ["man"],
              "poodle": ["poodle"]}  # fmt: skip
    for lemma, names in senses.items():
        places = " ".join(f"{offsets[name]:08d}" for name in names)
        index += f"{lemma} n {len(names)} 2 @ ~ {len(names)} 1 {places}  \n"
    (folder / "index.noun").write_text(index, encoding="utf-8")


@pytest.mark.parametrize(
    ("one", "other", "reason"),
    [
        ("dog", "domestic dog", "synonyms in WordNet"), ("dog", "animal", "one a kind of the other in WordNet"),
        ("animal", "poodle", "one a kind of the other in WordNet"), ("poodle", "dog", "one a kind of the other in WordNet"),
        ("cat", "poodle", None), ("dog", "cat", None),  # only the two commonest senses count
        ("dog", "man", "synonyms in WordNet"), ("gizmo", "dog", None), ("poodle", "man", None),
    ],
)  # fmt: skip
def test_wordnet(tmp_path, one, other, reason):
    write_wordnet(tmp_path)
    assert WordNet(tmp_path).related(one, other) == reason


def test_wordnet_knows_more_than_the_list(tmp_path):
    write_wordnet(tmp_path)
    nouns = Nouns(tmp_path)
    assert nouns.related("a thing", "dog") is None
    assert NOUNS.related("domestic dogs", "dog") is None
    assert nouns.related("domestic dogs", "dog") == "synonyms in WordNet"


def test_no_wordnet_there(tmp_path):
    with pytest.raises(UserError, match=r"checks\.wordnet: .*: no WordNet there"):
        Nouns(tmp_path)


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("The zebra is black and white.", "The zebra is white and white.", False),
        ("The surfboard is not white but yellow.", "The surfboard is not yellow but yellow.", False),
        ("Red, white and pink flowers.", "White, white and pink flowers.", False),
        ("It is a very, very long train.", "It is a very, very short train.", True),
        ("Two dogs and three cats.", "Two dogs and two cats.", True),
    ],
)
def test_a_result_that_repeats_itself_is_refused(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "attribute")["repeats"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("A thin fog lies over the fields.", "A fog lies over the fields.", False),  # still true
        ("A dog barks.", "A brown dog barks.", False),  # may be true
        ("A thin fog lies over the fields.", "A thick fog lies over the fields.", True),
    ],
)
def test_words_only_added_or_taken_away_make_nothing_false(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "scene")["different"].passed is passes
