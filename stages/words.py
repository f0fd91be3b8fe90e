"""Label words as a prefix tree: what a text-to-text backbone is scored on.

Every distinct prefix of the label words is one node, so shared prefixes are computed and stored
once, and no example's own label enters the features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import hash_json
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class PrefixTree:
    """Token sequences of the label words and the prefixes that lead to them.

    Attributes:
        start: the decoder's start token.
        words: token ids of every word, the end token included.
    """

    start: int
    words: tuple[tuple[int, ...], ...]

    @classmethod
    def of_words(cls, words: Sequence[str], tokenizer: Any, start: int) -> PrefixTree:
        """The tree of `words`. Raises InputError where two words have the same tokens."""
        tokens = tuple(tuple(tokenizer(text=word).input_ids) for word in words)
        seen: dict[tuple[int, ...], str] = {}
        for word, ids in zip(words, tokens, strict=True):
            if ids in seen:
                raise InputError(
                    f"label words {seen[ids]!r} and {word!r} are the same to the tokenizer. "
                    "Rename one of the labels."
                )
            seen[ids] = word
        return cls(start, tokens)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PrefixTree:
        return cls(int(data["start"]), tuple(tuple(word) for word in data["words"]))

    def to_json(self) -> dict[str, Any]:
        return {"start": self.start, "words": [list(word) for word in self.words]}

    @cached_property
    def key(self) -> str:
        """Names the tree by its nodes: tasks with the same words share features."""
        return hash_json([list(node) for node in self.nodes])[:8]

    @property
    def stream(self) -> str:
        """The cache stream that holds the decoder states of this tree."""
        return f"decoder-{self.key}"

    @cached_property
    def nodes(self) -> list[tuple[int, ...]]:
        """Distinct decoder inputs, shortest first: the start token, then what words share."""
        found = {(self.start, *word[:end]) for word in self.words for end in range(len(word))}
        return sorted(found, key=lambda node: (len(node), node))

    @cached_property
    def paths(self) -> list[list[int]]:
        """Per word, the nodes at which its tokens are predicted, in order."""
        place = {node: number for number, node in enumerate(self.nodes)}
        return [
            [place[(self.start, *word[:end])] for end in range(len(word))] for word in self.words
        ]

    @cached_property
    def children(self) -> list[list[int]]:
        """Per node, the tokens that follow it in some word."""
        found: list[set[int]] = [set() for _ in self.nodes]
        for path, word in zip(self.paths, self.words, strict=True):
            for node, token in zip(path, word, strict=True):
                found[node].add(token)
        return [sorted(tokens) for tokens in found]

    @cached_property
    def ancestry(self) -> Tensor:
        """Boolean `[nodes, nodes]`: whether a node (row) has another, or itself, on its path."""
        nodes = self.nodes
        return torch.tensor([[node[: len(each)] == each for each in nodes] for node in nodes])

    @cached_property
    def flat_nodes(self) -> list[int]:
        """Node numbers of the paths to all leaves, one after another."""
        ends = {path[-1]: path for path in self.paths}
        inner = {node for path in self.paths for node in path[:-1]}
        return [node for end, path in ends.items() if end not in inner for node in path]

    def flat_tokens(self) -> Tensor:
        """Decoder input ids `[P]` of the paths to all leaves."""
        return torch.tensor([self.nodes[node][-1] for node in self.flat_nodes])

    def flat_places(self) -> Tensor:
        """How deep each of the flat tokens stands in its path, `[P]`."""
        return torch.tensor([len(self.nodes[node]) - 1 for node in self.flat_nodes])

    def flat_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask `[1, 1, P, P]`: every path sees itself, causally, and no other path.

        Relative positions inside a path are those of the path alone, so one decoder pass over
        the paths side by side equals one pass for each, and the cross-attention to the encoder
        is computed once.
        """
        path_of, number = [], -1
        for node in self.flat_nodes:
            number += node == 0
            path_of.append(number)
        paths = torch.tensor(path_of)
        size = len(path_of)
        seen = (paths[:, None] == paths[None, :]) & torch.ones(size, size, dtype=torch.bool).tril()
        mask = torch.zeros(size, size, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        return mask[None, None]

    def first_places(self) -> Tensor:
        """For every node, its first place among the flat paths, `[nodes]`."""
        return torch.tensor([self.flat_nodes.index(node) for node in range(len(self.nodes))])


LOSSES = ("words", "vocabulary")


@dataclass(frozen=True)
class Scoring:
    """How a tree's words are told apart, in training and in evaluation.

    With `vocabulary` every token of a word competes with the whole vocabulary, the end token
    included: the model's own likelihood of the word, as the papers train it. With `words` a token
    competes only with the tokens that other words have at its place, so places that every word
    agrees on are left out, and of the head only the rows of those tokens are computed.

    Attributes:
        tree: the words, for `words` cut behind the last place at which they part.
        nodes: for every node of `tree`, its number in the tree whose states are cached.
        tokens: the part of the vocabulary that is computed, None for all of it.
    """

    tree: PrefixTree
    nodes: tuple[int, ...]
    tokens: tuple[int, ...] | None

    @classmethod
    def of(cls, tree: PrefixTree, loss: str) -> Scoring:
        """Raises InputError for an unknown loss."""
        if loss not in LOSSES:
            raise InputError(explain("loss", expected=f"one of {LOSSES}", found=loss))
        if loss == "vocabulary":
            return cls(tree, tuple(range(len(tree.nodes))), None)
        after = tree.children
        cut = []
        for word, path in zip(tree.words, tree.paths, strict=True):
            ends = [end + 1 for end, node in enumerate(path) if len(after[node]) > 1]
            cut.append(word[: max(ends, default=1)])
        short = PrefixTree(tree.start, tuple(cut))
        place = {node: number for number, node in enumerate(tree.nodes)}
        tokens = sorted({token for tokens in short.children for token in tokens})
        return cls(short, tuple(place[node] for node in short.nodes), tuple(tokens))

    @cached_property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """Per word, the cached nodes at which its tokens are predicted, in order."""
        return tuple(tuple(self.nodes[node] for node in path) for path in self.tree.paths)

    def loss(self, logits: Tensor, words: Tensor) -> Tensor:
        """Mean loss of a batch: over its tokens for `vocabulary` (as Hugging Face's models have
        it), over its examples for `words`.

        Args:
            logits: `[B, P, V]` along the path of each example's own word, V being `tokens`.
            words: `[B]`, the words' numbers.
        """
        targets, nodes = (table[words, : logits.shape[1]] for table in self._tables)
        if self.tokens is None:
            return functional.cross_entropy(
                logits.flatten(0, 1), targets.to(logits.device).flatten()
            )
        logits = logits + self._rivals.to(logits)[nodes.to(logits.device)]
        targets = targets.to(logits.device)
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return total / len(words)

    def amount(self, words: Tensor) -> int:
        """What `loss` is the mean over: tokens of `words [B]`, or examples."""
        if self.tokens is not None:
            return len(words)
        return int((self._tables[0][words] >= 0).sum())

    def score(self, logits: Tensor) -> Tensor:
        """Log-probability of every word, `[B, words]`, of `logits [B, nodes, V]`.

        Exact for `vocabulary`: the end token counts, so words of different lengths compete
        fairly. For `words` the probabilities of all words add up to one.
        """
        if self.tokens is not None:
            logits = logits + self._rivals.to(logits)
        norms = logits.logsumexp(-1)
        scores = [
            (logits[:, path, self._places(word)] - norms[:, path]).sum(-1)
            for path, word in zip(self.tree.paths, self.tree.words, strict=True)
        ]
        return torch.stack(scores, dim=1)

    def pick(self, logits: Tensor) -> Tensor:
        """`[..., V]` of the logits of the whole vocabulary."""
        return logits if self.tokens is None else logits[..., list(self.tokens)]

    def _places(self, word: Sequence[int]) -> list[int]:
        """Where a word's tokens stand in V."""
        return list(word) if self.tokens is None else [self.tokens.index(t) for t in word]

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """Targets (-100 behind a word's end) and nodes of every word's path, `[words, P]`."""
        longest = max(map(len, self.tree.words))
        targets = torch.full((len(self.tree.words), longest), -100)
        nodes = torch.zeros(targets.shape, dtype=torch.long)
        for row, (path, word) in enumerate(zip(self.tree.paths, self.tree.words, strict=True)):
            targets[row, : len(word)] = torch.tensor(self._places(word))
            nodes[row, : len(word)] = torch.tensor(path)
        return targets, nodes

    @cached_property
    def _rivals(self) -> Tensor:
        """`[nodes, V]`, zero for the tokens that follow a node and minus infinity for others."""
        mask = torch.full((len(self.tree.nodes), len(self.tokens or ())), -torch.inf)
        for node, tokens in enumerate(self.tree.children):
            mask[node, self._places(tokens)] = 0
        return mask


class WordHead(nn.Module):
    """Some rows of an output head, where the others were not loaded.

    Args:
        weight: `[tokens, d]`.
        tokens: their numbers in the vocabulary.
    """

    def __init__(self, weight: Tensor, tokens: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self._places = {token: place for place, token in enumerate(tokens)}

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """`[len(tokens), d]`. Raises KeyError for a token that was not loaded."""
        return self.weight[[self._places[token] for token in tokens]]

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises RuntimeError: logits of the whole vocabulary need the whole head."""
        raise RuntimeError(f"of the head only {len(self._places)} rows were loaded")


def word_logits(head: Any, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
    """What an output head gives `[..., d]`: `[..., V]`, V being the vocabulary, or `tokens` of it.

    Of a `WordHead` tokens have to be given.
    """
    if tokens is None:
        whole: Tensor = head(hidden)
        return whole
    if isinstance(head, WordHead):
        return functional.linear(hidden, head.rows(tokens))
    places = list(tokens)
    bias = None if head.bias is None else head.bias[places]
    return functional.linear(hidden, head.weight[places], bias)


def tokens_of(words: Iterable[str], tokenizer: Any) -> list[int]:
    """Every token that label words are made of, the end token included."""
    return sorted({token for word in set(words) for token in tokenizer(text=word).input_ids})
