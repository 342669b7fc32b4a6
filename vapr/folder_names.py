"""Names of folders that are shown side by side."""

from collections.abc import Sequence
from pathlib import Path

from vapr.errors import UserError


def names_of(folders: Sequence[Path], what: str) -> list[str]:
    """Return a name for each folder: its own, or its path as given where two are called alike.

    Args:
        folders: to be told apart.
        what: what each is, for the message.

    Raises:
        UserError: for a folder that is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise UserError(f"{folders[number]}: given twice; name each {what} once")
    names = [folder.name for folder in resolved]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]
