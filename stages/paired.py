"""Packed batches of cached pairs: texts and images lie in streams of their own, with shards of
their own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

import torch
from sherl_pipe.cache import FeatureCache, LabelTable
from sherl_pipe.stages.features import Batch, FeatureSource, Ints, Reading


class PairSource:
    """Features of the rows of a retrieval task's label table: of each its text and its image.

    Arguments and errors are those of `FeatureSource`. Batches are in an order that suits the
    images, which take more room; where features are streamed, texts are read from all the shards
    that a batch needs.

    Attributes:
        sources: those of images and of texts.
    """

    def __init__(
        self,
        cache: FeatureCache,
        table: LabelTable,
        readings: Mapping[str, Reading],
        *,
        budget: int,
        device: torch.device,
        residency: str = "auto",
        readers: int | None = None,
        beside: Sequence[FeatureSource] = (),
        shared: bool = False,
    ) -> None:
        self.readings = dict(readings)
        self.sources: list[FeatureSource] = []
        for stream, ids in (("image", table.image_ids), ("text", table.ids)):
            part = FeatureSource(
                cache,
                replace(table, ids=ids),
                {role: each for role, each in readings.items() if each.stream == stream},
                budget=budget,
                device=device,
                residency=residency,
                readers=readers,
                beside=[*beside, *self.sources],
                shared=shared,
            )
            self.sources.append(part)

    @property
    def summary(self) -> str:
        """For people: how big the features are, where they live, and who reads them."""
        images, texts = (part.summary for part in self.sources)
        return f"images: {images}; texts: {texts}"

    def claim(self) -> None:
        """As `FeatureSource.claim`."""
        for part in self.sources:
            part.claim()

    def part(self, rows: Ints, rank: int, size: int) -> Ints:
        """As `FeatureSource.part`, by the images."""
        return self.sources[0].part(rows, rank, size)

    def preload(self) -> None:
        """As `FeatureSource.preload`."""
        for part in self.sources:
            part.preload()

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[Ints]:
        """The batches of an epoch, as `FeatureSource.epoch` makes them of the images."""
        return self.sources[0].epoch(seed, epoch, batch_size)

    def in_order(self, batch_size: int) -> list[Ints]:
        """All rows once, as `FeatureSource.in_order` orders them by their images."""
        return self.sources[0].in_order(batch_size)

    def read(
        self, batches: Sequence[Ints], progress: Callable[[int, int], None] | None = None
    ) -> Generator[Batch, None, None]:
        """Batches with their features, as `FeatureSource.read`."""
        first, second = (part.read(batches, progress) for part in self.sources)
        with closing(first), closing(second):
            for images, texts in zip(first, second, strict=True):
                yield replace(images, streams={**images.streams, **texts.streams})


AnySource = FeatureSource | PairSource
