"""How answers are read, by hand: text, what strict says, what last-answer says."""

import pytest

from vapr.evaluation.scoring.answers import after_reasoning, states, yes_or_no

CASES = [
    # text, strict, last-answer
    ("Yes", "yes", "yes"),
    ("no.", "no", "no"),
    ("NO!", "no", "no"),
    ("Yes, but it is small.", "yes", "yes"),
    ("No, there is none.", "no", "no"),
    ("No it is red", "no", "no"),
    ("**No**", "no", "no"),
    ("# Yes", "yes", "yes"),
    ("> No", "no", "no"),
    ("- Yes", "yes", "yes"),
    ("[Yes]", "yes", "yes"),
    ("{No}", "no", "no"),
    ("`yes`", "yes", "yes"),
    ("`No`", "no", "no"),
    ("No]", "no", "no"),
    ("The answer is: yes", "yes", "yes"),
    # what a tokenizer left
    *(
        (f"{said}{left}", said.lower(), said.lower())
        for said in ("Yes", "No")
        for left in ("</s>", "<|im_end|>", " <|eot_id|>\n", "<end_of_turn>", "<br/>", "\u200b", "\ufeff")
    ),
    ("There is a dog. Yes</s></s>", None, "yes"),
    ("**Answer:** No", "no", "no"),
    ("Final answer: no", "no", "no"),
    ("No\n\nExplanation: there is a cat.", "no", "no"),
    ("Yes, there is a dog, no cat.", "yes", "yes"),
    ("Yes - there is no doubt.", "yes", "yes"),
    ("Yes. " + "It stands there. " * 200, "yes", "yes"),
    # said at the end
    ("The picture shows a park. Yes, there is a dog. It is brown.", None, "yes"),
    ("There are two cats, so no.", None, "no"),
    ("So the answer is no", None, "no"),
    ('The answer to the question "Is there a dog in it?" is no.', None, "no"),
    ("I'd say no.", None, "no"),
    ("No doubt, yes.", None, "yes"),
    ("Is there a dog? No.", None, "no"),
    ('{"answer": "no"}', None, "no"),
    ("$\\boxed{No}$", None, "no"),
    ("\\boxed{\\text{yes}}", None, "yes"),
    ("<|begin_of_box|>Yes<|end_of_box|>", None, "yes"),
    ("The answer is yes. Actually, the answer is no.", "yes", "no"),
    # reasoning
    ("<think>Yes</think>No", None, "no"),
    ("<THINK>No. No.</THINK>\nYes.", None, "yes"),
    ("<thinking>hm</thinking>\n\n**No**", None, "no"),
    ("◁think▷yes◁/think▷ no", None, "no"),
    ("[THINK]yes[/THINK]no", None, "no"),
    ("< think >no</ think >Yes", None, "yes"),
    ("Yes, it looks so... </think> No", None, "no"),
    ("<think>a</think>Yes<think>b</think> No", None, "no"),
    ("<think>a<think>b</think>No</think>Yes", None, "yes"),
    ("Yes <think>was that right?</think>", "yes", "yes"),
    ("<think>The answer is no", None, None),
    ("<think>yes</think>", None, None),
    ("<think>x</think><answer>No</answer>", None, "no"),
    ("<ANSWER>Yes", None, "yes"),
    ("<reasoning>no</reasoning><conclusion> Yes </conclusion>", None, "yes"),
    # taken back, or both
    ("yes... no wait, no", None, "no"),
    ("Yes. Wait, no.", None, "no"),
    ("No, yes", None, "yes"),
    ("Yes\nNo", None, "no"),
    ("Yes, no, maybe", None, None),
    ("Yes and no.", None, None),
    ("yes/no", None, None),
    ("Please answer yes or no.", None, None),
    ("Neither yes nor no", None, None),
    ("The answer is not yes.", None, None),
    ("The answer is either yes or no.", None, None),
    # nothing of the kind
    ("", None, None),
    (" \n ", None, None),
    ("I'm not sure.", None, None),
    ("I cannot determine that.", None, None),
    ("Neither", None, None),
    ("It is hard to say no", None, None),
    ("No one is there", None, None),
    ("No dogs are visible", None, None),
    ("No. 5", None, None),
    ("No the red seen table.", None, None),
    ("No it can another", "no", "no"),
    ("No a are seen. No this and some.", None, None),
    ("No idea", None, None),
    ("Not really", None, None),
    ("True", None, None),
    ("1", None, None),
    ("yesterday", None, None),
    ("Oui", None, None),
    ("Ja.", None, None),
    ("Sí, hay un perro.", None, None),
    ("是的", None, None),
    ("不是。", None, None),
]


@pytest.mark.parametrize(("text", "strict", "last"), CASES)
def test_yes_or_no(text, strict, last):
    assert (yes_or_no(text, "strict"), yes_or_no(text, "last-answer")) == (strict, last)


def test_after_reasoning():
    assert after_reasoning("a <think>b</think> c") == "c"
    assert after_reasoning("a <think>b</think> ") == "a"
    assert after_reasoning("b</think> c <think>d") == "c"
    assert after_reasoning("no reasoning") == "no reasoning"


@pytest.mark.parametrize(
    "text",
    ["<think>" * 30_000, "<answer>" * 30_000, ", " * 50_000, "yes no " * 30_000, "No " * 50_000, "so, " * 50_000],
)
def test_endless_repetition_is_read_in_one_pass(text):
    assert yes_or_no(text, "strict") is None  # minutes if a pattern backtracked
    yes_or_no(text, "last-answer")


def test_what_states_a_no():
    assert states("There is no dog in the image.", "no") and states("It isn't red", "no") and states("No dogs.", "no")
    assert not states("The dog stands not far away.", "no") and not states("I know nothing, not that.", "no")
    assert states("Yes", "yes") and not states("There is a dog", "yes")
