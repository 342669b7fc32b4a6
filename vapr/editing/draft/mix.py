"""The language models of a job, and which of them edits which answer."""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from vapr.editing.rules.turns import Turn
from vapr.errors import UserError
from vapr.llm.request import LanguageModel


class Mix:
    """One language model, or several that share the answers of a job.

    Args:
        models: each with its weight, above 0.
        seed: decides with an answer's own content who edits it, whatever else is in the job.

    Raises:
        UserError: if two of them have the same name.
    """

    def __init__(self, models: Sequence[tuple[LanguageModel, float]], seed: int = 0) -> None:
        self.models = [model for model, _ in models]
        self._weights = [weight for _, weight in models]
        self._ends = list(accumulate(self._weights))
        self._seed = seed
        names = [model.name for model in self.models]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"editors: two of them are the model {twice}; name each model once")

    def of(self, turn: Turn) -> LanguageModel:
        """Return the model that a turn is given to."""
        if len(self.models) == 1:
            return self.models[0]
        digest = hashlib.sha256(f"{self._seed}|editor|{turn.digest()}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "little") / 2**64 * self._ends[-1]
        return self.models[min(bisect_right(self._ends, drawn), len(self.models) - 1)]

    @property
    def num_gpus(self) -> int:
        """GPUs that this process keeps busy: its models share them."""
        return max(model.num_gpus for model in self.models)

    @property
    def identity(self) -> dict[str, Any]:
        """Who edits, as editor.json has it: name, revision and engine, and of several each with its weight."""
        first = self.models[0]
        if len(self.models) == 1:
            return {"name": first.name, "revision": first.revision, "engine": first.engine}
        each = {
            model.name: {"weight": weight, "revision": model.revision, "engine": model.engine}
            for model, weight in zip(self.models, self._weights, strict=True)
        }
        return {"name": " + ".join(each), "revision": None, "engine": None, "editors": each}


def identity_of(editor: Mapping[str, Any], name: str | None) -> Mapping[str, Any]:
    """Return who has made one pair: of several editors the one of that name.

    Args:
        editor: as editor.json has it.
        name: of the model that the pair's answer was given to.
    """
    several = editor.get("editors")
    return {**editor, "name": name, **several[name]} if several and name in several else editor
