"""How answers are generated."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

BATCH_SIZES = {"transformers": 16, "vllm": 256}
"""Questions that are answered at once unless told otherwise; vLLM fills its own batches out of them."""

MAY_CHANGE = ("batch_size",)
"""Settings that a resumed run may have differently: they change an answer only where two tokens are equally likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a model's answers depend on besides its weights. Temperature 0 is greedy."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    batch_size: int | None = None
    seed: int = 0

    def of(self, engine: Literal["transformers", "vllm"]) -> "Settings":
        """Return the settings with the engine's own batch size, if none is given."""
        return replace(self, batch_size=self.batch_size or BATCH_SIZES[engine])

    def as_dict(self) -> dict[str, Any]:
        """Return what is kept in evaluation.json."""
        return asdict(self)
