"""The miniature's tokenizer: one token per word of the world's captions.

It is a `transformers` tokenizer, so the host's tokenizer class and open_clip both take it as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import world

START, END, UNKNOWN = "<start>", "<end>", "<unknown>"

WORDS: tuple[str, ...] = (
    UNKNOWN,
    "thing",
    "on",
    *world.TEXTURES,
    *world.COLOURS,
    *world.SHAPES,
    *world.PLACES,
    *world.GROUNDS,
    START,
    END,  # last: CLIP reads the text's embedding where the highest number is
)
"""Each word's place is its token."""


def build() -> Any:
    """Make the tokenizer: ``PreTrainedTokenizerFast``; ends are added, padding is with the end."""
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    numbers = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(WordLevel(numbers, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation("removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, numbers[START]), (END, numbers[END])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        model_max_length=77,
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path) -> None:
    """Write the tokenizer's files."""
    build().save_pretrained(folder)
