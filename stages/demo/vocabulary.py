"""The demo's tokenizer: a unigram model over whole words, with single characters to fall back on.

The grammar has a few hundred words, so each gets a piece of its own, scored by its frequency in
the text.  What the text lacks is spelled with characters, which keeps foreign sentences free of
``<unk>`` as long as they are written in plain letters, digits and common marks.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Iterable

from sherl_pipe.stages.demo.lexicon import TASKS
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SENTINELS = tuple(f"<extra_id_{index}>" for index in range(16))
# Prefixes such as "topic sentence: " and label words are vocabulary whatever the text holds.
PREFIX_WORDS = (*TASKS, "sentence")
_SPACE = "\u2581"
_MARKS = ".,:;!?'\"()-"
# A number falls into its digits, so that "2.5" is written with the pieces of "2", "." and "5".
_SPLIT = Regex(rf"{_SPACE}?[0-9]|[{re.escape(_MARKS)}]")
_CHARACTER_SCORE = -20.0
_MODEL_LENGTH = 512


def build_tokenizer(lines: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with the words of ``lines``, T5's special tokens and a closing ``</s>``."""
    special = (PAD, END, UNKNOWN, *SENTINELS)
    pieces = [(token, 0.0) for token in special]
    pieces += _scored_words(lines)
    known = {piece for piece, _ in pieces}
    characters = [_SPACE, *string.ascii_lowercase, *string.digits, *_MARKS]
    pieces += [(item, _CHARACTER_SCORE) for item in characters if item not in known]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index(UNKNOWN)))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(_SPLIT, behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, special.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=list(SENTINELS),
        model_max_length=_MODEL_LENGTH,
    )


def _scored_words(lines: Iterable[str]) -> list[tuple[str, float]]:
    """Words with the logarithms of their shares, most frequent first, ties by spelling."""
    counts = Counter(word for line in lines for word in re.findall(r"[a-z]+", line.lower()))
    for word in PREFIX_WORDS:
        counts[word] += 1
    total = sum(counts.values())
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    scored = [(_SPACE + word, math.log(count / total)) for word, count in ranked]
    # A digit in front of a word counts as one piece, so that the label "1" is one token.
    return scored + [(_SPACE + digit, math.log(1 / total)) for digit in string.digits]


def whole_words(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, int]]:
    """The alphabetic words of the vocabulary with their ids, in the order of the ids."""
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [
        (piece[1:], index)
        for piece, index in ranked
        if piece.startswith(_SPACE) and piece[1:].isalpha()
    ]
