"""The exceptions that are a user's mistake: shown as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in a config, a data file or a model folder.

    The message says where (file and line, row id or key), what is wrong, and the way out.
    """


class BadRow(UserError):
    """A row of a data file that cannot become a pair. Readers put its place in front: ``pairs.jsonl:17: ...``."""


class NoPair(BadRow):
    """A row that is sound but prefers nothing, such as one whose ratings are all equal. It is skipped and counted."""
