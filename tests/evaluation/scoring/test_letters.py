"""Which option an answer names: written in every way that models do, and answers that name none or several."""

import pytest

from vapr.evaluation.scoring.letters import letter

COLOURS = ["red", "blue", "green car", "yellow"]
SIZES = ["half", "quarter", "quarter past"]

NAMED_AT_ONCE = {
    "B": ["B", "b", "(b)", "B.", "B)", "[B]", "{B}", "B. blue", "(B) blue", "B) blue", "B: blue", "B - blue", "B – blue",
          "B.blue", "(B)blue", "b. blue", "b) a sort of blue", "blue", "Blue.", "the blue", "Option B", "option (b)",
          "The answer is B", "The correct answer is option B.", "The answer is **B**", "**Answer:** B", "**Answer: B**",
          "### B", "`B`", "> **B. blue**", "- B", r"\boxed{B}", r"\boxed{\text{B}}", r"$\boxed{\textbf{(B)}}$",
          "答案：B", "答案是B。", "选B", "（B）", "B、blue", "选B,因为它是蓝色", "B因为", "B is correct", "B because it is blue",
          "B</s>", "(B)<|im_end|>", "B. blue<end_of_turn>", "blue</s>", "B\u200b",
          "B, not C", "B, for it is blue", "B, a dog", "B. blue\n\nExplanation: the car is blue.", "B. The colour is blue. A is wrong because it is red."],
    "A": ["A", "A red thing", "A is the correct answer", "A."],
    "C": ["a green car", "A green car", "The correct option is (C).", "The answer is C, not B."],
    "D": ["Answer: (D) yellow since the sun is", "Answer: (D) yellow, (A) is wrong"],
}  # fmt: skip

NAMED_IN_THE_END = {
    "B": [r"We see x. So \boxed{\text{B}}.", "<think>maybe A. The answer is A.</think>B", "<answer>B</answer>",
          "The picture shows a car. It is blue, so it must be B.", "Not (A), so it is (B).", "I would choose B.",
          "Looking closely, option (B) fits best.", "I would choose option B because it is blue.", "It's B.", "A. wrong\nB. right\nC. wrong\nD. wrong\n\nThe best choice is B.",
          "So the time is **blue**. (B)\n\nThe others:\n\n* **(A) red.** This would be the answer if.\n* **(C) green.** "
          "This would be.\n* **(D) yellow** would be."],
    "C": ["<think>A</think>\n\nThe answer is (C).", "The choices are A, B, C and D. The right one is C.",
          "We compare. Therefore, the answer is (C) green car. I hope this helps!"],
}  # fmt: skip

NAMED_NEVER = [
    "", "   ", "?", "E", "AB", "A dog stands", "a dog is here", "I see a dog", "Answering this is hard", "D's house",
    "A-frame", "A/C unit", "C++", "A 5 year old", "B and C", "A or B", "(A), (C)", "A, B and C", "B/C", "B & C",
    "Both A and B", "B: green car", "Option A: red, Option B: blue", "none of the above", "B is incorrect",
    "B is not correct", "The answer is not B", "It's not B.", "It's B or C.", "I see option B and C because", "It is not (B).", "It cannot be B", "<think>it goes on, A",
    "(A) red\n(B) blue\n(C) green car\n(D) yellow", "A. red B. blue C. green car D. yellow",
]  # fmt: skip


@pytest.mark.parametrize(("named", "text"), [(named, text) for named, texts in NAMED_AT_ONCE.items() for text in texts])
def test_answers_that_begin_with_an_option(named, text):
    assert letter(text, COLOURS, "strict") == named
    assert letter(text, COLOURS, "last-answer") == named


@pytest.mark.parametrize(
    ("named", "text"), [(named, text) for named, texts in NAMED_IN_THE_END.items() for text in texts]
)
def test_answers_that_end_with_an_option(named, text):
    assert letter(text, COLOURS, "last-answer") == named
    assert letter(text, COLOURS, "strict") is None


@pytest.mark.parametrize("text", NAMED_NEVER)
def test_answers_that_name_none_or_several(text):
    assert letter(text, COLOURS, "strict") is None
    assert letter(text, COLOURS, "last-answer") is None


@pytest.mark.parametrize(
    ("text", "options", "named"),
    [
        ("2", ["3", "2", "1"], "B"),
        ("2.", ["3", "2", "1"], "B"),
        ("B", ["D", "A", "B"], "B"),  # asked for a letter, a letter it is
        ("C", ["K", "C", "F"], "C"),
        ("E", ["x", "E"], "B"),
        ("quarter", SIZES, "B"),
        ("C. quarter past", SIZES, "C"),
        ("B. quarter past", SIZES, None),  # the letter of one, the text of another
        ("A dogfish", ["dog", "cat"], None),
        ("A dog", ["", "cat"], None),
        ("The answer is: A dog", ["cat", "a dog"], "B"),
        ("A. A dog", ["A dog", "B"], "A"),
        ("Yes", ["Yes", "No"], "A"),
        ("No, it is not", ["Yes", "No"], None),
        ("None of the above", ["x", "None of the above"], "B"),
        ("Both A and B", ["x", "y", "Both A and B"], "C"),
        ("E. coli", ["x", "y"], None),
        ("same", ["same", "same"], None),
    ],
)
def test_options_that_are_letters_numbers_or_alike(text, options, named):
    assert letter(text, options, "strict") == named
    assert letter(text, options, "last-answer") == named


@pytest.mark.parametrize(
    ("text", "named"),
    [("I", "I"), ("I see a dog", None), ("I, for one, see", None), ("X-ray", None), ("(G) red", "G"), ("A dog", None)],
)
def test_options_unknown(text, named):
    assert letter(text, [], "strict") == named


@pytest.mark.parametrize(("text", "named"), [("Z", "Z"), ("3x", "D"), ("27x", None), ("AA", None)])
def test_more_options_than_letters(text, named):
    assert letter(text, [f"{number}x" for number in range(30)], "strict") == named
