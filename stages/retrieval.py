"""Texts and images that are told to belong together: the loss, and how well they are found."""

from __future__ import annotations

import numpy as np
import torch
from sherl_pipe.cache import LabelTable
from sherl_pipe.stages.shelf import Ints
from torch import Tensor
from torch.nn import functional as F

WAYS, AT = ("t2i", "i2t"), (1, 5, 10)
# Names of metrics: from texts to images and back, the share found among the first 1, 5 and 10.
RECALLS = tuple(f"{way}_r{at}" for way in WAYS for at in AT)
# Queries that are compared with everything at once.
_CHUNK = 1024


class Pairing:
    """The pairs of a label table, by row.

    Args:
        table: of a retrieval task.

    Attributes:
        texts, images: `[N]`, for every row the numbers of its text and of its image.
    """

    def __init__(self, table: LabelTable) -> None:
        numbers = {each: number for number, each in enumerate(dict.fromkeys(table.ids))}
        self.texts: Ints = np.array([numbers[each] for each in table.ids], np.int64)
        self.images: Ints = np.array(table.labels, np.int64)
        self._many = len(table.images)
        self._known = np.unique(self.texts * self._many + self.images)

    def others(self, rows: Ints) -> Tensor:
        """`[B, B]`, True where the text of row i and the image of row j are a pair, other than row
        i itself: these are no negatives of each other."""
        codes = self.texts[rows][:, None] * self._many + self.images[rows]
        found = np.isin(codes, self._known)
        np.fill_diagonal(found, False)
        return torch.from_numpy(found)

    def recalls(self, outputs: Tensor) -> dict[str, float]:
        """Recall among the first K, in percent, both ways (see `recall`).

        Args:
            outputs: `[N, 2 E]`, by row the unit embeddings of its text and of its image.
        """
        texts, images = outputs.float().chunk(2, dim=1)
        _, text_first, text = np.unique(self.texts, return_index=True, return_inverse=True)
        _, image_first, image = np.unique(self.images, return_index=True, return_inverse=True)
        texts, images = texts[torch.from_numpy(text_first)], images[torch.from_numpy(image_first)]
        ranks = {
            "t2i": first_ranks(texts, images, text, image),
            "i2t": first_ranks(images, texts, image, text),
        }
        return {f"{way}_r{at}": recall(ranks[way], at) for way in WAYS for at in AT}


def recall(ranks: Ints, at: int) -> float:
    """Share of the queries whose rank is below `at`, in percent."""
    return 100 * float((ranks < at).mean())


def first_ranks(queries: Tensor, targets: Tensor, query: Ints, target: Ints) -> Ints:
    """For every query how many wrong targets are at least as near as its nearest right one, `[Q]`.

    A tie counts against it, so that embeddings which are all the same find nothing.

    Args:
        queries, targets: `[Q, E]` and `[T, E]`.
        query, target: `[N]`, the right pairs by number; every query has one.
    """
    ranks = []
    for start in range(0, len(queries), _CHUNK):
        near = queries[start : start + _CHUNK] @ targets.T
        right = torch.zeros(near.shape, dtype=torch.bool)
        own = (query >= start) & (query < start + _CHUNK)
        right[torch.from_numpy(query[own] - start), torch.from_numpy(target[own])] = True
        best = near.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        ranks.append(((near >= best) & ~right).sum(1).numpy())
    return np.concatenate(ranks)


def contrastive(texts: Tensor, images: Tensor, scale: Tensor | float, others: Tensor) -> Tensor:
    """Cross-entropy of a batch of pairs over its images for each text and over its texts for each
    image, the mean of both (Radford et al., ICML 2021; Luo et al., CLIP4Clip, 2022).

    Args:
        texts, images: `[B, E]` unit vectors.
        scale: of their cosines.
        others: `[B, B]`, what is left out, as `Pairing.others` gives it.
    """
    logits = (scale * texts @ images.T).masked_fill(others.to(texts.device), -torch.inf)
    right = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
