"""Label words of a causal model, and texts that continue others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class FirstTokens:
    """How a causal model's label words are told apart: by their first tokens, which the prompt's
    last token predicts. That is exact where no two words begin with the same token.

    Attributes:
        tokens: the first token of every word.
    """

    tokens: tuple[int, ...]
    tree: None = None

    @classmethod
    def of_words(cls, words: Sequence[str], tokenizer: Any) -> FirstTokens:
        """Raises InputError where two words begin with the same token."""
        gap, seen = word_gap(tokenizer), dict[int, str]()
        for word in words:
            first = tokenizer(gap + word, add_special_tokens=False).input_ids[0]
            if first in seen:
                raise InputError(
                    explain(
                        "label words",
                        expected="words that begin with different tokens, for --head words",
                        found=f"{seen[first]!r} and {word!r}",
                        todo="Rename one of the labels, or use a pooled head (--head probe).",
                    )
                )
            seen[first] = word
        return cls(tuple(seen))

    def loss(self, logits: Tensor, words: Tensor) -> Tensor:
        """Mean cross-entropy over the words, of logits `[B, 1, words]` and numbers of words."""
        return functional.cross_entropy(logits[:, 0], words.to(logits.device))

    def amount(self, words: Tensor) -> int:
        """What `loss` is the mean over: examples."""
        return len(words)

    def score(self, logits: Tensor) -> Tensor:
        """Log-probability of every word, `[B, words]`, of logits `[B, 1, words]`."""
        return logits[:, 0].log_softmax(-1)


def word_gap(tokenizer: Any) -> str:
    """What makes a text that is tokenised alone the continuation of another: a blank, unless the
    tokenizer puts one in front of every text by itself."""
    alone = tokenizer("a", add_special_tokens=False).input_ids
    twice = tokenizer("a a", add_special_tokens=False).input_ids
    return "" if twice[-len(alone) :] == alone else " "
