"""Puts the pairs of an edit job, with pictures and card, into a data set repository of the Hugging Face hub."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vapr.data.remote import fetched
from vapr.editing.job.folder import PAIRS
from vapr.editing.job.pair_rows import read_table, write_table
from vapr.errors import UserError, one_line
from vapr.progress import Display

CARD = "README.md"
IMAGE_COLUMNS = ("images", "rejected_images")
OF_EVERY_REPOSITORY = {".gitattributes", CARD}


class Hub:
    """A data set repository that is ready to take a job's pairs.

    Args:
        repository: ``namespace/name``.
        described: what the job is of; a repository that holds another job is refused.

    Raises:
        UserError: for a name that is none, without a token, if the hub cannot be reached, or if the repository holds
            something else.
    """

    def __init__(self, repository: str, described: Mapping[str, Any]) -> None:
        import huggingface_hub

        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
            raise UserError(f"--push-to {repository}: write NAMESPACE/NAME, as in my-organisation/my-pairs")
        self.repository = repository
        self._mark = f"job-{_identity(described)}.json"
        self._described = described
        if huggingface_hub.get_token() is None:
            raise UserError(f"--push-to {repository}: no token of the hub here; hf auth login, or set HF_TOKEN")
        self._api = huggingface_hub.HfApi()
        self._is_new = False
        with self._mistakes():
            try:
                there = set(self._api.list_repo_files(repository, repo_type="dataset"))
            except huggingface_hub.errors.RepositoryNotFoundError:
                there, self._is_new = set(), True
        if there - OF_EVERY_REPOSITORY and self._mark not in there:
            raise UserError(f"--push-to {repository}: holds other files than those of this job; give a new name")

    def push(self, folder: Path, say: Callable[[str], None]) -> str:
        """Upload pairs with the bytes of their pictures, the card and what the job is of, in one commit.

        A repository that is made for it is private.

        Args:
            folder: of a finished job.
            say: shows a line: how much is uploaded.

        Returns:
            The address of the commit.

        Raises:
            UserError: if a picture cannot be read, or the hub does not take the files.
        """
        with tempfile.TemporaryDirectory(prefix=".push-", dir=folder) as place:
            staged = Path(place)
            pictures = _stage_pairs(folder, staged)
            shutil.copy(folder / CARD, staged / CARD)
            (staged / self._mark).write_text(json.dumps(self._described, indent=1, ensure_ascii=False) + "\n", "utf-8")
            size = sum(file.stat().st_size for file in staged.rglob("*") if file.is_file())
            kind = "a new private repository" if self._is_new else "the repository"
            say(f"pushing to {kind} {self.repository}: {size / 2**20:,.1f} MiB, pictures included ({pictures:,})")
            with self._mistakes():
                self._api.create_repo(self.repository, repo_type="dataset", private=True, exist_ok=True)
                commit = self._api.upload_folder(
                    repo_id=self.repository, repo_type="dataset", folder_path=staged,
                    commit_message="Pairs made with vapr edit", delete_patterns=[f"{PAIRS}/*"],
                )  # fmt: skip
        return str(getattr(commit, "commit_url", commit))

    @contextlib.contextmanager
    def _mistakes(self) -> Iterator[None]:
        """Say in one line what the hub has against it."""
        import huggingface_hub

        try:
            yield
        except huggingface_hub.errors.RepositoryNotFoundError:
            raise
        except (huggingface_hub.errors.HTTPError, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"--push-to {self.repository}: the hub refused, or cannot be reached ({one_line(error)})"
            ) from None


def _identity(described: Mapping[str, Any]) -> str:
    """Return what tells jobs apart; the same job of another version of vapr, or moved, is the same."""
    source = {key: value for key, value in described["source"].items() if key != "path"}
    content = {**{key: value for key, value in described.items() if key != "vapr"}, "source": source}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _stage_pairs(folder: Path, staged: Path) -> int:
    """Write every part with the bytes of its pictures; return how many pictures there are, repeated ones included."""
    parts = sorted((folder / PAIRS).glob("*.parquet"))
    count = 0
    with Display("pack", len(parts), unit="part") as display:
        for part in parts:
            table = read_table(part)
            for name in (name for name in IMAGE_COLUMNS if name in table.column_names):
                shown = [[_embedded(image, folder) for image in row] for row in table.column(name).to_pylist()]
                count += sum(map(len, shown))
                place = table.column_names.index(name)
                column = _array(shown, table.schema.field(name).type)
                table = table.set_column(place, table.schema.field(name), column)
            write_table(staged / PAIRS / part.name, table)
            display.advance("")
    return count


def _array(rows: list[list[dict[str, Any]]], type: Any) -> Any:
    import pyarrow

    return pyarrow.array(rows, type)


def _embedded(image: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return an image with its bytes, and of its path the name alone: folders of this machine are nobody's business."""
    if image["bytes"] is not None:
        return {"bytes": image["bytes"], "path": image["path"]}
    path = Path(os.path.join(folder, image["path"]))
    try:
        return {"bytes": fetched(path).read_bytes(), "path": path.name}
    except OSError as error:
        raise UserError(f"{path}: cannot be read, so the pairs cannot be pushed ({error.strerror})") from None
