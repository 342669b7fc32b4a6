"""The exceptions that are a user's mistake: shown as one line, without a traceback."""

import re


class UserError(ValueError):
    """A mistake in a config, a data file or a model folder.

    The message says where (file and line, row id or key), what is wrong, and the way out.
    """


class BadRow(UserError):
    """A row of a data file that cannot become a pair. Readers put its place in front: ``pairs.jsonl:17: ...``."""


class NoPair(BadRow):
    """A row that is sound but prefers nothing, such as one whose ratings are all equal. It is skipped and counted."""

    MARK = "no preference: "

    def __init__(self, message: str) -> None:
        super().__init__(message if self.MARK in message else self.MARK + message)


class DroppedInReview(NoPair):
    """A row that is sound but was judged not worth training on (``data.verdicts``). It is skipped and counted."""

    MARK = "dropped in review: "


def reason_kind(reason: str) -> str:
    """Replace what is special to one pair in a reason, quoted strings and numbers, to count reasons of one kind."""
    unquoted = re.sub(r"""(?<!\w)(['"`]).*?\1(?!\w)|“[^”]*”""", "'…'", reason, flags=re.DOTALL)
    return re.sub(r"\d+(?:[.,]\d+)*", "N", unquoted)


def one_line(error: BaseException) -> str:
    """Return an exception's message, however many lines it has, as one, cut after 300 characters."""
    return " ".join(str(error).split())[:300]
