"""Which of several candidates becomes a turn's pair, once the checks have left those that could."""

from collections import Counter
from collections.abc import Sequence

from vapr.editing.draft.draft import Draft
from vapr.text import edit_distance, words

SAME_CANDIDATE = "another candidate says the same"
NOT_CHOSEN = "another candidate was better"
LONGER = "\0"  # no word
PASSES = 3
"""Times that each choice is looked at anew, given all others; it has mostly settled after two."""


def choose(drafts: Sequence[Draft]) -> None:
    """Make each draft with candidates what the best of them is; without any left, no pair for the reason of one.

    Most points first. Among candidates with as many: those that leave each word about as often put in as taken out
    over the shard, and rejected answers about as often longer as shorter, so that neither tells which answer is wrong;
    then the smaller edit. What rules have traded is in balance and counts for nothing.

    Args:
        drafts: of a shard; those that have ended already stay as they are.
    """
    asked = [draft for draft in drafts if draft.candidates]
    choices = [_best(draft) if draft.status == "open" else [] for draft in asked]
    for draft, best in zip(asked, _in_balance(choices), strict=True):
        if draft.status == "open":
            draft.take(best if best is not None else _furthest(draft))
        for candidate in draft.candidates:
            if candidate is best:
                candidate.status = "chosen"
            elif candidate.status == "open":
                lost = best is None  # with the draft: the other half of its trade is gone
                candidate.status, candidate.reason = ("lost", draft.reason) if lost else ("not_chosen", NOT_CHOSEN)
        if draft.status == "refused":
            draft.status = "failed"


def _best(draft: Draft) -> list[Draft]:
    """Return the candidates with the most points of those that are left."""
    left = [candidate for candidate in draft.candidates if candidate.status == "open"]
    most = max((_points(candidate) for candidate in left), default=0)
    return [candidate for candidate in left if _points(candidate) == most]


def _furthest(draft: Draft) -> Draft:
    """Return the candidate whose end is the draft's: one that only a judge was against, else the last one asked for."""
    judged = [candidate for candidate in draft.candidates if candidate.status == "rejected"]
    last = [candidate for candidate in draft.candidates if candidate.attempts == draft.attempts]
    return (judged or last)[0]


def _points(candidate: Draft) -> int:
    return candidate.score if candidate.score is not None else -1


def _in_balance(choices: Sequence[Sequence[Draft]]) -> list[Draft | None]:
    """Return one of each list (None of an empty one), so that the squares of what is out of balance stay small."""
    changes = [[_change(candidate) for candidate in some] for some in choices]
    distances = [[_distance(candidate) for candidate in some] for some in choices]
    chosen: list[int | None] = [None] * len(choices)
    net: Counter[str] = Counter()
    for _ in range(PASSES):
        before = list(chosen)
        for n, some in enumerate(changes):
            if not some:
                continue
            if (last := chosen[n]) is not None:
                net.subtract(some[last])
            costs = [_cost(net, change) for change in some]
            chosen[n] = best = min(range(len(some)), key=lambda k: (costs[k], distances[n][k]))
            net.update(some[best])
        if chosen == before or all(len(some) < 2 for some in changes):
            break
    return [some[k] if k is not None else None for some, k in zip(choices, chosen, strict=True)]


def _change(candidate: Draft) -> dict[str, int]:
    """Return how often a candidate puts each word in, less how often it takes it out, and if it is longer."""
    answer = candidate.turn.answer
    change: Counter[str] = Counter()
    for edit in candidate.edits:
        change.update(words(edit.to.lower()))
        change.subtract(words(answer[edit.start : edit.end].lower()))
    more = len(candidate.rejected or "") - len(answer)
    change[LONGER] = (more > 0) - (more < 0)
    return {word: count for word, count in change.items() if count}


def _cost(net: Counter[str], change: dict[str, int]) -> int:
    return sum(count * (2 * net[word] + count) for word, count in change.items())


def _distance(candidate: Draft) -> float:
    return edit_distance(words(candidate.turn.answer), words(candidate.rejected or ""))
