"""How answers are generated."""

from dataclasses import asdict, dataclass
from typing import Any

MAY_CHANGE = ("batch_size",)
"""Settings that a resumed run may have differently: they change an answer only where two tokens are equally likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a model's answers depend on beside its weights. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int = 16
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return what is kept in evaluation.json."""
        return asdict(self)
