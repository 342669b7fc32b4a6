"""Which requests are in which batch of a server, and what has come of them: kept in a file until jobs have taken it."""

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vapr.cache import user_cache
from vapr.errors import UserError
from vapr.llm.database import open_database, told
from vapr.llm.reply_cache import read, written
from vapr.llm.request import Reply

FILE = "batches.sqlite"
TABLES = """
    CREATE TABLE IF NOT EXISTS sent (key BLOB PRIMARY KEY, batch TEXT NOT NULL, reply TEXT);
    CREATE INDEX IF NOT EXISTS sent_by_batch ON sent (batch);
    CREATE TABLE IF NOT EXISTS batches (batch TEXT PRIMARY KEY, sent_at REAL NOT NULL);
    CREATE TABLE IF NOT EXISTS payers (batch TEXT PRIMARY KEY, asked_for TEXT NOT NULL);
"""
LOST = "batches under way are sent again"


class SentRequests:
    """Requests by keys of 16 bytes, beside the replies that are kept.

    Args:
        folder: holds the file; None: the user's cache folder.
        server: whose batches these are; servers name theirs without asking one another.

    Raises:
        UserError: if the file cannot be used, now or later.
    """

    def __init__(self, folder: str | None = None, server: str = "") -> None:
        self._server = server
        self.file = (Path(folder) if folder else user_cache()) / FILE
        self._database = open_database(self.file, TABLES, LOST)

    def batches_of(self, keys: Sequence[bytes]) -> dict[bytes, str]:
        """Return the batch of each request that was sent."""
        return {key: batch.removeprefix(self._named("")) for key, (batch, _, _) in self._rows(keys).items()}

    def replies(self, keys: Sequence[bytes]) -> dict[bytes, Reply]:
        """Return what has come of requests whose batch has ended, with whom the batch was sent for."""
        rows = self._rows(keys)
        read_back = {key: read(reply) for key, (_, reply, _) in rows.items() if reply is not None}
        return {
            key: replace(reply, asked_for=rows[key][2] or "") for key, reply in read_back.items() if reply is not None
        }

    def _rows(self, keys: Sequence[bytes]) -> dict[bytes, tuple[str, str | None, str | None]]:
        find = "SELECT batch, reply, asked_for FROM sent LEFT JOIN payers USING (batch) WHERE key = ?"
        with self._statements() as database:
            rows = {key: database.execute(find, (key,)).fetchone() for key in keys}
        return {key: row for key, row in rows.items() if row is not None}

    def _named(self, batch: str) -> str:
        """Return the name of a batch in the file, where those of all servers stand."""
        return f"{self._server} {batch}"

    def note_sent(self, batch: str, keys: Sequence[bytes], asked_for: str) -> None:
        """Note a batch of requests, and whose they are."""
        named = self._named(batch)
        with self._statements() as database:
            database.execute("INSERT OR REPLACE INTO batches VALUES (?, ?)", (named, time.time()))
            database.execute("INSERT OR REPLACE INTO payers VALUES (?, ?)", (named, asked_for))
            database.executemany("INSERT OR REPLACE INTO sent VALUES (?, ?, NULL)", [(key, named) for key in keys])

    def age_seconds(self, batch: str) -> float:
        """Return how long ago a batch was sent."""
        with self._statements() as database:
            row = database.execute("SELECT sent_at FROM batches WHERE batch = ?", (self._named(batch),)).fetchone()
        return max(time.time() - row[0], 0.0) if row else 0.0

    def end(self, batch: str, replies: Mapping[bytes, Reply], otherwise: Reply) -> None:
        """Note what has come of a batch: ``otherwise`` of requests that no reply is given for."""
        named = self._named(batch)
        with self._statements() as database:
            database.execute("UPDATE sent SET reply = ? WHERE batch = ?", (written(otherwise), named))
            rows = [(written(reply), key, named) for key, reply in replies.items()]
            database.executemany("UPDATE sent SET reply = ? WHERE key = ? AND batch = ?", rows)

    def forget_batch(self, batch: str) -> int:
        """Forget a batch, so that its requests can be sent again; return how many."""
        with self._statements() as database:
            return database.execute("DELETE FROM sent WHERE batch = ?", (self._named(batch),)).rowcount

    def forget(self, keys: Sequence[bytes]) -> None:
        """Forget requests whose replies are kept elsewhere."""
        with self._statements() as database:
            database.executemany("DELETE FROM sent WHERE key = ?", [(key,) for key in keys])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextlib.contextmanager
    def _statements(self) -> Iterator[sqlite3.Connection]:
        """Have all statements inside count, or none."""
        try:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise UserError(told(self.file, error, LOST)) from None
