"""Replies of language models, kept in a file by what was asked, so that the same is never asked twice.

One SQLite database for all jobs of a user. Not with a write-ahead log, which all machines that share a home folder
would have to share memory for: replies are written a few times a second, which a rollback journal is fast enough for.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

from vapr.cache import user_cache
from vapr.errors import UserError
from vapr.llm.request import Reply

FILE = "replies.sqlite"
APPLICATION = int.from_bytes(b"vapr")
FORMAT = 1
TABLES = """
    CREATE TABLE replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL);
    CREATE TABLE models (key BLOB PRIMARY KEY) WITHOUT ROWID;
"""
WAIT_SECONDS = 60.0
"""How long a process waits for another one to finish writing."""
KIB_IN_MEMORY = 4096
REPLIES_AT_ONCE, SECONDS_AT_MOST = 256, 2.0
"""So many replies, or those of so many seconds, are written together; a killed process loses no more."""
WHAT_IS_WRONG = MappingProxyType({
    sqlite3.SQLITE_CORRUPT: "is damaged or cut short",
    sqlite3.SQLITE_NOTADB: "is no cache of replies",
})  # fmt: skip


class ReplyCache:
    """Replies by keys of 16 bytes. Memory does not grow with their number.

    A fault while it is in use, such as a full disk, ends no job: from there on nothing is found and nothing kept.

    Args:
        folder: holds the file; None: the user's cache folder.

    Attributes:
        fault: what has ended its use, in one line; None while it works.
        lost: replies that could not be kept.

    Raises:
        UserError: if the file is damaged, is something else, or cannot be written.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.file = (Path(folder) if folder else user_cache()) / FILE
        self.fault: str | None = None
        self.lost = 0
        self._unwritten: dict[bytes, str] = {}
        self._written_at = time.monotonic()
        with contextlib.ExitStack() as unless_usable:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self._database = sqlite3.connect(self.file, timeout=WAIT_SECONDS, isolation_level=None)
                unless_usable.callback(self._database.close)
                self._begin()
            except (OSError, sqlite3.Error) as error:
                raise UserError(_told(self.file, error)) from None
            unless_usable.pop_all()

    def _begin(self) -> None:
        """Make the tables if need be.

        Raises:
            sqlite3.Error: if that cannot be done.
            UserError: if the file holds something else.
        """
        database = self._database
        database.execute(f"PRAGMA cache_size = -{KIB_IN_MEMORY}")
        database.execute("PRAGMA journal_mode = TRUNCATE")
        database.execute("BEGIN IMMEDIATE")  # of two processes that begin, one makes the tables
        (application,), (format,) = (
            database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if (application, format) != (APPLICATION, FORMAT):
            if application == APPLICATION:
                raise UserError(f"{self.file}: was written by another version of vapr; {_way_out(delete=True)}")
            if database.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise UserError(f"{self.file}: is a database of something else; {_way_out(delete=False)}")
            for table in filter(str.strip, TABLES.split(";")):
                database.execute(table)
            database.execute(f"PRAGMA application_id = {APPLICATION}")
            database.execute(f"PRAGMA user_version = {FORMAT}")
        database.execute("COMMIT")

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """Return those replies that are kept. What is not as it was written is as good as missing."""
        found: dict[bytes, Reply] = {}
        if self.fault is None:
            try:
                for key in keys:
                    row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                    if row is not None and (reply := _read(row[0])) is not None:
                        found[key] = reply
            except sqlite3.Error as error:
                self._end(error)
        return found

    def keep(self, key: bytes, reply: Reply) -> None:
        """Keep a reply, and write it soon."""
        if self.fault is not None:
            self.lost += 1
        else:
            told = [reply.text, reply.problem, reply.prompt_tokens, reply.cached_tokens, reply.generated_tokens]
            self._unwritten[key] = json.dumps(told)
            late = time.monotonic() - self._written_at > SECONDS_AT_MOST
            if late or len(self._unwritten) >= REPLIES_AT_ONCE:
                self.write()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._unwritten and self.fault is None:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                self._database.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", self._unwritten.items())
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._end(error)
                self.lost += len(self._unwritten)
        self._unwritten.clear()
        self._written_at = time.monotonic()

    def knows_model(self, key: bytes) -> bool:
        """Return whether a model was noted."""
        try:
            return self._database.execute("SELECT 1 FROM models WHERE key = ?", (key,)).fetchone() is not None
        except sqlite3.Error as error:
            self._end(error)
            return False

    def note_model(self, key: bytes) -> None:
        """Note a model that has been found to be of use."""
        try:
            self._database.execute("INSERT OR IGNORE INTO models VALUES (?)", (key,))
        except sqlite3.Error as error:
            self._end(error)

    def close(self) -> None:
        """Write what is left."""
        self.write()
        self._database.close()

    def _end(self, error: sqlite3.Error) -> None:
        if self._database.in_transaction:
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
        self.fault = _told(self.file, error)


def _read(told: str) -> Reply | None:
    """Return the reply that was written so; None if it was not."""
    try:
        text, problem, *tokens = json.loads(told)
        prompt, cached, generated = map(int, tokens)
    except (ValueError, TypeError):
        return None
    if not all(isinstance(words, str | None) for words in (text, problem)):
        return None
    return Reply(text, problem, prompt, cached, generated, found=True)


def _told(file: Path, error: OSError | sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one of extended codes
    if code in WHAT_IS_WRONG:
        return f"{file}: {WHAT_IS_WRONG[code]} ({error}); {_way_out(delete=True)}"
    return f"{file}: cannot be used ({getattr(error, 'strerror', None) or error}); {_way_out(delete=False)}"


def _way_out(*, delete: bool) -> str:
    others = "name another folder with engine.cache_dir, or leave it out with --no-cache"
    return f"delete it (what it held is asked for again), {others}" if delete else others
