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
    CREATE TABLE replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL);
    CREATE TABLE models (key BLOB PRIMARY KEY) WITHOUT ROWID;
"""
LOST = "what it held is asked for again"
REPLIES_AT_ONCE, SECONDS_AT_MOST = 1_000, 2.0
"""So many replies, or those of so many seconds, are written together; a killed process loses no more."""


class ReplyCache:
    """Replies by keys of 16 bytes, for all jobs of a user. Memory does not grow with their number.

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
        self._database = open_database(self.file, TABLES, LOST)

    def find(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """Return those replies that are kept. What is not as it was written is as good as missing."""
        found: dict[bytes, Reply] = {}
        if self.fault is None:
            try:
                self._database.execute("BEGIN")  # one lock for all of them is many times as fast as one for each
                for key in keys:
                    row = self._database.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
                    if row is not None and (reply := read(row[0])) is not None:
                        found[key] = replace(reply, found=True)
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                self._end(error)
        return found

    def keep(self, key: bytes, reply: Reply) -> None:
        """Keep a reply, and write it soon."""
        if self.fault is not None:
            self.lost += 1
        else:
            self._unwritten[key] = written(reply)
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
