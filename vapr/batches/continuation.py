"""What a model has to say after a prompt, in token ids: the answer as it goes on from the prompt, and the end of turn.

An answer is never tokenised by itself. A tokenizer of SentencePiece's kind marks the first word of whatever it is
given: ``Yes`` alone is a bare mark and ``Yes``, after ``ASSISTANT:`` it is the one piece that the model emits.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers

from vapr.errors import UserError

Offsets = list[tuple[int, int]]

ANCHORS = ("\n", "0", "a", ".", "A", "-")
"""Texts to put before an answer that must not be tokenised as the beginning of a text; one that merges with the answer
will not do."""

PROBE = "A-probe-of-the-end-of-turn"


@dataclass(frozen=True, slots=True)
class EndOfTurn:
    """The end of an assistant's turn: what the template writes after the answer, and what the model says there."""

    template: str  # text after the answer
    dropped: int  # characters of trailing white space that the model does not say
    token_id: int | None  # the end-of-sequence token to append; None where the template writes one

    def of(self, text: str) -> str:
        """A rendered answer without the white space that the model does not say."""
        return text[: len(text) - self.dropped] if self.dropped and text.endswith(self.template) else text


def end_of_turn(rendered_probe: str, eos_token_ids: list[int], tokenizer: Any) -> EndOfTurn:
    """Read off a rendered conversation, whose last answer is ``PROBE``, how the template ends a turn.

    Args:
        rendered_probe: text of the conversation.
        eos_token_ids: tokens that end a sequence, the model's own choice first.
        tokenizer: theirs.

    Raises:
        UserError: if the template does not write answers, or the model has no token that ends a sequence.
    """
    _, found, after = rendered_probe.rpartition(PROBE)
    if not found:
        raise UserError("the chat template does not write what the assistant says")
    tokens = tokenizer.convert_ids_to_tokens(eos_token_ids)
    if None in tokens:
        unknown = eos_token_ids[tokens.index(None)]
        raise UserError(
            f"the tokenizer has no token {unknown}, an eos_token_id; its files are missing or another model's"
        )
    if any(token in after for token in tokens):
        return EndOfTurn(after, 0, None)
    if not eos_token_ids:
        raise UserError("neither generation_config.json, config.json nor the tokenizer names an eos_token")
    return EndOfTurn(after, len(after) - len(after.rstrip()), eos_token_ids[0])


def eos_tokens(model: str, config: transformers.PreTrainedConfig, tokenizer: Any) -> list[int]:
    """Ids of the tokens at which the model stops: of its generation config, else its config, and the tokenizer's."""
    try:
        generation = transformers.GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        generation = None
    listed = generation if generation is not None else getattr(config.get_text_config(), "eos_token_id", None)
    ids = [token for token in (listed if isinstance(listed, list) else [listed]) if token is not None]
    own = tokenizer.eos_token_id
    if own in ids:  # of several, the one that ends a turn
        ids = [own, *ids]
    elif own is not None:
        ids = [*ids, own]
    return list(dict.fromkeys(ids))


def continuation(
    tokenizer: Any, prompt_ids: np.ndarray, prompt: str, answer: str, *, add_special_tokens: bool
) -> tuple[list[int], Offsets]:
    """Ids of an answer that a prompt's ids go on with, and the characters of the answer that each stands for.

    They are those of the whole text, cut where the prompt ends. If a piece of the whole text spans the cut, the prompt
    keeps its ids, and the answer's are those of a text that goes on from something it does not merge with.

    Args:
        tokenizer: a fast tokenizer.
        prompt_ids: of ``prompt``, shape (tokens,).
        prompt, answer: texts that follow each other.
        add_special_tokens: as it was for the prompt.

    Raises:
        UserError: if no ids give the same text.
    """
    whole = tokenizer(prompt + answer, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    ids, start = whole["input_ids"], len(prompt_ids)
    if ids[:start] == prompt_ids.tolist():
        return ids[start:], _shifted(whole["offset_mapping"][start:], len(prompt))
    text = _decode(tokenizer, ids)
    for anchor in ANCHORS:
        alone = tokenizer(anchor, add_special_tokens=False)["input_ids"]
        both = tokenizer(anchor + answer, add_special_tokens=False, return_offsets_mapping=True)
        rest = both["input_ids"][len(alone) :]
        if both["input_ids"][: len(alone)] == alone and _decode(tokenizer, [*prompt_ids.tolist(), *rest]) == text:
            return rest, _shifted(both["offset_mapping"][len(alone) :], len(anchor))
    raise UserError(f"no tokens continue the prompt's with {answer[:20]!r}; end the prompt's text differently")


def _shifted(offsets: Offsets, start: int) -> Offsets:
    """Offsets counted from ``start``."""
    return [(max(first - start, 0), max(last - start, 0)) for first, last in offsets]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
