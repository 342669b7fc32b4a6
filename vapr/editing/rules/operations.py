"""Edit operations: applied to an answer in one way only, articles and agreement repaired, spans kept."""

import difflib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vapr.data.pair import Edit
from vapr.editing.rules.agreement import CannotEdit, agree, in_the_case_of


@dataclass(frozen=True, slots=True)
class Operation:
    """Put ``replace`` where ``find`` stands. ``start`` says where that is; -1: it occurs exactly once."""

    find: str
    replace: str
    why: str = ""
    start: int = -1


def apply(answer: str, operations: Sequence[Operation]) -> tuple[str, list[Edit]]:
    """The edited answer, and what changed in it as spans of the answer.

    ``a`` and ``an``, and the number of a noun and its verb, follow the edit; such words become part of its span.

    Raises:
        CannotEdit: if a ``find`` is not in the answer, or more than once, or changes nothing; or operations overlap.
    """
    spans = sorted((_place(answer, operation) for operation in operations), key=lambda edit: edit.start)
    repaired = [
        agree(answer, edit, _trimmed(answer, edit), [other for other in spans if other is not edit]) for edit in spans
    ]
    for before, after in itertools.pairwise(repaired):
        if after.start < before.end:
            raise CannotEdit("two edits overlap")
    edits = [trimmed for edit in repaired if (trimmed := _trimmed(answer, edit)) is not None]
    if not edits:
        raise CannotEdit("the edit changes nothing")
    return spliced(answer, edits), edits


def spliced(answer: str, edits: Sequence[Edit]) -> str:
    """The answer with every span replaced."""
    pieces, at = [], 0
    for edit in edits:
        pieces += [answer[at : edit.start], edit.to]
        at = edit.end
    return "".join([*pieces, answer[at:]])


def _place(answer: str, operation: Operation) -> Edit:
    find = operation.find
    if operation.start >= 0:
        assert answer.startswith(find, operation.start)
        return Edit(operation.start, operation.start + len(find), operation.replace)
    if not find.strip():
        raise CannotEdit("find is empty")
    places = _places(find, answer) or _at_sentence_starts(find, answer)
    if len(places) != 1:
        times = f"{len(places)} times" if places else "nowhere"
        raise CannotEdit(f"find must occur exactly once in the answer; {_short(find)} occurs {times}")
    start, end = places[0], places[0] + len(find)
    replace = operation.replace if answer[start:end] == find else in_the_case_of(answer[start:end], operation.replace)
    if start == 0 and find[0].isupper():
        replace = replace[:1].upper() + replace[1:]
    if replace == answer[start:end]:
        raise CannotEdit(f"replace is the same as find: {_short(find)}")
    return Edit(start, end, replace)


SENTENCE_START = re.compile(r"(?:^|[.!?]\s+|\n)[\s\"'“‘(*]*$")


def _places(find: str, answer: str) -> list[int]:
    """Find where it starts. A word is not found inside another one: "man" in "woman"."""
    left = r"(?<!\w)" if find[0].isalnum() else ""
    right = r"(?!\w)" if find[-1].isalnum() else ""
    return [match.start() for match in re.finditer(left + re.escape(find) + right, answer)]


def _at_sentence_starts(find: str, answer: str) -> list[int]:
    """Find where it stands with a capital: of "A dog barks." a model likes to say that it found "a dog"."""
    places = _places(find[0].upper() + find[1:], answer)
    return [start for start in places if SENTENCE_START.search(answer[:start])]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _trimmed(answer: str, edit: Edit) -> Edit | None:
    """The span without the words at its ends that stay the same; None if nothing changes."""
    old, new = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (answer[edit.start : edit.end], edit.to))
    if old == new:
        return None
    first = 0
    while first < min(len(old), len(new)) and old[first] == new[first]:
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and old[-1 - last] == new[-1 - last]:
        last += 1
    start = edit.start + sum(map(len, old[:first]))
    end = edit.end - sum(map(len, old[len(old) - last :]))
    return Edit(start, end, "".join(new[first : len(new) - last]))


# Rewrites

WORDS = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")


def changed_spans(answer: str, rewritten: str) -> list[Edit]:
    """The word-level differences of a rewritten answer, as spans of the answer."""
    old, new = ([(m.start(), m.end(), m[0]) for m in WORDS.finditer(text)] for text in (answer, rewritten))
    matcher = difflib.SequenceMatcher(None, [w for *_, w in old], [w for *_, w in new], autojunk=False)
    edits = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        # Words that are only added or only taken away go with the space around them.
        wide = a == b or c == d
        start, end = _bounds(old, a, b, len(answer), wide)
        new_start, new_end = _bounds(new, c, d, len(rewritten), wide)
        edits.append(Edit(start, end, rewritten[new_start:new_end]))
    if spliced(answer, edits) != rewritten:  # the space between words changed, too
        return [Edit(0, len(answer), rewritten)]
    return edits


def _bounds(words: list[tuple[int, int, str]], first: int, stop: int, length: int, wide: bool) -> tuple[int, int]:
    if not wide:
        return words[first][0], words[stop - 1][1]
    return words[first - 1][1] if first else 0, words[stop][0] if stop < len(words) else length
