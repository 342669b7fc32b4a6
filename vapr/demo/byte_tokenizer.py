"""A byte-level BPE tokenizer trained on a few lines, with a family's special tokens."""

from collections.abc import Iterable
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers


def byte_level_tokenizer(
    corpus: Iterable[str], vocab_size: int, special: Iterable[str], *, begins_with: str | None = None, **options: Any
) -> transformers.PreTrainedTokenizerFast:
    """Train a tokenizer.

    Args:
        corpus: lines of text.
        vocab_size: special tokens and all bytes included.
        special: special tokens, which take the first ids.
        begins_with: the special token that is put before every text, if one is.
        options: of the class of transformers, such as ``eos_token``.
    """
    special = list(special)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if begins_with is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begins_with} $A", special_tokens=[(begins_with, special.index(begins_with))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **options)
