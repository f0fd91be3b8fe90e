"""Forward passes over free-text targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import Stream, StreamSpec
from sherl_pipe.cache.layout import Layout
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.passes import (
    CachedTop,
    DecoderPass,
    States,
    batches_of,
    batches_with_tops,
    side_by_side,
)
from sherl_pipe.stages.surgery import TapRecorder, cut_after
from sherl_pipe.stages.texts import TargetTexts
from torch import Tensor


class TargetsPass:
    """The decoder over the targets of every example, fed by the cached encoder."""

    def __init__(
        self,
        backbone: Backbone,
        spec: StreamSpec,
        encoder: Stream,
        texts: TargetTexts,
        batch: int,
    ) -> None:
        self._decoder = DecoderPass(backbone, spec.taps)
        self._encoder, self._texts, self._batch = encoder, texts, batch
        self._device = backbone.device
        self._targets = [texts.of(row.tobytes()) for row in encoder.ids]
        self._longest = max((len(t) for each in self._targets for t in each), default=0)

    def states(self, shards: Sequence[int], layout: Layout) -> States:
        """`[K, n, d]` of the rows of shards: all targets of one example, then of the next."""
        batches = batches_with_tops(
            self._encoder, shards, layout, self._longest, self._batch, self._device
        )
        return side_by_side(self._of, batches, self._device)

    def _of(self, job: tuple[CachedTop, npt.NDArray[np.int64]]) -> Tensor:
        top, examples = job[0], job[1].tolist()
        memory = top.states(examples)
        # An example's memory stands once for each of its targets.
        owners = [place for place, each in enumerate(examples) for _ in self._targets[each]]
        sizes = memory.lengths.cpu().numpy()
        starts = np.cumsum(sizes) - sizes
        rows = np.concatenate([np.arange(starts[o], starts[o] + sizes[o]) for o in owners])
        states = memory.states[:, torch.from_numpy(rows).to(self._device)]
        encoder = Packed(states, memory.lengths[owners])
        targets = [target for each in examples for target in self._targets[each]]
        inputs, inside = padded_inputs([self._texts.inputs(target) for target in targets])
        found = self._decoder.states(encoder, inputs.to(self._device), None)
        return found[:, inside.to(self._device)]


class ContinuationsPass:
    """A causal model over prompts with their targets behind them, of which the latter are kept.

    Args:
        backbone: the frozen model.
        spec: of its stream.
        prompts: token ids of every example of a split.
        targets: of the same examples.
        texts: whose they are.
        batch: padded tokens in a batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        spec: StreamSpec,
        prompts: Sequence[tuple[int, ...]],
        targets: Sequence[Sequence[tuple[int, ...]]],
        texts: TargetTexts,
        batch: int,
    ) -> None:
        self._model = cut_after(backbone, "hidden", spec.taps[-1])
        self._recorder = TapRecorder(blocks_of(self._model, backbone.family, "hidden"), spec.taps)
        self._taps, self._device, self._batch = spec.taps, backbone.device, batch
        self._prompts, self._targets, self._texts = prompts, targets, texts
        longest = max((len(t) for each in targets for t in each), default=0)
        self._lengths = np.array([len(each) + longest for each in prompts], np.int64)

    def states(self, shards: Sequence[int], layout: Layout) -> States:
        """`[K, n, d]` of the rows of shards: all targets of one example, then of the next."""
        batches = batches_of(shards, layout, self._lengths, self._batch)
        return side_by_side(self._of, batches, self._device)

    def _of(self, batch: npt.NDArray[np.int64]) -> Tensor:
        pairs = [
            (self._prompts[each], self._texts.inputs(target))
            for each in batch.tolist()
            for target in self._targets[each]
        ]
        inputs, inside = padded_inputs([prompt + target for prompt, target in pairs])
        self._model(
            input_ids=inputs.to(self._device), attention_mask=inside.long().to(self._device)
        )
        begin = torch.tensor([len(prompt) for prompt, _ in pairs])
        kept = inside & (torch.arange(inputs.shape[1]) >= begin[:, None])
        return self._recorder.stacked(self._taps)[:, kept.to(self._device)]


def padded_inputs(inputs: Sequence[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    """Token ids `[B, P]`, padded behind, and where there is one."""
    sizes = torch.tensor([len(each) for each in inputs])
    out = torch.zeros(len(inputs), int(sizes.max()), dtype=torch.long)
    for row, each in enumerate(inputs):
        out[row, : len(each)] = torch.tensor(each)
    return out, torch.arange(out.shape[1]) < sizes[:, None]
