"""Every key of a study's config: frozen sections whose fields carry their own limits, as in :mod:`vapr.config`.

The strings below the fields are the documentation of the keys; the tables of docs/study.md are made from them.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from vapr.config import Config, Losses, Sources
from vapr.config_file import SECTION, ConfigFile, WholeNumber
from vapr.config_mistakes import check_columns
from vapr.errors import UserError
from vapr.evaluation.scoring.answers import Policy

AXES = ("data", "loss", "size", "seed")
"""What ``exclude`` can name."""


@dataclass(frozen=True, kw_only=True, config=SECTION)
class StudyConfig(ConfigFile):
    """One run for each combination of ``data``, ``losses``, ``sizes`` and ``seeds``. At least one of them is given."""

    OTHER_THING: ClassVar = (
        "{path}: {found}, but a study's config (YAML) is wanted here; docs/study.md shows one. A single run is "
        "vapr train, with {line}"
    )
    NOT_KEYS: ClassVar = {"only": "leave out what is not wanted with exclude: [{data: uniform, size: 250}]"}

    out: str = Field(min_length=1)
    """Folder of the study: subsets, runs, answers, page."""
    base: dict[str, Any]
    """Run config that all runs share, as a mapping or the path of its file. ``run_dir`` in it means nothing."""
    data: dict[str, Sources] | None = Field(default=None, min_length=1)
    """Sets of pairs by name, each as ``data.train`` of a run; null: the one of ``base``, called ``data``."""
    losses: dict[str, Losses] | None = Field(default=None, min_length=1)
    """Losses by name, each as ``loss`` of a run; ``{kind: sft}`` trains on the chosen answers alone. null: that of
    ``base``, called ``loss``."""
    sizes: list[WholeNumber] | None = Field(default=None, min_length=1)
    """Numbers of pairs. The subsets of a set are nested: the first pairs of one order that never changes. null: every
    set whole."""
    seeds: list[WholeNumber] | None = Field(default=None, min_length=1)
    """Seeds of the runs; null: that of ``base``."""
    equal: Literal["epochs", "steps"] = "epochs"
    """``epochs``: every run sees its data ``optim.epochs`` times, so more data means more steps; ``steps``: every run
    takes as many steps as the one with most data. ``optim.max_steps`` in ``base`` overrides both."""
    exclude: list[dict[str, Any]] = Field(default=[])
    """Combinations to leave out: ``{data: uniform, size: [250, 500]}`` leaves out those that match all of it."""
    bench: dict[str, str] = Field(default={})
    """Benchmarks by name, with the file or folder of their questions, as ``--bench`` of ``vapr eval``."""
    parsing: Policy = "strict"
    """How answers are read, as ``--policy`` of ``vapr eval``."""
    max_new_tokens: WholeNumber = Field(default=64, ge=1)
    """Longest answer to a question of ``bench``, in tokens."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if all(axis is None for axis in (self.data, self.losses, self.sizes, self.seeds)):
            raise ValueError("nothing varies; give at least one of data, losses, sizes, seeds")
        for key in ("sizes", "seeds"):
            values = getattr(self, key) or []
            for number, value in enumerate(values):
                if value in values[:number]:
                    raise ValueError(f"{key}: {value:,} is given twice")
                if value < (key == "sizes"):
                    raise ValueError(f"{key}: {value:,} is too small")
        for key in ("data", "losses"):
            for name in getattr(self, key) or ():
                if not re.fullmatch(r"[\w][\w.-]*", name):
                    raise ValueError(f"{key}: '{name}' becomes a folder's name; use letters, digits, '.', '-', '_'")
        for number, rule in enumerate(self.exclude):
            check_columns(rule, AXES, f"exclude.{number}")
        return self

    @classmethod
    def read(cls, path: Path) -> dict[str, Any]:
        """Read the mapping in a YAML file, and the base that it names, so that ``--set base.optim.lr=...`` works."""
        raw = super().read(path)
        if isinstance(raw.get("base"), str):
            raw["base"] = Config.read(Path(raw["base"]))
        return raw

    def base_config(self, **changes: Any) -> Config:
        """Return the base as a run's config, with some of its keys replaced.

        Raises:
            UserError: naming the key of the base that is wrong.
        """
        raw = {"run_dir": self.out, **self.base, **changes}
        data = raw.get("data", {})
        if not isinstance(data, dict):
            raise UserError(f"base.data: a mapping of keys to values is needed here, got {data!r:.40}")
        if "train" not in data:
            if self.data is None:
                raise UserError("base.data.train: there are no pairs; name them here, or sets of them in data")
            raw["data"] = {**data, "train": "named in the study's data"}
        return Config.parse(raw, where="base")
