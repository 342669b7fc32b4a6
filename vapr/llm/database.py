"""SQLite databases in the user's cache folder, which several processes and machines write at once.

Not with a write-ahead log, which all machines that share a home folder would have to share memory for: these databases
are written a few times a second, which a rollback journal is fast enough for.
"""

import contextlib
import sqlite3
from pathlib import Path
from types import MappingProxyType

from vapr.errors import UserError

APPLICATION = int.from_bytes(b"vapr")
FORMAT = 1
WAIT_SECONDS = 60.0
"""How long a process waits for another one to finish writing."""
KIB_IN_MEMORY = 4096
WHAT_IS_WRONG = MappingProxyType({
    sqlite3.SQLITE_CORRUPT: "is damaged or cut short",
    sqlite3.SQLITE_NOTADB: "is no database of vapr",
})  # fmt: skip


def open_database(file: Path, tables: str, lost: str) -> sqlite3.Connection:
    """Open a database whose statements are written one by one, and make its tables if need be.

    Args:
        file: its folder is made, too.
        tables: the SQL that makes those that are not there; a file of an older version lacks some.
        lost: what becomes of its content for who deletes it.

    Raises:
        UserError: if the file is damaged, is something else, or cannot be written.
    """
    with contextlib.ExitStack() as unless_usable:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(file, timeout=WAIT_SECONDS, isolation_level=None)
            unless_usable.callback(database.close)
            _begin(database, file, tables, lost)
        except (OSError, sqlite3.Error) as error:
            raise UserError(told(file, error, lost)) from None
        unless_usable.pop_all()
    return database


def _begin(database: sqlite3.Connection, file: Path, tables: str, lost: str) -> None:
    database.execute(f"PRAGMA cache_size = -{KIB_IN_MEMORY}")
    database.execute("PRAGMA journal_mode = TRUNCATE")
    database.execute("BEGIN IMMEDIATE")  # of two processes that begin, one makes the tables
    (application,), (format,) = (
        database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    if (application, format) != (APPLICATION, FORMAT):
        if application == APPLICATION:
            raise UserError(f"{file}: was written by another version of vapr; {_way_out(lost)}")
        if database.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise UserError(f"{file}: is a database of something else; {_way_out(None)}")
        database.execute(f"PRAGMA application_id = {APPLICATION}")
        database.execute(f"PRAGMA user_version = {FORMAT}")
    for table in filter(str.strip, tables.split(";")):
        database.execute(table)
    database.execute("COMMIT")


def told(file: Path, error: OSError | sqlite3.Error, lost: str) -> str:
    """Say in one line what is wrong with a database, and the way out."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one of extended codes
    if code in WHAT_IS_WRONG:
        return f"{file}: {WHAT_IS_WRONG[code]} ({error}); {_way_out(lost)}"
    return f"{file}: cannot be used ({getattr(error, 'strerror', None) or error}); {_way_out(None)}"


def _way_out(lost: str | None) -> str:
    others = "name another folder with engine.cache_dir, or leave it out with --no-cache"
    return f"delete it ({lost}), {others}" if lost else others
