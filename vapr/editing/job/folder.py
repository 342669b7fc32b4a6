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
from vapr.cache import written_whole
from vapr.data.review_verdicts import read_verdicts
from vapr.editing.config import EditConfig
from vapr.editing.job.claim import EDITOR, LEASES, SHARDS, WAIT_SECONDS, claim, claim_folder, differences, read_json
from vapr.editing.job.leases import take
from vapr.editing.job.pair_rows import digest_of, num_rows
from vapr.editing.job.published import Published
from vapr.editing.job.scan import READ_AGAIN, SCAN, TURNS, Scan, Truths, read_array, write_scan
from vapr.editing.rules.turns import InstructionData, Turn
from vapr.errors import BadRow, UserError

PAIRS, REJECTS, PLANS = "pairs", "rejects", "plans"
VERDICTS = "verdicts.jsonl"


@dataclass(frozen=True, slots=True)
class Unit:
    """Turns that are edited and written together: a shard, or in a later round what an earlier round left of it."""

    shard: int
    round: int

    @property
    def name(self) -> str:
        return f"{self.shard:05d}" if self.round == 0 else f"{self.shard:05d}-again{self.round}"

    @classmethod
    def named(cls, name: str) -> "Unit | None":
        """The unit of that name; None if units are not called so."""
        match = re.fullmatch(r"(\d+)(?:-again(\d+))?", name)
        return cls(int(match[1]), int(match[2] or 0)) if match else None


@dataclass
class Manifest:
    """What the manifest of a finished unit holds."""

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
    reviewed: dict[str, str] = field(default_factory=dict)  # sha256 of parts that a review may have left so


@dataclass
class EditedBy:
    """What editor.json holds."""

    name: str
    revision: str | None
    engine: str | None
    prompt_hash: str
    seed: int
    temperature: float | None


MANIFEST_SHAPE = pydantic.TypeAdapter(Manifest)
EDITOR_SHAPE = pydantic.TypeAdapter(EditedBy)
SCAN_SHAPE = pydantic.TypeAdapter(Scan)


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = read_json(file, MANIFEST_SHAPE, "delete it to have its shard made again")
    if not manifest["unit"] == file.stem == Unit(manifest["shard"], manifest["round"]).name:
        raise UserError(f"{file}: is the manifest of {manifest['unit']}; give it back its name, or delete it")
    return manifest


class Job:
    """An edit job's folder, made or found.

    Args:
        folder: of the job; new, empty, or of the same job.
        source: path of the instruction data.
        config: of the job.
        identity: what else decides the pairs: prompts, categories, the editor as the command line names it.

    Raises:
        UserError: if the folder is of another job or not of a job, or the source cannot be read.
    """

    def __init__(self, folder: Path, source: str, config: EditConfig, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.data = InstructionData(source, config.source)
        self.published = Published(folder)
        described = {
            "vapr": __version__,
            "source": {"path": source, "digest": self.data.digest, "rows": len(self.data)},
            **identity,
            "config": {key: value for key, value in config.as_dict().items() if key != "engine"},
        }
        self.described = json.loads(json.dumps(described))
        with contextlib.ExitStack() as stack:
            stack.enter_context(claim_folder(folder, self.described))
            self.scan = self._scan()
            self.verdicts = read_verdicts(folder / VERDICTS) if (folder / VERDICTS).exists() else {}
            self._turns = read_array(folder / TURNS, (self.scan["eligible"], 2))
            self._truths = Truths(folder)
            self._at_work = stack.pop_all()

    def close(self) -> None:
        """Be at work in the folder no longer."""
        self._at_work.close()

    def check_editor(self, editor: Mapping[str, Any]) -> None:
        """Note who edits, the first time; afterwards it must be the same.

        Raises:
            UserError: naming what differs.
        """
        claim(self.folder / EDITOR, dict(editor))
        for key, ours, theirs in differences(dict(editor), self.editor):
            if key not in ("engine", "num_gpus"):
                raise UserError(f"{self.folder}: was begun with another editor: {key} is {theirs}, not {ours}")

    @property
    def editor(self) -> dict[str, Any]:
        """Who edits, as :meth:`check_editor` noted it."""
        return read_json(self.folder / EDITOR, EDITOR_SHAPE)

    # The source

    def _scan(self) -> dict[str, Any]:
        """Counts of the source and, in turns.npy, (row, answer) of every turn to edit. Made once."""
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
        """The turns of a shard."""
        start = shard * self.config.turns_per_shard
        places = self._turns[start : start + self.config.turns_per_shard]
        return self.turns_at([(int(row), int(number)) for row, number in places])

    def turns_at(self, places: Sequence[tuple[int, int]]) -> list[Turn]:
        """The turns of these rows and numbers.

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

    # What is done

    def manifest(self, unit: Unit) -> dict[str, Any] | None:
        """What is known of a finished unit; None if it is not finished."""
        file = self.folder / SHARDS / f"{unit.name}.json"
        return _read_manifest(file) if file.exists() else None

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Say that a unit is finished, or what has become of it since."""
        with written_whole(self.folder / SHARDS / f"{manifest['unit']}.json") as file:
            file.write(json.dumps(manifest, indent=1, ensure_ascii=False).encode(errors="replace") + b"\n")

    def manifests(self) -> list[dict[str, Any]]:
        """Of all finished units, by shard and round."""
        found = [_read_manifest(file) for file in (self.folder / SHARDS).glob("*.json")]
        return sorted(found, key=lambda manifest: (manifest["shard"], manifest["round"]))

    def check_files(self) -> None:
        """Read everything that finished units have written: it is as long in coming as a copy of the folder would be.

        Raises:
            UserError: naming the first file that is damaged, and the way out.
        """
        manifests = self.manifests()
        if manifests:
            _ = self.editor  # who has made them
        for manifest in manifests:
            unit = Unit(manifest["shard"], manifest["round"])
            for name in manifest["files"]:
                problem = self._problem(unit, name) and self._problem(unit, name)  # a review may just have been at it
                if problem:
                    again = self.folder / SHARDS / f"{unit.name}.json"
                    raise UserError(
                        f"{self.folder / name}: {problem}; restore it, or delete {again} to have it made again"
                    )

    def _problem(self, unit: Unit, name: str) -> str | None:
        manifest = self.manifest(unit)
        try:
            digest = digest_of(self.folder / name)
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        known = [manifest["files"][name], manifest.get("reviewed", {}).get(name)] if manifest else [digest]
        return None if digest in known else "is not as it was written"

    def rejects(self, unit: Unit) -> list[dict[str, Any]]:
        """The rows of a finished unit that became no pair."""
        file = self.folder / REJECTS / f"part-{unit.name}.jsonl"
        try:
            return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: cannot be read ({error}); restore it, or begin again in a new folder") from None

    def left_for(self, unit: Unit) -> list[dict[str, Any]]:
        """The rejects of the round before that this one is to go through."""
        return [row for row in self.rejects(Unit(unit.shard, unit.round - 1)) if row["status"] in RETRIED]

    def units(self, *, retry_failed: bool) -> list[Unit]:
        """Units to do: shards that no manifest names, and again what was over an earlier target.

        Args:
            retry_failed: also what failed, and what was lost with it.
        """
        finished = {(manifest["shard"], manifest["round"]) for manifest in self.manifests()}
        todo = []
        for shard in range(self.num_shards):
            done = 0
            while (shard, done) in finished:  # rounds after a gap, where somebody has deleted a manifest, do not count
                done += 1
            if done == 0:
                todo.append(Unit(shard, 0))
            else:
                last = self.manifest(Unit(shard, done - 1))
                assert last is not None
                if last["over_target"] or (retry_failed and last["to_retry"]):
                    todo.append(Unit(shard, done))
        return todo

    def progress(self, *, retry_failed: bool) -> tuple[int, int]:
        """Turns that finished units have been through, and those that :meth:`units` are still to go through."""
        known = {manifest["unit"]: manifest for manifest in self.manifests()}
        left = self.num_turns - sum(manifest["turns"] for manifest in known.values() if manifest["round"] == 0)
        later = [unit for unit in self.units(retry_failed=retry_failed) if unit.round > 0]
        left += sum(known[Unit(unit.shard, unit.round - 1).name]["to_retry"] for unit in later)
        return sum(manifest["turns"] for manifest in known.values()), left

    @property
    def accepted(self) -> int:
        """Pairs in the parts of finished units: those accepted, less those that a review has dropped since."""
        manifests = self.manifests()
        if "drop" not in self.verdicts.values():
            return sum(manifest["accepted"] for manifest in manifests)
        parts = [
            self.folder / name for manifest in manifests for name in manifest["files"] if name.endswith(".parquet")
        ]
        return sum(num_rows(part) for part in parts)


RETRIED = ("failed", "over_target", "partner_lost")
"""What a later round goes through: of these it plans anew what had failed, with what was lost with it."""
