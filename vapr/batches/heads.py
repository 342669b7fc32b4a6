"""What a chat template writes before an answer: where the model is asked, and in a conversation that has the answer."""

from collections.abc import Callable
from dataclasses import dataclass

from vapr.batches.continuation import PROBE
from vapr.data.pair import Message

PROBED: list[Message] = [
    {"role": role, "content": [{"type": "text", "text": text}]}
    for role, text in (("user", "What is it?"), ("assistant", PROBE))
]
"""A conversation in which :data:`PROBE` shows what stands around an answer."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Both, if they differ in white space, as LLaVA-OneVision's do; else empty."""

    asked: str = ""
    answered: str = ""

    @property
    def differ(self) -> bool:
        return self.asked != self.answered

    def as_asked(self, conversation: str, prompt: str) -> str:
        """A rendered conversation whose first answer after ``prompt`` follows what the model is asked with."""
        before = prompt.removesuffix(self.asked)
        if conversation.startswith(prompt) or not conversation.startswith(before + self.answered):
            return conversation
        return prompt + conversation[len(before) + len(self.answered) :]


def read_heads(render: Callable[..., str]) -> Heads:
    """Read them off what ``render(messages, add_generation_prompt=...)`` makes of :data:`PROBED`."""
    texts = render(PROBED[:1], add_generation_prompt=True), render(PROBED, add_generation_prompt=False)
    question = len(render(PROBED[:1], add_generation_prompt=False))  # characters
    asked, answered = texts[0][question:], texts[1][question : texts[1].rfind(PROBE)]
    goes_on = answered.startswith(asked)
    return Heads() if goes_on or asked.split() != answered.split() else Heads(asked, answered)
