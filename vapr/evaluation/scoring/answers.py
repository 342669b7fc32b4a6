"""Read what an answer says, yes or no, under a named policy; letters of options are :mod:`.letters`' business.

``strict`` reads an answer that begins with what it says; ``last-answer`` drops reasoning and reads the answer after it,
wherever that stands. Neither guesses: an answer that says nothing of the kind is None, *unparsed*. What a benchmark's
authors do is the policy ``official``, in the benchmark's own file.
"""

import re
from functools import lru_cache
from typing import Literal

from vapr.text import polarity, sentences

Policy = Literal["official", "strict", "last-answer"]
POLICIES: tuple[Policy, ...] = ("official", "strict", "last-answer")

_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|reason|analysis|reflection|scratchpad)"
_TAG = re.compile(
    rf"(?P<open><\s*{_NAMES}\s*>|◁think▷|\[THINK\]|<\|begin_of_thought\|>)"
    rf"|<\s*/\s*{_NAMES}\s*>|◁/think▷|\[/THINK\]|<\|end_of_thought\|>",
    re.IGNORECASE,
)
_TAGGED = re.compile(r"<(answer|conclusion)>(?P<said>.*?)(?:</\1>|$)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"<\|begin_of_box\|>(?P<said>.*?)(?:<\|end_of_box\|>|$)", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{(?:\\(?:text|textbf|mathrm|mathbf)\{)?(?P<said>[^{}]*)\}")
_MARKED = re.compile(
    r"\b(?:answer|conclusion)\b[\s*_\"']*(?:to (?:the|this|your) question\s*(?:[\"“][^\"”]*[\"”])?)?"
    r"[\s*_\"']*"
    r"(?:(?:is|would be|should be)\b|[:：=])[\s:：]*",
    re.IGNORECASE,
)
SO = re.compile(r"(?:(?:so|thus|therefore|hence|in conclusion|overall|finally|in short)[\s,:]+)+", re.IGNORECASE)
# Tokens that a tokenizer left behind an answer, and characters that nobody sees.
_LEFT_OVER = re.compile(
    r"(?:\s*(?:<\|[^|<>\s]+\|>|</?(?:s|eos|pad|end_of_turn|br|p)\s*/?>|[\u200b-\u200d\u2060\ufeff]))+\s*$",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\W*(?:yes\W{1,3}(?:(?:and|or)\W+)?no|no\W{1,3}(?:(?:and|or)\W+)?yes)\b", re.IGNORECASE)
_ENDING = re.compile(
    r"(?:[,;:—–-]\s*(?:so\s+)?|\banswer (?:is|would be|should be)\s+|\bI(?:['’]d| would) say\s+|\bI think\s+)"
    r"[\"'“‘*_(]*(yes|no)[\"'”’*_)]*[.!]*\s*$",
    re.IGNORECASE,
)
_DENIAL = re.compile(
    r"\W*no\b|.*\b(?:there(?:['’]s| is| are| was| were) no(?:t|ne|thing)?"
    r"|(?:is|are|was|were|do|does) ?n(?:o|['’])t|has no|have no)\b",
    re.IGNORECASE | re.DOTALL,
)
_ANSWER_IS = re.compile(
    r"[\s*_#>\"']*(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?answer[*_]*(?:\s+is\b\s*[:：]?|\s*[:：])",
    re.IGNORECASE,
)
# "No" without a mark behind it answers only where a whole sentence follows, as in "No it is red".
_DENIES = re.compile(
    r"[\s\"'“‘(*_`#>-]*no[ \t]+(?!(?:there|it|they|he|she|i|we|you|this|that|these|those)(?:['’]\w|\s+(?:is|are|was|"
    r"were|do|does|did|can|cannot|could|has|have|am|don|isn|aren|doesn|see|only|seems?|appears?|looks?)\b))\w",
    re.IGNORECASE,
)
# The other word, alone between marks: "Yes... wait, no", "No. Yes."
_TAKEN_BACK = {
    said: re.compile(
        rf"[.,;:!?…—–-]\s*(?:(?:wait|actually|sorry|or)\W+)*[*_\"']*{other}\b(?=\W*$|[,.!…])", re.IGNORECASE
    )
    for said, other in (("yes", "no"), ("no", "yes"))
}


def after_reasoning(text: str) -> str:
    """Return what a reasoning model says outside its reasoning, behind it if it says anything there.

    Blocks such as ``<think>...</think>`` are dropped. Where only the end of one stands, because the chat template
    opened it, all before it is dropped; where one never ends, all after its beginning, so that the answer of a model
    that never got out of it is empty.
    """
    said, start, inside = [], 0, False
    for tag in _TAG.finditer(text):
        if tag["open"]:
            if not inside:
                said.append(text[start : tag.start()])
            inside = True
        else:
            if not inside:  # the end of a block that began before the text, or of one around the last
                said.clear()
            start, inside = tag.end(), False
    if not inside:
        said.append(text[start:])
    return next((part.strip() for part in reversed(said) if part.strip()), "")


def without_left_over(text: str) -> str:
    """Return a text without special tokens ("</s>", "<|im_end|>") and unseen characters at its end."""
    return _LEFT_OVER.sub("", text) if not text.isascii() or ">" in text else text


def final_answers(text: str) -> list[str]:
    """Return the places of a text where its final answer may stand, the most telling first.

    These are an ``<answer>`` block, a ``\\boxed{}``, what follows the last "answer is" or "Answer:", and the sentences
    from the last to the first.
    """
    text = after_reasoning(text)
    places = [found[-1]["said"] for pattern in (_TAGGED, _BOX, _BOXED) if (found := list(pattern.finditer(text)))]
    if marks := list(_MARKED.finditer(text)):
        places.append(text[marks[-1].end() :])
    return [*places, *reversed(sentences(text))]


@lru_cache(maxsize=2048)  # most answers to such questions are the same few words
def yes_or_no(text: str, policy: Policy) -> str | None:
    """Read ``"yes"`` or ``"no"``; None if the answer says neither.

    An answer says so that begins with the word ("Yes", "No.", "Yes, there is a dog") and does not take it back ("Yes...
    wait, no"). Under ``last-answer`` the final answer or the last sentence that says so counts, also where it ends with
    the word ("so the answer is no").
    """
    text = without_left_over(text)
    if policy != "last-answer":
        said = _polarity(text)
        if said is None or _TAKEN_BACK[said].search(text):
            return None
        tag = _TAG.search(text)
        return None if tag and not tag["open"] else said  # what ends as reasoning began as reasoning
    for place in final_answers(text):
        place = _without(SO, place.strip())
        if ending := _ENDING.search(place):
            return ending[1].lower()
        if (found := _polarity(place)) is not None:
            return found
    return None


def states(text: str, said: str) -> bool:
    """Return whether an answer says yes or no in words, where an official rule reads it as ``said``.

    Rules that look for a word anywhere read much that says nothing of the kind. A "yes" is stated by the word, a "no"
    also by a denial such as "There is no dog" or "It isn't red" in the first sentence.
    """
    if said == "no" and _DENIAL.match(text.split(".")[0]):
        return True
    return yes_or_no(text, "last-answer") == said


def _without(beginning: re.Pattern[str], text: str) -> str:
    found = beginning.match(text)
    return text[found.end() :] if found else text


def _polarity(text: str) -> str | None:
    text = _without(_ANSWER_IS, text).lstrip()
    if text[:1] in ("[", "{", "$"):
        text = re.sub(r"[\[\]{}$]", " ", text)
    return None if _BOTH.match(text) or _DENIES.match(text) else polarity(text)
