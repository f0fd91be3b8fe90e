"""Label words as a prefix tree: what a text-to-text backbone is scored on.

Every distinct prefix of the label words is one node, so shared prefixes are computed and stored
once, and no example's own label enters the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sherl_pipe.cache import InputError
from sherl_pipe.cache.fingerprint import hash_json
from torch import Tensor


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
    def flat_nodes(self) -> list[int]:
        """Node numbers of the paths to all leaves, one after another."""
        ends = {path[-1]: path for path in self.paths}
        inner = {node for path in self.paths for node in path[:-1]}
        return [node for end, path in ends.items() if end not in inner for node in path]

    def flat_tokens(self) -> Tensor:
        """Decoder input ids `[P]` of the paths to all leaves."""
        return torch.tensor([self.nodes[node][-1] for node in self.flat_nodes])

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
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]

    def first_places(self) -> Tensor:
        """For every node, its first place among the flat paths, `[nodes]`."""
        return torch.tensor([self.flat_nodes.index(node) for node in range(len(self.nodes))])

    def score(self, logits: Tensor) -> Tensor:
        """Log-probability of every word, `[B, words]`, of `logits [B, nodes, vocabulary]`.

        Exact: the end token counts, so words of different lengths compete fairly.
        """
        norms = logits.logsumexp(-1)
        scores = [
            (logits[:, path, list(word)] - norms[:, path]).sum(-1)
            for path, word in zip(self.paths, self.words, strict=True)
        ]
        return torch.stack(scores, dim=1)
