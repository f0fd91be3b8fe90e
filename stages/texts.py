"""Free-text targets as tokens: what a backbone that generates learns to say, one text a row.

A target is cached teacher-forced: states where it has read the tokens before, none of which it has
to predict itself. An example that stands in several rows has all their targets, one behind another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sherl_pipe.cache import InputError, LabelTable
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from sherl_pipe.stages.first_tokens import word_gap
from torch import Tensor
from torch.nn import functional

IGNORED = -100  # what Hugging Face's losses leave out
# Logits of so many tokens are there at once in an evaluation.
CHUNK = 512


@dataclass(frozen=True)
class TargetTexts:
    """The targets of one label table.

    Attributes:
        start: the decoder's start token; None for a causal model, where the prompt stands there.
        pairs: id of the example and target, of every row of the table.
        tokens: token ids of every target, the end token included.
        truncated: rows whose target was cut.
    """

    start: int | None
    pairs: tuple[tuple[bytes, str], ...]
    tokens: Mapping[str, tuple[int, ...]]
    truncated: int

    @classmethod
    def of_table(
        cls, table: LabelTable, tokenizer: Any, start: int | None, max_length: int
    ) -> TargetTexts:
        """The targets of a table, cut at `max_length` tokens.

        Raises InputError for a target without a token.
        """
        texts = [str(label) for label in table.labels]
        distinct = list(dict.fromkeys(texts))
        tokens, cut = tokens_of_targets(tokenizer, distinct, max_length, causal=start is None)
        found = dict(zip(distinct, tokens, strict=True))
        for number, text in enumerate(texts):
            if len(found[text]) < 2:
                raise InputError(
                    explain(
                        f"{table.task}/{table.role}, row {number + 1}: target",
                        expected="a text with a token of its own beside the end token",
                        found=repr(text),
                        todo="Correct or remove the row, or raise --max-length.",
                    )
                )
        pairs = tuple(zip(table.ids, texts, strict=True))
        return cls(start, pairs, found, sum(text in cut for text in texts))

    @cached_property
    def by_example(self) -> dict[bytes, list[tuple[int, ...]]]:
        """The distinct targets of every example, in an order that rows have no part in."""
        found: dict[bytes, set[tuple[int, ...]]] = {}
        for identity, text in self.pairs:
            found.setdefault(identity, set()).add(self.tokens[text])
        return {identity: sorted(targets) for identity, targets in found.items()}

    @cached_property
    def key(self) -> str:
        """Names the targets: other targets have other features."""
        every = [[each.hex(), targets] for each, targets in sorted(self.by_example.items())]
        return hash_json([self.start, every])[:8]

    @property
    def stream(self) -> str:
        """The cache stream that holds the states of these targets."""
        return f"{'hidden' if self.start is None else 'decoder'}-{self.key}"

    @property
    def inputs_less(self) -> int:
        """Tokens of a target that are no row: a causal model predicts the first from its prompt."""
        return 1 if self.start is None else 0

    def of(self, identity: bytes) -> list[tuple[int, ...]]:
        """The targets of an example; one without any has the row of a target that says nothing."""
        return self.by_example.get(identity, [(0,) * (1 + self.inputs_less)])

    def inputs(self, target: tuple[int, ...]) -> tuple[int, ...]:
        """What is read when a target is predicted, behind the prompt of a causal model."""
        return target[:-1] if self.start is None else (self.start, *target[:-1])

    def rows(self, identity: bytes) -> int:
        """Rows of an example in the stream."""
        return sum(len(target) - self.inputs_less for target in self.of(identity))

    def path(self, identity: bytes, text: str) -> tuple[int, ...]:
        """The rows of an example that belong to one of its targets."""
        first, wanted = 0, self.tokens[text]
        for target in self.by_example[identity]:
            size = len(target) - self.inputs_less
            if target == wanted:
                return tuple(range(first, first + size))
            first += size
        raise KeyError(text)


def tokens_of_targets(
    tokenizer: Any, texts: Sequence[str], max_length: int, *, causal: bool
) -> tuple[list[tuple[int, ...]], set[str]]:
    """Token ids of targets, the end token included, and the texts that were cut.

    A text-to-text model's tokenizer puts its own special tokens around a target. A causal model
    reads the target behind its prompt: no token stands in front of it, and the end token behind.

    Raises InputError for a causal model's tokenizer that has no end token.
    """
    if not causal:
        encoded = tokenizer(text_target=list(texts), truncation=True, max_length=max_length)
        over = [bool(each.overflowing) for each in encoded.encodings or ()]
        cut = {text for text, long in zip(texts, over, strict=False) if long}
        return [tuple(ids) for ids in encoded.input_ids], cut
    end = tokenizer.eos_token_id
    if end is None:
        raise InputError(
            explain("tokenizer", expected="one with an end token", found="none", todo="Set one.")
        )
    gap = word_gap(tokenizer)
    encoded = tokenizer([gap + text for text in texts], add_special_tokens=False)
    found, cut = [], set()
    for text, ids in zip(texts, encoded.input_ids, strict=True):
        found.append((*ids[: max_length - 1], end))
        if len(ids) > max_length - 1:
            cut.add(text)
    return found, cut


def padded(targets: Sequence[tuple[int, ...]]) -> Tensor:
    """Targets `[B, P]`, IGNORED behind the end of each."""
    rows = [torch.tensor(target) for target in targets]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens of a batch, as Hugging Face's models have it, of logits
    `[n, V]` and tokens `[n]`."""
    return functional.cross_entropy(logits, tokens)


def judged(logits_of: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor) -> Tensor:
    """What `text_metrics` takes of a batch, `[B, 3]`.

    Args:
        logits_of: from states `[n, d]` to logits `[n, V]`.
        states: `[B, P, d]` that predict the targets.
        targets: `[B, P]`, IGNORED where there is none.
    """
    inside = targets != IGNORED
    found = []
    # Of a large vocabulary not all logits at once.
    for some, wanted in zip(states[inside].split(CHUNK), targets[inside].split(CHUNK), strict=True):
        logits = logits_of(some).float()
        losses = functional.cross_entropy(logits, wanted, reduction="none")
        found.append(torch.stack([losses, (logits.argmax(-1) == wanted).to(losses)], dim=1))
    each = torch.zeros(*targets.shape, 2, device=states.device)
    each[inside] = torch.cat(found)
    return torch.cat([each.sum(1), inside.sum(1, keepdim=True).to(each)], dim=1)


def text_metrics(outputs: Tensor) -> dict[str, float]:
    """Metrics of teacher-forced targets.

    `exact_match` is the share of targets that greedy decoding gives: it does where every token is
    the likeliest behind those before it, and nowhere else. `token_accuracy` is the share of tokens
    that are. Both in percent. `perplexity` is e to the mean cross-entropy of a token.

    Args:
        outputs: `[N, 3]`: of every row minus the log-probability of its target, how many of its
            tokens are the likeliest, and how many there are.
    """
    losses, right, count = outputs.double().unbind(1)
    return {
        "exact_match": 100 * float((right == count).double().mean()),
        "token_accuracy": 100 * float(right.sum() / count.sum()),
        "perplexity": float((losses.sum() / count.sum()).exp()),
    }
