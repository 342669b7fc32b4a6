"""The folder of an edit job: what it is of, which turns it has, what is done. Progress is read from its files alone."""

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pydantic

from vapr import __version__
from vapr.data.review_verdicts import read_verdicts
from vapr.editing.config import EditConfig
from vapr.editing.job.claim import (
    EDITOR,
    ID,
    JOB,
    LEASES,
    OF_A_START,
    SHARDS,
    WAIT_SECONDS,
    claim_folder,
    differences,
)
from vapr.editing.job.identities import IDENTITIES, Identities
from vapr.editing.job.json_files import read_json, write_json, write_json_once
from vapr.editing.job.leases import take
from vapr.editing.job.pair_rows import digest_of, num_rows
from vapr.editing.job.scan import READ_AGAIN, SCAN, TURNS, Scan, Truths, read_array, write_scan
from vapr.editing.rules.turns import InstructionData, Turn
from vapr.errors import BadRow, UserError

PAIRS, REJECTS, PLANS, CANDIDATES = "pairs", "rejects", "plans", "candidates"
VERDICTS = "verdicts.jsonl"
RETRIED = ("failed", "over_target", "partner_lost")
"""How turns have ended that a later round goes through: it plans anew what had failed, with what was lost with it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Turns that are edited and written together: a shard, or in a later round what an earlier round left of it."""

    shard: int
    round: int

    @property
    def name(self) -> str:
        return f"{self.shard:05d}" if self.round == 0 else f"{self.shard:05d}-again{self.round}"

    @classmethod
    def of_file(cls, file: Path) -> "Unit | None":
        """Return the unit that a part or a manifest belongs to; None if its name is not that of a unit's file."""
        match = re.fullmatch(r"(?:part-)?(\d+)(?:-again(\d+))?\..*", file.name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None


@dataclass
class Manifest:
    """The content of the manifest of a finished unit."""

    unit: str
    shard: int
    round: int
    turns: int
    accepted: int
    over_target: int
    to_retry: int
    reasons: dict[str, dict[str, int]]  # of each status
    categories: dict[str, dict[str, int]]
    polarity: dict[str, dict[str, int]]  # of each source
    decided_by: dict[str, int]
    tokens: dict[str, int]
    seconds: float
    num_gpus: int
    times_taken: int
    files: dict[str, str]  # sha256 of each
    models: dict[str, dict[str, int]] = field(default_factory=dict)  # what each has cost
    reviewed: dict[str, str] = field(default_factory=dict)  # sha256 of parts that a review may have left so
    editors: dict[str, dict[str, int]] = field(default_factory=dict)  # how what each has edited has ended
    candidates: dict[str, int] = field(default_factory=dict)  # how they have ended
    judge: dict[str, int] = field(default_factory=dict)  # replies, and those without points


@dataclass
class EditedBy:
    """The content of editor.json."""

    name: str
    revision: str | None
    engine: str | None
    prompt_hash: str
    seed: int
    temperature: float | None
    editors: dict[str, dict[str, Any]] | None = None  # of several: weight, revision, engine of each


MANIFEST_SHAPE = pydantic.TypeAdapter(Manifest)
EDITOR_SHAPE = pydantic.TypeAdapter(EditedBy)
SCAN_SHAPE = pydantic.TypeAdapter(Scan)


class Job:
    """An edit job's folder, made or found.

    Args:
        folder: the folder of the job; new, empty, or of the same job.
        source: the path of the instruction data.
        config: the settings of the job.
        identity: what else decides the pairs: prompts, categories, the editor as the command line names it.

    Raises:
        UserError: if the folder belongs to another job or to no job, or the source cannot be read.
    """

    def __init__(self, folder: Path, source: str, config: EditConfig, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.data = InstructionData(source, config.source)
        self.identities = Identities(folder)
        described = {
            "vapr": __version__,
            "source": {"path": source, "digest": self.data.digest, "rows": len(self.data)},
            **identity,
            "config": {key: value for key, value in config.as_dict().items() if key not in OF_A_START},
        }
        self.described = json.loads(json.dumps(described))
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim_folder(folder, self.described))
            self.id: str | None = read_json(folder / JOB).get(ID)
            self.scan = self._scan()
            self.verdicts = read_verdicts(folder / VERDICTS) if (folder / VERDICTS).exists() else {}
            self._turns = read_array(folder / TURNS, (self.scan["eligible"], 2))
            self._truths = Truths(folder)
            self._at_work = stack.pop_all()

    def close(self) -> None:
        """Give the folder back: this process is at work in it no longer."""
        self._at_work.close()

    def check_editor(self, editor: Mapping[str, Any]) -> None:
        """Note who edits, the first time; afterwards it must be the same.

        Raises:
            UserError: naming what differs.
        """
        write_json_once(self.folder / EDITOR, editor)
        for key, ours, theirs in differences(dict(editor), self.editor):
            if key.rpartition(".")[2] not in ("engine", "num_gpus"):
                raise UserError(f"{self.folder}: was begun with another editor: {key} is {theirs}, not {ours}")

    @property
    def editor(self) -> dict[str, Any]:
        """The editor, as :meth:`check_editor` noted it."""
        return read_json(self.folder / EDITOR, EDITOR_SHAPE)

    # The source

    def _scan(self) -> dict[str, Any]:
        """Return the counts of the source, which is read once."""
        file = self.folder / SCAN
        while not file.exists():
            lease = take(self.folder / LEASES, "scan")
            if lease is None:
                time.sleep(WAIT_SECONDS)  # another worker is at it
                continue
            with lease:
                if not file.exists():
                    write_scan(self.folder, self.data, self.config)
        return read_json(file, SCAN_SHAPE, READ_AGAIN.format(file))

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    @property
    def num_shards(self) -> int:
        return -(-self.num_turns // self.config.turns_per_shard)

    def turns_of(self, shard: int) -> list[Turn]:
        """Return the turns of a shard."""
        start = shard * self.config.turns_per_shard
        places = self._turns[start : start + self.config.turns_per_shard]
        return self.turns_at([(int(row), int(number)) for row, number in places])

    def turns_at(self, places: Sequence[tuple[int, int]]) -> list[Turn]:
        """Return the turns of these rows and numbers.

        Raises:
            UserError: if the source was changed since it was scanned.
        """
        turns: list[Turn] = []
        row_turns: list[Turn] = []
        for row, number in places:
            if not row_turns or row_turns[0].row != row:
                try:
                    row_turns = self.data.turns(row)
                except BadRow as error:
                    raise UserError(f"{error}; the source was read without this fault before, restore it") from None
            turn = row_turns[number]
            turns.append(replace(turn, truths=self._truths.of(turn)))
        return turns

    # Finished units

    def manifest_file(self, unit: Unit) -> Path:
        """Return where the manifest of a unit is; the unit is finished when it is there."""
        return self.folder / SHARDS / f"{unit.name}.json"

    def is_finished(self, unit: Unit) -> bool:
        """Return whether a unit is finished."""
        return self.manifest_file(unit).exists()

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Say that a unit is finished, or what has become of it since."""
        write_json(self.folder / SHARDS / f"{manifest['unit']}.json", manifest)

    def manifests(self) -> list[dict[str, Any]]:
        """Return the manifests of all finished units, by shard and round."""
        found = [_read_manifest(file) for file in (self.folder / SHARDS).glob("*.json")]
        return sorted(found, key=lambda manifest: (manifest["shard"], manifest["round"]))

    def check_files(self) -> None:
        """Read everything that finished units have written, which takes as long as a copy of the folder would.

        Raises:
            UserError: naming the first file that is damaged, and the way out.
        """
        manifests = self.manifests()
        if manifests:
            _ = self.editor  # who has made them
        for manifest in manifests:
            file = self.folder / SHARDS / f"{manifest['unit']}.json"
            for name in manifest["files"]:
                problem = self._damage(file, name) and self._damage(file, name)  # a review may just have been at it
                if problem:
                    raise UserError(
                        f"{self.folder / name}: {problem}; restore it, or delete {file} to have it made again"
                    )

    def _damage(self, manifest_file: Path, name: str) -> str | None:
        """Say what is wrong with a file of a unit; None if it is as its manifest says, or the manifest is gone."""
        if not manifest_file.exists():
            return None
        manifest = _read_manifest(manifest_file)
        try:
            digest = digest_of(self.folder / name)
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        known = (manifest["files"][name], manifest.get("reviewed", {}).get(name))
        return None if digest in known else "is not as it was written"

    def left_for(self, unit: Unit) -> list[dict[str, Any]]:
        """Return the rejects of the round before that this round is to go through."""
        file = self.folder / REJECTS / f"part-{Unit(unit.shard, unit.round - 1).name}.jsonl"
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); restore it, or begin again in a new folder") from None
        return [row for row in rows if row["status"] in RETRIED]

    def units_left(self, *, retry_failed: bool) -> list[Unit]:
        """Return the units to do: shards that no manifest names, and again what was over an earlier target.

        Args:
            retry_failed: also what failed, and what was lost with it.
        """
        finished = {(manifest["shard"], manifest["round"]): manifest for manifest in self.manifests()}
        left = []
        for shard in range(self.num_shards):
            round = 0
            while (shard, round) in finished:  # rounds after a gap, where a manifest was deleted, do not count
                round += 1
            last = finished.get((shard, round - 1))
            if last is None or last["over_target"] or (retry_failed and last["to_retry"]):
                left.append(Unit(shard, round))
        return left

    def turns_done(self) -> int:
        """Return how many turns finished units have been through; those of a later round count again."""
        return sum(manifest["turns"] for manifest in self.manifests())

    def turns_left(self, *, retry_failed: bool) -> int:
        """Return how many turns :meth:`units_left` are to go through."""
        manifests = {manifest["unit"]: manifest for manifest in self.manifests()}
        left = self.num_turns - sum(manifest["turns"] for manifest in manifests.values() if manifest["round"] == 0)
        again = [unit for unit in self.units_left(retry_failed=retry_failed) if unit.round > 0]
        return left + sum(manifests[Unit(unit.shard, unit.round - 1).name]["to_retry"] for unit in again)

    @property
    def accepted(self) -> int:
        """Pairs in the parts of finished units: those accepted, less those that a review has dropped since."""
        manifests = self.manifests()
        if "drop" not in self.verdicts.values():
            return sum(manifest["accepted"] for manifest in manifests)
        return sum(
            num_rows(self.folder / name) for manifest in manifests for name in manifest["files"] if _is_pairs(name)
        )

    # Files of units that are not finished

    def remove_files(self, unit: Unit) -> None:
        """Remove what a killed worker has left of a unit: parts that no manifest names, and halves of files.

        Where a deleted manifest has the shard made again, its later rounds go too, for they went through what this one
        had left; manifests first.
        """
        for folder in (SHARDS, PAIRS, REJECTS, PLANS, CANDIDATES, IDENTITIES):
            for file in (self.folder / folder).glob(f"*{unit.shard:05d}*"):
                found = Unit.of_file(file)
                if found is not None and found.shard == unit.shard and found.round >= unit.round:
                    file.unlink(missing_ok=True)

    def remove_unfinished_pairs(self) -> None:
        """Remove the files of units that have pairs and that nobody will finish: a target is reached."""
        for part in (self.folder / PAIRS).glob("*"):
            unit = Unit.of_file(part)
            if unit is None or self.is_finished(unit) or not (lease := take(self.folder / LEASES, unit.name)):
                continue
            with lease:
                if not self.is_finished(unit):
                    self.remove_files(unit)


def _is_pairs(name: str) -> bool:
    return name.startswith(f"{PAIRS}/")


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = read_json(file, MANIFEST_SHAPE, "delete it to have its shard made again")
    if not manifest["unit"] == file.stem == Unit(manifest["shard"], manifest["round"]).name:
        raise UserError(f"{file}: is the manifest of {manifest['unit']}; give it back its name, or delete it")
    return manifest
