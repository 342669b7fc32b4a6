"""Which model judges, and how it is asked."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator
from pydantic.dataclasses import dataclass

from vapr.config_file import SECTION, ConfigFile, Number, WholeNumber
from vapr.errors import UserError
from vapr.llm.request import check_extra_body

SEED, TEMPERATURE = 0, 0.0


@dataclass(frozen=True, kw_only=True, config=SECTION)
class JudgeConfig(ConfigFile):
    """A judge behind an OpenAI-compatible server, asked with temperature 0."""

    OTHER_THING: ClassVar = (
        "{path}: {found}, but a judge is wanted here: http://HOST:PORT/v1, or a YAML file with url and model"
    )

    url: str
    """Address of the server, with or without ``/v1``."""
    model: str | None = Field(default=None, min_length=1)
    """The model's name at the server; null: the only one that it lists."""
    max_tokens: WholeNumber = Field(default=2048, ge=16)
    """Tokens of a review, reasoning included."""
    concurrency: WholeNumber = Field(default=16, ge=1, le=1000)
    """Most requests in flight; half as many whenever the server refuses some or is slow, and slowly more again."""
    timeout_seconds: Number = Field(default=300.0, gt=0)
    """Longest wait for a review, the server's queue included."""
    tries: WholeNumber = Field(default=6, ge=1)
    """How often a request is sent before its review has failed."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    omit: list[Literal["seed", "max_tokens", "temperature"]] = Field(default=[])
    """Parameters that are not sent, for a server that refuses them."""
    max_tokens_as: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """The name under which ``max_tokens`` is sent; newer models of OpenAI take only the second."""
    extra_body: dict[str, Any] | None = None
    """More keys of every request, as the server knows them: {chat_template_kwargs: {enable_thinking: false}}."""

    @field_validator("extra_body")
    @classmethod
    def _leave_ours_alone(cls, body: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_extra_body(body, "judge")

    @property
    def settings(self) -> dict[str, Any]:
        """Return what is sent besides model and prompt: reviews under other settings are other reviews."""
        sampling = {"seed": SEED, "temperature": TEMPERATURE, "max_tokens": self.max_tokens}
        return {key: value for key, value in sampling.items() if key not in self.omit} | (self.extra_body or {})

    @classmethod
    def of(cls, judge: str, model: str | None = None) -> Self:
        """Return the judge at an address, or of a YAML file; ``model`` goes before the file's.

        Raises:
            UserError: for a file that holds no judge.
        """
        named = {} if model is None else {"model": model}
        if judge.startswith(("http://", "https://")):
            return cls.parse({"url": judge, **named}, where="--judge")
        if not judge.endswith((".yaml", ".yml")):
            raise UserError(f"--judge {judge}: give http://HOST:PORT/v1, or a YAML file with url and model")
        return cls.parse(cls.read(Path(judge)) | named, where=judge)
