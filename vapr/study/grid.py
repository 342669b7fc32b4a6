"""The runs of a study: one cell for each combination of data set, loss, size and seed."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vapr.batches.model_config import load_model_config
from vapr.batches.model_folder import find_model
from vapr.cache import written_whole
from vapr.config import Config
from vapr.config_mistakes import nearest
from vapr.errors import UserError
from vapr.evaluation.generation.open_model import MODEL_FILES, remembered_hash
from vapr.pages.figures import flat
from vapr.study.config import StudyConfig
from vapr.study.subsets import DataSet, open_data_sets

CHANGES_NOTHING = (
    "run_dir", "trackers", "reference", "features", "data.train", "data.workers", "checkpoint.keep",
)  # fmt: skip
"""Keys that do not decide what is trained. The pairs themselves are part of a cell's hash, wherever they lie."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data, loss, size, seed: its place on the axes.
        config: of the run; the name of its ``run_dir`` ends with a hash of what decides the result.
        num_steps: of the whole run.
    """

    data: str
    loss: str
    size: int
    seed: int
    config: Config
    num_steps: int

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def name(self) -> str:
        """How it is called in lines on the terminal."""
        return f"{self.data} {self.loss} {self.size:,} seed {self.seed}"

    @property
    def is_done(self) -> bool:
        return (self.run_dir / "final").is_dir()

    @property
    def steps_done(self) -> int:
        """Return the steps that its metrics.jsonl tells of."""
        if self.is_done:
            return self.num_steps
        steps = 0
        for line in _lines(self.run_dir / "metrics.jsonl"):
            if b'"loss"' in line and line.endswith(b"\n"):
                steps = int(json.loads(line)["step"])
        return steps

    def write_config(self) -> Path:
        """Write the run's config beside its folder, and return the file."""
        path = self.run_dir.with_suffix(".yaml")
        with written_whole(path) as file:
            file.write(yaml.safe_dump(self.config.as_dict(), sort_keys=False).encode())
        return path


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []


def make_grid(study: StudyConfig) -> list[Cell]:
    """Return the cells, those of few pairs first; subsets are written.

    Raises:
        UserError: naming what is wrong with base, data, sizes or exclude.
    """
    base = study.base_config()
    sets = open_data_sets(base.data, study.data or {"data": base.data.train})
    losses = study.losses or {"loss": base.loss}
    seeds = study.seeds or [base.seed]
    sizes = sorted(study.sizes) if study.sizes else [None]
    known = {"data": [one.name for one in sets], "loss": list(losses), "size": sizes, "seed": seeds}
    rules = [_rule(rule, known, number) for number, rule in enumerate(study.exclude)]
    places = [
        (size, one, loss, seed)
        for size in sizes
        for one in sets
        for loss in losses
        for seed in seeds
        if not any(_matches(rule, {"data": one.name, "loss": loss, "size": size, "seed": seed}) for rule in rules)
    ]
    if not places:
        raise UserError("exclude: every combination is left out; nothing would be trained")
    most_pairs = max(size or one.num_pairs for size, one, _, _ in places)
    max_steps = base.optim.max_steps
    if study.equal == "steps":
        max_steps = max_steps or base.optim.epochs * math.ceil(most_pairs / base.optim.pairs_per_step)
    maker = _Maker(study, max_steps, _model_identity(base), losses)
    return [maker.cell(size, one, loss, seed) for size, one, loss, seed in places]


def _rule(rule: dict[str, Any], known: dict[str, list[Any]], number: int) -> dict[str, list[Any]]:
    """Return a rule of ``exclude`` with lists for values. Raise UserError for a value that the study does not have."""
    listed = {key: value if isinstance(value, list) else [value] for key, value in rule.items()}
    for key, values in listed.items():
        for value in values:
            if value not in known[key]:
                there = [str(one) for one in known[key]]
                raise UserError(
                    f"exclude.{number}.{key}: there is no {value!r:.40} in the study; {nearest(str(value), there)}"
                )
    return listed


def _matches(rule: dict[str, list[Any]], place: dict[str, Any]) -> bool:
    return all(place[key] in values for key, values in rule.items())


@dataclass(frozen=True)
class _Maker:
    """What all cells have in common."""

    study: StudyConfig
    max_steps: int | None
    model: str
    losses: dict[str, Any]

    def cell(self, size: int | None, one: DataSet, loss: str, seed: int) -> Cell:
        """Return a cell; ``size`` None takes the whole set."""
        out = Path(self.study.out)
        train: Any = one.given if size is None else str(one.subset(size, out / "data"))
        config = self.study.base_config()
        data = dataclasses.replace(config.data, train=train)
        probe = config.probe
        if size is not None:  # written in vapr's own format; what is held out is not
            held_out: Any = config.data.sources("eval") or None
            data = dataclasses.replace(data, eval=held_out, format="auto", columns=None, image_root=None)
            looked_at: Any = config.probe_sources or None
            probe = dataclasses.replace(probe, data=looked_at)
        optim = dataclasses.replace(config.optim, max_steps=self.max_steps)
        config = dataclasses.replace(config, data=data, optim=optim, probe=probe, loss=self.losses[loss], seed=seed)
        num_pairs = size or one.num_pairs
        name = f"{one.name}.{loss}.{num_pairs}.seed{seed}.{self._hash(config, one, size)}"
        config = dataclasses.replace(config, run_dir=str(out / "runs" / name))
        steps = optim.max_steps or optim.epochs * math.ceil(num_pairs / optim.pairs_per_step)
        return Cell(one.name, loss, num_pairs, seed, config, steps)

    def _hash(self, config: Config, one: DataSet, size: int | None) -> str:
        """Return a hash of what decides the weights that the run ends with."""
        keys = {key: value for key, value in flat(config.as_dict()).items() if not _changes_nothing(key)}
        decides = [sorted(keys.items()), one.pairs.digest, size, self.model]
        return hashlib.sha256(json.dumps(decides, default=str).encode()).hexdigest()[:10]


def _changes_nothing(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in CHANGES_NOTHING)


def _model_identity(base: Config) -> str:
    """Return a hash of the files of a model's folder; a hub id stands for itself."""
    source = find_model(base.policy.model, base.policy.base)
    load_model_config(source.model)  # a mistake is told now, not once by every run
    folders = [Path(source.model), *([source.adapter] if source.adapter is not None else [])]
    files = [
        file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())
        if file.suffix in MODEL_FILES
    ]  # fmt: skip
    return remembered_hash(files) if files else base.policy.model
