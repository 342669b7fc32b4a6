"""Words, sentences, style features and yes or no, counted by hand."""

import subprocess
import sys

import pytest

from vapr.text import STYLE_KEYS, edit_distance, num_words, polarity, sentences, style_vector, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red bus.", ["A", "red", "bus", "."]),
        ("It's well-lit, isn’t it?", ["It's", "well-lit", ",", "isn’t", "it", "?"]),
        ("3.5 km, or 1,200 m...", ["3.5", "km", ",", "or", "1,200", "m", ".", ".", "."]),
        ("two  - three_four 'five'", ["two", "-", "three", "_", "four", "'", "five", "'"]),
        ("我喜欢 dogs。", ["我", "喜", "欢", "dogs", "。"]),
        ("cafe\u0301 café", ["cafe\u0301", "café"]),
        ("हिन्दी में ไม่ใช่ مُحَمَّد", ["हिन्दी", "में", "ไม่ใช่", "مُحَمَّد"]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_marks_are_no_words():
    assert num_words("It's 3.5 km, at most!") == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog. It sleeps!", ["A dog.", "It sleeps!"]),
        ("Mr. Smith, e.g. at 3.5 km, waits.", ["Mr. Smith, e.g. at 3.5 km, waits."]),
        ("He came at 5 p.m. and left. She came at 5 p.m. Then she left.", ["He came at 5 p.m. and left.", "She came at 5 p.m.", "Then she left."]),
        ("No. It is bus No. 5.", ["No.", "It is bus No. 5."]),
        ("Well... maybe. Well... Maybe.", ["Well... maybe.", "Well...", "Maybe."]),
        ("He said \"Stop.\" Then he left.", ["He said \"Stop.\"", "Then he left."]),
        ("1. A dog\n2. A cat\n\n", ["1. A dog", "2. A cat"]),
        ("J. Smith and I. He left.", ["J. Smith and I.", "He left."]),
        ("我喜欢狗。它很大！", ["我喜欢狗。", "它很大！"]),
        ("Really?! Yes", ["Really?!", "Yes"]),
        ("...", []),
    ],
)  # fmt: skip
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_a_style_vector_by_hand():
    text = "I think it's a USA flag, maybe.\n- Two **red** cars (2 or 3)\n- Is it 4.5 m?"
    vector = style_vector(text)
    assert list(vector) == list(STYLE_KEYS)
    assert vector == {
        "sentences": 3,
        "words": 17,  # I think it's a USA flag maybe / Two red cars 2 or 3 / Is it 4.5 m
        "commas": 1,
        "other_punctuation": 10,  # . - * * * * ( ) - ?
        "ends_full_stop": 0,
        "ends_question_mark": 1,
        "ends_exclamation_mark": 0,
        "ends_other_mark": 0,
        "starts_upper": 1,
        "upper_words": 1,
        "numbers": 3,
        "list_lines": 2,
        "markdown_marks": 2,
        "hedges": 1,
        "first_person": 1,
        "contractions": 1,
        "line_breaks": 2,
        "mean_word_length": pytest.approx(45 / 17),
        "words_per_sentence": pytest.approx(17 / 3),
        "type_token_ratio": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("A dog.", "ends_full_stop"),
        ('He says "A dog."', "ends_full_stop"),
        ("**A dog.**", "ends_full_stop"),
        ("A dog?", "ends_question_mark"),
        ("A dog!", "ends_exclamation_mark"),
        ("A dog:", "ends_other_mark"),
        ("A dog", None),
        ("", None),
    ],
)
def test_how_a_text_ends(text, kind):
    vector = style_vector(text)
    assert [key for key in STYLE_KEYS if key.startswith("ends_") and vector[key]] == ([kind] if kind else [])


def test_may_the_month_is_no_hedge():
    assert style_vector("It may rain in May.")["hedges"] == 1


def test_an_empty_text_is_all_zeros():
    assert set(style_vector(" \n").values()) <= {0.0, 1.0} and style_vector(" \n")["line_breaks"] == 1
    assert set(style_vector("").values()) == {0.0}


def test_edit_distance():
    assert edit_distance(words("A red bus."), words("A blue bus.")) == 0.25
    assert edit_distance(words("A bus."), words("A big red bus.")) == 0.4  # 2 of the longer one's 5
    assert edit_distance([], []) == 0.0
    assert edit_distance(["a"], ["b"]) == 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "yes") for text in ("Yes", "yes.", "Yes, there is", "**Yes**", ' "Yes', "Yeah!", "Answer: Yes", "YES it is")),
        *((text, "no") for text in ("No", "no.", "No, there is none", "**No**", "Nope", "No it is not", "No - a cat", "`No`", "No]", "No — a cat", "No\nIt is", "- No.", "No. It is red.", "No (it is red).", "No… it is", "No，有", "No！")),
        *((text, None) for text in ("Nothing is there", "No one is there", "No dogs are there", "No. 5 is the bus", "No-one", "Noah", "Yesterday", "yes-man", "Not really", "There is no dog", "I say yes", "", "None")),
    ],
)  # fmt: skip
def test_polarity(text, expected):
    assert polarity(text) == expected


def test_no_heavy_import():
    code = "import sys; import vapr.text; print([name for name in ('numpy', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
