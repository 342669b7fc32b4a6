"""Values that other words depend on: an argument, a sum, an earlier turn; and which others the words leave possible.

Where the texts themselves tell that the answer is wrong, nobody has to look at the picture.
"""

import re
from collections.abc import Iterator

from vapr.editing.rules.agreement import SMALL, TENS, number
from vapr.editing.rules.categories import Value
from vapr.editing.rules.nouns import Nouns
from vapr.editing.rules.turns import Turn
from vapr.editing.rules.word_sense import is_name

ARGUMENT = re.compile(
    r"\b(?:because|since|therefore|thus|hence|consequently|due to|considering|given that|although|though|despite"
    r"|so (?:that|the|it|they|he|she|we|you|people)"
    r"|as (?:it|the|they|there|this|he|she|if|though|we|you|people|a result)"
    r"|(?:which|that) (?:means?|makes?|indicates?|suggests?|implies|allows?|shows?|is why|signals?|tells?|helps?)"
    r"|(?:perfect|ideal|suitable|great|good|ready) (?:for|to)|; (?:it|they|this|that)"
    r"|meaning|indicating|suggesting|implying|signal+ing|signifying)\b"
    r"|, (?:\w+ly )?(?:so|allowing|making|causing|giving|letting|forcing|requiring|helping|preventing|showing|revealing"
    r"|ensuring|creating|adding|providing|contrasting|matching)\b",
    re.IGNORECASE,
)
# After the value only: what it makes possible, what it comes from, what it is like.
FITS = re.compile(
    r"\b(?:can|cannot|could|must|should|(?:has|have|needs?) to|able|unable|so|only|enough|too|hardly|barely|easily"
    r"|(?:un)?ripe|like|same|match\w*|blend\w*|tells?|telling|fits?|seats?|accommodat\w+"
    r"|for (?:one|two|three|several|many)|holds? (?:up|one|two|several|many|a (?:few|lot))"
    r"|as (?:\w+ ){1,3}(?:is|are|has|have))\b|\bcan['’]t\b",
    re.IGNORECASE,
)
NEXT_ARGUES = re.compile(
    r"\s*(?:therefore|thus|hence|consequently|so|as a result|for this reason|because of (?:this|that)"
    r"|(?:this|that|it|which)(?: is|['’]s) (?:why|because)"
    r"|(?:this|that|it|which) (?:means|indicates|suggests|implies|allows|shows|makes|signals|signifies|helps))\b",
    re.IGNORECASE,
)
END = re.compile(r"[.!?](?=\s|$)|\n")


def _sentence(text: str, value: Value) -> tuple[int, int]:
    """Where the sentence of a value begins and ends."""
    start = max((mark.end() for mark in END.finditer(text, 0, value.start)), default=0)
    end = END.search(text, value.end)
    return start, end.end() if end else len(text)


def argued(answer: str, value: Value) -> bool:
    """Whether the sentence, or the next one, argues from the value: "red, so the cars wait"."""
    start, end = _sentence(answer, value)
    if ARGUMENT.search(answer[start:end]) or FITS.search(answer[value.end : end]):
        return True
    return NEXT_ARGUES.match(answer, end) is not None


NUMBERS = re.compile(
    rf"(?<![\w$€£#.,-])(?:\d+|{'|'.join([*SMALL[1:], *TENS, 'hundred', 'dozen'])})(?![\w-])", re.IGNORECASE
)
SHARES = re.compile(
    r"\b(?:both|pair|couple|half|trio|duo|twins|another|others?|each|either|neither|first|second|third|last|remaining"
    r"|rest|total|altogether|of (?:which|whom|them|these|those))\b",
    re.IGNORECASE,
)
LISTED = re.compile(
    r"[:(–—]|\s-+\s|, (?:an?|the|his|her|including|namely|such as|like|with)\b"
    r"|, (?!\w+ing\b|and\b|but\b|while\b|which\b).*\band\b|\bwith (?:an?|the)\b.*\band (?:an?|the)\b",
    re.IGNORECASE,
)
SEVERAL = re.compile(
    r"\b(?:an?|the)\b[^.!?\n]*\b(?:and|while|whereas) (?:an?|the)\b|(?:^|[.!?]\s+)An? .*[.!?]\s+An? ", re.IGNORECASE
)


NUMBERED = re.compile(
    r"\b(?:page|picture|image|photo|figure|frame|panel|row|column|line|number|level|floor|platform|gate|route|lane|track"
    r"|player|room|seat|shelf|step) $",
    re.IGNORECASE,
)  # "page 3" counts nothing


def _numbers(text: str) -> Iterator[re.Match[str]]:
    for match in NUMBERS.finditer(text):
        if not is_name(text, match.start(), match[0]) and not NUMBERED.search(text[: match.start()]):
            yield match


def adds_up(turn: Turn, value: Value, *, chosen_from: bool) -> bool:
    """Whether a number has to agree with others, or with a list of what it counts: "two people, a man and a woman".

    Args:
        chosen_from: the question names the number as one of several, and so no total.
    """
    answer = turn.answer
    if number(value.text) is None:
        return False
    if sum(1 for _ in _numbers(answer)) > 1 or SHARES.search(answer) or answer.startswith(" of ", value.end):
        return True
    asked = turn.question
    if not chosen_from and any(re.match(r"\s+[^\W\d_]", asked[match.end() :]) for match in _numbers(asked)):
        return True  # "of the three cups"
    start, end = _sentence(answer, value)
    return any((
        LISTED.search(answer[value.end : end].rstrip(".")), SEVERAL.search(answer[end:]),
        SEVERAL.search(answer[start : value.start]),
    ))  # fmt: skip


def told_before(turn: Turn, value: Value, nouns: Nouns) -> bool:
    """Whether an earlier turn names the value, or a near-synonym, in a sentence about one of the same things."""
    about = _nouns(f"{turn.question}\n{turn.answer}", nouns)
    before: set[str] = set()
    for text in _texts(turn.prompt[:-1]):
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
            if _named(value, sentence):
                # "It is red." is about what was asked.
                things = _nouns(sentence, nouns) or before
                if not about or not things or about & things:
                    return True
        before = _nouns(text, nouns) if len(text) < 2_000 else set()
    return False


def _texts(messages: tuple) -> Iterator[str]:
    for message in messages:
        for part in message["content"]:
            if part["type"] == "text":
                yield part["text"]


def _nouns(text: str, nouns: Nouns) -> set[str]:
    return {noun for *_, noun in nouns.find(text)}


def _named(value: Value, text: str) -> bool:
    if (count := number(value.text)) is not None:
        return any(number(match[0]) == count for match in NUMBERS.finditer(text))
    return any(value.set.alike(value.name, name) for _, name in value.set.named(text))


OR = re.compile(r"\bor\b", re.IGNORECASE)
HOW = re.compile(r"\bhow $", re.IGNORECASE)  # "how big" does not say that it is


def replacements(
    turn: Turn, value: Value, options: set[str], asked: set[tuple[int, str]], said: set[tuple[int, str]]
) -> frozenset[str]:
    """Values that may take this one's place: of its group, and near-synonyms of none that the texts already name.

    What stands there twice cannot be changed in one place, and "the left one has dots, the left one stripes" or "it is
    not blue, it is blue" would be wrong without a look at the image. Nor can what the question says be wrong ("Which is
    taller?" "The left one is shorter."), or what it rules out be said ("Besides red, ..."), unless it asks for one of
    several.

    Args:
        asked, said: where question and answer name members of any set of the category.
    """
    closed = value.set
    taken = set(closed.near(value.name))
    if not options:
        for start, name in asked:
            if not HOW.search(turn.question[:start]):
                if closed.alike(value.name, name):
                    return frozenset()
                taken |= closed.near(name) | {name}
    for start, name in said:
        if not value.start <= start < value.end:
            if closed.alike(value.name, name):
                return frozenset()
            taken |= closed.near(name)
    group = options or {member.lower() for member in closed.groups[value.group]}
    return frozenset(group - taken)


def choices(turn: Turn, value: Value) -> set[str]:
    """Values among which the question lets choose: red and blue in "Is it red or blue?"; empty if it does not."""
    if not OR.search(turn.question):
        return set()
    closed = value.set
    named = {name for _, name in closed.named(turn.question) if closed.members.get(name) == value.group}
    return named if value.name in named and len(named) > 1 else set()
