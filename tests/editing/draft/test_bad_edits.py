"""Bad edits that language models return, each refused, beside good ones that look like them."""

import pytest

from vapr.editing.config import CheckConfig
from vapr.editing.draft.checks import Verdict, check_pair
from vapr.editing.rules.categories import load_categories
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.operations import changed_spans

CATEGORIES = load_categories()
NOUNS = Nouns()


def verdicts(chosen: str, rejected: str, category: str) -> dict[str, Verdict]:
    edits = changed_spans(chosen, rejected)
    return {one.name: one for one in check_pair(chosen, rejected, edits, CATEGORIES[category], CheckConfig(), NOUNS)}


def failed(chosen: str, rejected: str, category: str) -> list[str]:
    return [name for name, verdict in verdicts(chosen, rejected, category).items() if not verdict.passed]


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("It is a golden retriever.", "It is not a golden retriever."),
        ("It's not a cat.", "It's a cat."),
        ("The door is open.", "The door isn't open."),
        ("He can see it.", "He can't see it."),
        ("The dog eats.", "The dog does not eat."),
        ("There are no people.", "There are people."),
        ("There are some people.", "There are no people."),
        ("A man with a hat.", "A man without a hat."),
        ("Nobody is there.", "Somebody is there."),
        ("He is never late.", "He is late."),
    ],
)
@pytest.mark.parametrize("category", ["object", "comparison", "scene", "count", "text", "reasoning", "caption"])
def test_a_negation_put_in_or_taken_out_names_nothing_else(chosen, rejected, category):
    verdict = verdicts(chosen, rejected, category)["different"]
    assert verdict.note == "only a negation was put in or taken out; name another thing instead"
    assert verdicts(chosen, rejected, "existence")["different"].passed


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("There are no dogs.", "There are two dogs."),
        ("The cat is not on the sofa.", "The cat is not on the bed."),
        ("It is not a cat but a dog.", "It is not a cat but a fox."),
        ("A dog on the left.", "Some dog on the right."),
    ],
)
def test_more_than_a_negation_changed(chosen, rejected):
    assert verdicts(chosen, rejected, "scene")["different"].passed


@pytest.mark.parametrize(
    "rejected",
    [
        "A red umbrеllа.",  # Cyrillic е and а
        "A rеd umbrella.",
        "A ｒｅｄ umbrella.",  # full width
        "A red umb\u200brella.",
        "A red umbrella\x00.",
        "A red\u00a0umbrella.",
        "A réd umbrella.",
        "А red umbrella.",  # the whole word is Cyrillic
        "A red\ufe0f umbrella.",
    ],
)
def test_texts_that_look_the_same_are_not_different(rejected):
    assert "different" in failed("A red umbrella.", rejected, "text")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("Ｃafé", "Cafe"), ("ﬁve", "five"), ("Straße", "STRASSE"), ("Ω", "Ω"), ("2", "²")],
)
def test_other_ways_to_write_it_are_not_different(chosen, rejected):
    assert "different" in failed(chosen, rejected, "text")


@pytest.mark.parametrize(
    ("chosen", "rejected", "note"),
    [
        ("A red hat.", "A blue\u200b hat.", "U+200B does not belong into the answer"),
        ("A red hat.", "A blue\x1b[1m hat.", "U+001B does not belong into the answer"),
        ("A red hat.", "A \u202eblue hat.", "U+202E does not belong into the answer"),
        ("A red hat.", "A blue\u00a0hat.", "U+00A0 does not belong into the answer"),
        ("A red hat.", "A blue\that.", "U+0009 does not belong into the answer"),
        ("A red\that.", "A blue\that.", ""),
        ("A red\u200b hat.", "A blue\u200b hat.", ""),
        ("A red hat.", "A bluе hat.", "'bluе' mixes Latin and Cyrillic letters"),
        ("A red hat.", "A βlue hat.", "'βlue' mixes Latin and Greek letters"),
        ("Красная шапка, hat.", "Синяя шапка, hat.", ""),
        ("左に犬がいます。", "左にネコがいます。", ""),
        ("It says STOP.", "It says СТОП.", ""),
        ("A red hat.", "A blue café 👍🏽.", ""),
    ],
)
def test_letters_and_characters_that_do_not_belong(chosen, rejected, note):
    assert verdicts(chosen, rejected, "attribute")["characters"].note == note


@pytest.mark.parametrize(
    ("one", "general"),
    [
        ("umbrella", "thing"), ("umbrella", "object"), ("umbrella", "item"), ("cup", "something"), ("gizmo", "thing"), ("golden retriever", "canine"),
        ("kitten", "feline"), ("lion", "feline"), ("wolf", "canine"), ("dog", "pet"), ("cow", "mammal"), ("pizza", "food"), ("pizza", "dish"),
        ("car", "vehicle"), ("car", "means of transport"), ("toaster", "device"), ("phone", "gadget"), ("laptop", "device"), ("man", "somebody"),
        ("apple", "snack"), ("jacket", "outfit"), ("hammer", "utensil"), ("spoon", "utensil"),
    ],
)  # fmt: skip
def test_more_general_words_may_be_true(one, general):
    assert "not_related" in failed(f"It is the {one}.", f"It is the {general}.", "object")


def test_a_general_word_is_not_related_to_what_is_beside_it():
    for one, other in (
        ("dog", "feline"),
        ("cat", "canine"),
        ("wolf", "dog"),
        ("lion", "cat"),
        ("phone", "toaster"),
        ("fork", "hammer"),
    ):
        assert failed(f"It is the {one}.", f"It is the {other}.", "object") == []


@pytest.mark.parametrize(
    ("chosen", "rejected", "note"),
    [
        ("These are oranges, not apples.", "These are apples, not apples.", "the result both says and denies 'apples'"),
        ("These are oranges, not apples.", "These are pears, not apples.", ""),
        ("These are oranges, not apples.", "These are apples, not oranges.", ""),
        ("He rides a horse rather than a bike.", "He rides a bike rather than a bike.", "the result both says and denies 'bike'"),
        ("He holds a fork instead of a spoon.", "He holds a spoon instead of a spoon.", "the result both says and denies 'spoon'"),
        ("The red car, not the blue one.", "The blue car, not the blue one.", "the result both says and denies 'blue'"),
        ("It is an orange. It is not a lemon.", "It is a lemon. It is not a lemon.", ""),  # known limit: one sentence at a time
        ("The dog is not on the sofa.", "The dog is not on the chair.", ""),
        ("The car on the road, not the car in the yard.", "The bus on the road, not the car in the yard.", ""),
    ],
)  # fmt: skip
def test_what_is_denied_is_not_said_as_well(chosen, rejected, note):
    assert verdicts(chosen, rejected, "object")["repeats"].note == note


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ('The sign says "STOP" in white letters.', 'The sign says "SLOW" in white letters.', True),
        ('The sign says "STOP" in white letters.', 'The sign says "STOP" in black letters.', False),
        ('The sign says "STOP" in white letters.', 'The wall says "STOP" in white letters.', False),
        ("The sign says “STOP” on top.", "The sign says “SLOW” on top.", True),
        ("The sign says “STOP” on top.", "The sign says “STOP” on wheels.", False),
        ("The sign says 'Joe's bar' on top.", "The sign says 'Tom's bar' on top.", True),
        ("The sign says 'Joe's bar' on top.", "The sign says 'Joe's bar' on wheels.", False),
        ("The girl's shirt says Nike.", "The girl's shirt says Puma.", True),
        ('It says "no parking" and "exit".', 'It says "no parking" and "enter".', True),
        ('It says "no parking" and "exit".', 'It says "no parking" or "exit".', False),
        (
            "The label says 'Crème brûlée', the price is 4,50 €.",
            "The label says 'Crème brûlée', the price is 6,20 €.",
            True,
        ),
        ("The board is 5' 3\" tall and says Nike.", "The board is 5' 3\" tall and says Puma.", True),
    ],
)
def test_where_a_text_is_quoted_the_quotation_changes(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "text")["other_text"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("The cup is taller than the banana.", "The cup is taller than the apple.", False),
        ("The cup is taller than the banana.", "The bowl is taller than the banana.", False),
        ("The cup is taller than the banana.", "The cup is shorter than the banana.", True),
        ("The cup is taller than the banana.", "The banana is taller than the cup.", True),
        ("The cup is taller than the banana.", "The banana is shorter than the cup.", False),  # true again
        ("The cup is heavier than the banana.", "The cup is lighter than the banana.", True),
        ("The cup is more colourful than the bowl.", "The cup is less colourful than the bowl.", True),
        ("The cup is taller than the banana. It is red.", "The cup is shorter than the banana. It is blue.", True),
        ("The dog is larger than the cat.", "The cat is larger than the cat.", False),
        ("Dog", "Cat", True),
        ("The right box is the same size as the left box.", "The left box is the same size as the left box.", False),
        ("Angle A is equal to angle B.", "Angle B is equal to angle B.", False),
        ("The right box is the same size as the left box.", "The right box is smaller than the left box.", True),
        ("The left box is larger. It is left.", "The right box is larger. It is left.", True),
    ],
)
def test_a_comparison_is_turned_round(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "comparison")["opposite"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "category", "check"),
    [
        ("It is a dog.", "This is the dog.", "object", "different"),
        ("It is a dog.", "It was a dog.", "object", "different"),
        ("The man is running.", "The man runs.", "action", "different"),
        ("It is made of wood.", "It is wooden.", "attribute", "different"),
        ("It is an umbrella.", "It is something else.", "object", "different"),
        ("The sign says STOP.", "The sign says something different.", "text", "different"),
        ("It is a dog.", "It is a cat (wrong).", "object", "characters"),
        ("It is a dog.", "It is a [dog → cat].", "object", "characters"),
        ("A dog and a cat.", "A cat and a cat.", "object", "repeats"),
        ("The lamp is next to the bed.", "The lamp is beside the bed.", "spatial", "other_value"),
        ("This is a kitchen.", "This is a room.", "scene", "other_value"),
        ("He wears a hat.", "He wears a cap.", "object", "not_related"),
        ("There are two dogs.", "There are 1 + 1 dogs.", "count", "other_number"),
        ("Yes, there is a dog.", "No, there is a dog.", "existence", "polarity"),
        ("Yes. There is a dog.", "No. There is a dog.", "existence", "polarity"),
        ("Yes, there is a dog. It barks.", "No, there is a dog. It purrs.", "existence", "polarity"),
        ("The sign says STOP.", "The sign says ST0P.", "text", "other_text"),
        ("The sign says STOP.", "The sign says Slow.", "text", "other_text"),
        ("The clock shows 3:45.", "The clock shows quarter to four.", "text", "other_text"),
        ("A boy in a red hat feeds two ducks.", "A boy in a bright red hat feeds six ducks.", "caption", "edits"),
    ],
)
def test_plainly_bad_edits(chosen, rejected, category, check):
    assert check in failed(chosen, rejected, category)


@pytest.mark.parametrize(
    ("chosen", "rejected", "category"),
    [
        ("The cat is left of the dog.", "The dog is left of the cat.", "object"),
        ("The lamp is next to the bed.", "The lamp is far from the bed.", "spatial"),
        ("This is a kitchen.", "This is a bathroom.", "scene"),
        ("The cat is in the box.", "The cat is on the box.", "spatial"),
        ("He is there.", "She is there.", "referential"),
        ("Yes, there is a dog.", "No, there is no dog.", "existence"),
        ("Yes", "No", "existence"),
        ("Yes. There is a dog.", "No. There is no dog.", "existence"),
        ("There is a dog.", "There are four dogs.", "count"),
        ("A cat on the bed and another under it.", "A cat on the bed and three under it.", "count"),
        ("It says THIS.", "It says THAT.", "text"),
        ("Gate 5", "Gate 7", "text"),
        ("A boy in a red hat feeds two ducks.", "A boy in a blue hat feeds six ducks.", "caption"),
    ],
)
def test_plainly_good_edits(chosen, rejected, category):
    assert failed(chosen, rejected, category) == []


@pytest.mark.parametrize(
    ("question", "chosen", "rejected", "passes"),
    [
        ("What is the woman with the cup carrying?", "She is carrying a book.", "She is carrying a cup.", False),
        ("What is the woman with the cups carrying?", "She is carrying a book.", "She is carrying a cup.", False),
        ("What is the woman with the cup carrying?", "She is carrying a book.", "She is carrying a lamp.", True),
        ("What animal is it, a dog or a cat?", "It is a cat.", "It is a dog.", True),  # the question offers it
        ("Is it a dog?", "It is a cat.", "It is a dog.", True),
        ("Where is the dog?", "The cat is left of the dog.", "The dog is left of the cat.", True),
        ("What is the girl holding?", "A book.", "A girl.", False),
    ],
)
def test_what_the_question_speaks_of_is_no_wrong_answer(question, chosen, rejected, passes):
    edits = changed_spans(chosen, rejected)
    found = check_pair(chosen, rejected, edits, CATEGORIES["object"], CheckConfig(), NOUNS, question=question)
    assert {verdict.name: verdict for verdict in found}["in_question"].passed is passes


FARMER = "What is the farmer with the cup carrying?"


@pytest.mark.parametrize(
    ("question", "chosen", "rejected", "passes"),
    [
        (FARMER, "The farmer is carrying a jacket.", "The bus is carrying a jacket.", False),
        (FARMER, "The farmer is carrying a jacket.", "The farmer is carrying a bus.", True),
        (FARMER, "The farmer is carrying a cup.", "The farmer is carrying a bus.", True),  # nothing else is told
        ("Who is there, the man or the boy?", "The man with a kite.", "The boy with a kite.", True),  # it is offered
        ("What hat has the girl?", "An umbrella hat with flowers.", "A baseball cap with flowers.", True),
        ("Describe the dog.", "A dog on a sofa.", "A cat on a sofa.", False),
    ],
)
def test_what_the_question_is_about_stays(question, chosen, rejected, passes):
    edits = changed_spans(chosen, rejected)
    found = check_pair(chosen, rejected, edits, CATEGORIES["object"], CheckConfig(), NOUNS, question=question)
    assert {verdict.name: verdict for verdict in found}["asked_about"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("The farmer is carrying a cup.", "The farmer is carrying the farmer.", False),
        ("The farmer is carrying a cup.", "The farmer is carrying a dog.", True),
        ("A cat sits there. The cat looks at a book.", "A dog sits there. The cat looks at a book.", False),
        ("A cat sits there. The cat looks at a book.", "A dog sits there. The dog looks at a book.", True),
        ("A cat sits there. It looks at two cups.", "A cup sits there. It looks at two cats.", True),
        ("A red cat and a cup.", "A blue cat and a cup.", True),
    ],
)
def test_no_thing_is_named_twice_that_was_named_once(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "object")["named_twice"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("He carries a bus.", "He carries a car,.", False),
        ("He carries a bus.", "He carries a car..", False),
        ("He carries a bus.", " He carries a car.", False),
        ("He carries a bus.", "He carries a  car.", False),
        ("He carries a bus.", "He carries a the car.", False),
        ("He carries a bus.", "He carries a car .", False),
        ("He carries a bus.", "He carries a car.", True),
        ("A bus of .5 tons ...", "A car of .5 tons ...", True),
        ("A bus of 2 tons", "A bus of .5 tons", True),
    ],
)
def test_marks_that_nobody_writes(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "object")["marks"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        (
            "No, there is no vase. There is a lamp, but no vase.",
            "Yes, there is a vase. There is a lamp, but no vase.",
            False,
        ),
        ("No, there is no vase. There is a lamp.", "Yes, there is a vase. There is a lamp.", True),
        ("No, there is no vase. There is a vase outside.", "Yes, there is a vase. No vase is outside.", True),
        ("No, she has no hat. Instead, she has a bag.", "Yes, she has a hat. Instead, she has a bag.", False),
        ("No, she has no hat. She sits instead of Bob.", "Yes, she has a hat. She sits instead of Bob.", True),
        ("No, there is no vase.", "Yes, there is a vase.", True),
    ],
)
def test_sentences_after_a_turned_verdict_do_not_hold_on_to_it(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "existence")["carried_on"].passed is passes


@pytest.mark.parametrize(
    ("chosen", "rejected", "passes"),
    [
        ("No, there are only two cups.", "Yes, there are two cups.", False),
        ("No, there are only two cups.", "Yes, there are three cups.", True),
        ("Yes, there is only one cup.", "No, there is more than one cup.", True),
    ],
)
def test_what_is_only_so_many_is_so_many(chosen, rejected, passes):
    assert verdicts(chosen, rejected, "existence")["polarity"].passed is passes


@pytest.mark.parametrize(
    ("question", "chosen", "rejected", "passes"),
    [
        ("Who stays dry?", "A girl with green boots.", "A girl with brown boots.", False),
        ("Who stays dry?\nAnswer with a single word.", "A girl with green boots.", "A girl with brown boots.", False),
        ("What does the shirt say?", "hello", "goodbye", True),
        ("What is on the shirt?", 'It is "hello" in red.', 'It is "goodbye" in red.', True),
        ("Who is this?", "She is Kelly.", "She is Sarah.", True),
        ("What is it?", "It is gate 5.", "It is gate 7.", True),
    ],
)
def test_a_text_that_changes_is_one_that_can_be_read(question, chosen, rejected, passes):
    edits = changed_spans(chosen, rejected)
    found = check_pair(chosen, rejected, edits, CATEGORIES["text"], CheckConfig(), NOUNS, question=question)
    assert {verdict.name: verdict for verdict in found}["read"].passed is passes
