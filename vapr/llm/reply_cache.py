"""Replies of language models, kept in a file by what was asked, so that the same is never asked twice."""

import contextlib
import json
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vapr.cache import user_cache
from vapr.llm.database import open_database, told
from vapr.llm.request import Reply

FILE = "replies.sqlite"
TABLES = """
    CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL);
    CREATE TABLE IF NOT EXISTS models (key BLOB PRIMARY KEY) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS uncounted (asked_for TEXT, key BLOB, PRIMARY KEY (asked_for, key)) WITHOUT ROWID;
"""
LOST = "what it held is asked for again"
REPLIES_AT_ONCE, SECONDS_AT_MOST = 1_000, 2.0
"""So many replies, or those of so many seconds, are written together; a killed process loses no more."""


class ReplyCache:
    """Replies by keys of 16 bytes, for all jobs of a user. Memory does not grow with their number.

    Beside each stands who has paid for it, until that is counted: a shard that was stopped, or that waits for the batch
    of another request, is begun again and then counts what it had paid for, which for everybody else is found.

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
        self._unwritten: dict[bytes, tuple[str, str]] = {}  # replies, and who has paid for them
        self._written_at = time.monotonic()
        self._database = open_database(self.file, TABLES, LOST)

    def find(self, keys: Sequence[bytes], asked_for: str = "") -> dict[bytes, Reply]:
        """Return those replies that are kept; they are found, but for those that ``asked_for`` has yet to count.

        What is not as it was written is as good as missing.
        """
        owes = "SELECT 1 FROM uncounted WHERE asked_for = ? AND key = ?"
        found: dict[bytes, Reply] = {}
        if self.fault is None:
            try:
                self._database.execute("BEGIN")  # one lock for all of them is many times as fast as one for each
                for key in keys:
                    row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                    if row is not None and (reply := read(row[0])) is not None:
                        paid_here = asked_for and self._database.execute(owes, (asked_for, key)).fetchone()
                        found[key] = replace(reply, found=not paid_here)
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._end(error)
        return found

    def keep(self, key: bytes, reply: Reply, asked_for: str = "") -> None:
        """Keep a reply that ``asked_for`` has paid for, and write it soon."""
        if self.fault is not None:
            self.lost += 1
        else:
            self._unwritten[key] = written(reply), asked_for
            late = time.monotonic() - self._written_at > SECONDS_AT_MOST
            if late or len(self._unwritten) >= REPLIES_AT_ONCE:
                self.write()

    def write(self) -> None:
        """Write what is not written yet."""
        if self._unwritten and self.fault is None:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                replies = [(key, reply) for key, (reply, _) in self._unwritten.items()]
                self._database.executemany("INSERT OR REPLACE INTO replies VALUES (?, ?)", replies)
                owed = [(asked_for, key) for key, (_, asked_for) in self._unwritten.items() if asked_for]
                self._database.executemany("INSERT OR IGNORE INTO uncounted VALUES (?, ?)", owed)
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._end(error)
                self.lost += len(self._unwritten)
        self._unwritten.clear()
        self._written_at = time.monotonic()

    def note_counted(self, asked_for: str) -> None:
        """Forget who has paid: it is counted where it belongs."""
        self.write()
        if self.fault is None:
            try:
                self._database.execute("DELETE FROM uncounted WHERE asked_for = ?", (asked_for,))
            except sqlite3.Error as error:
                self._end(error)

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
        self.fault = told(self.file, error, LOST)


def written(reply: Reply) -> str:
    """Return a reply as text; of its surrogates, too, which no database takes."""
    tokens = [reply.prompt_tokens, reply.cached_tokens, reply.generated_tokens]
    return json.dumps([reply.text, reply.problem, *tokens])


def read(told: str) -> Reply | None:
    """Return the reply that was written so; None if none was."""
    try:
        text, problem, *tokens = json.loads(told)
        prompt, cached, generated = map(int, tokens)
    except (ValueError, TypeError):
        return None
    if not all(isinstance(words, str | None) for words in (text, problem)):
        return None
    return Reply(text, problem, prompt, cached, generated)
