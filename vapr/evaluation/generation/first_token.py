"""Log-probs of "yes" and "no" where an answer begins. V = vocabulary, B = batch."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

SPELLINGS = {"yes": ("Yes", "yes", "YES"), "no": ("No", "no", "NO")}


def yes_no_tokens(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """Return the ids of tokens by which an answer begins with yes, and with no.

    These are the tokens that are the word, with or without a space before it. Where the tokenizer splits the word, it
    is the first piece.

    Returns:
        The two lists, None if one token begins both words.
    """
    yes, no = (_beginnings(tokenizer, word) for word in ("yes", "no"))
    return None if not yes or not no or set(yes) & set(no) else (yes, no)


def _beginnings(tokenizer: Any, word: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    whole, pieces = set(), set()
    for spelling in SPELLINGS[word]:
        whole |= {vocabulary[name] for mark in ("", "Ġ", "▁") if (name := mark + spelling) in vocabulary}
        for text in (spelling, f" {spelling}"):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if said := next((id for id in ids if str(tokenizer.decode([id])).strip()), None):
                pieces.add(said)
    return sorted(whole or pieces)


class FirstToken(transformers.LogitsProcessor):
    """Keeps what the model thinks of the first token that it generates, and changes nothing.

    Attributes:
        log_probs: log of the summed probability of each list of tokens, (B, lists) in fp32; None before generation.
    """

    def __init__(self, tokens: Sequence[Sequence[int]]) -> None:
        self._tokens = [torch.tensor(list(ids)) for ids in tokens]
        self.log_probs: Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return the scores (B, V) as they are."""
        if self.log_probs is None:
            logps = scores.float().log_softmax(-1)
            self.log_probs = torch.stack(
                [logps[:, ids.to(scores.device)].logsumexp(-1) for ids in self._tokens], dim=1
            ).cpu()
        return scores
