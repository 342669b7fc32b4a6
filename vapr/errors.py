"""The one exception that is a user's mistake: shown as one line, without a traceback."""


class UserError(ValueError):
    """A mistake in a config, a data file or a model folder.

    The message says where (file and line, row id or key), what is wrong, and the way out.
    """
