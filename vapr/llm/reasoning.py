"""The answer of a model that reasons aloud first, where its server leaves both in one text."""

BEGINS, ENDS = "<think>", "</think>"


class StillReasoning(ValueError):
    """A text that ends before its reasoning does."""


def without_reasoning(text: str) -> str:
    """Return what comes after the reasoning; JSON is taken as it is, whatever stands in it.

    Many chat templates write the first mark themselves, so that the text has only the second.

    Raises:
        StillReasoning: if the reasoning has no end.
    """
    start = text.lstrip()
    if start.startswith(("{", "[")):
        return text
    before, mark, after = text.partition(ENDS)
    if mark and (start.startswith(BEGINS) or BEGINS not in before):
        return after.lstrip()
    if start.startswith(BEGINS):
        raise StillReasoning
    return text
