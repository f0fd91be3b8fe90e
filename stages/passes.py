"""Forward passes over shards."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain, islice
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from sherl_pipe.cache import Stream, StreamSpec
from sherl_pipe.cache.layout import Layout
from sherl_pipe.stages import quantize
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.families import blocks_of, norm_of, stack_of
from sherl_pipe.stages.features import Batch, Packed
from sherl_pipe.stages.surgery import TapRecorder, cut_after, placed
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor

# Batches that are computed at the same time on a processor, at most: each takes its own memory.
TOGETHER = 32

# Padded tokens in a batch. On a processor few, so that what an operation reads and writes stays in
# its cache: so many values of a tap, within limits. A GPU wants many to be busy.
FEWEST_TOKENS, MOST_TOKENS = 512, 4096
CACHED_VALUES = 192 << 10

# States `[K, n, d]`, batch by batch.
States = Generator[Tensor, None, None]

Job = TypeVar("Job")


def tokens_in_batch(wanted: int | None, width: int, device: torch.device) -> int:
    """Padded tokens in a batch: as many as wanted, or what suits a device and states of `width`."""
    if wanted is not None:
        return wanted
    cached = CACHED_VALUES // width if device.type == "cpu" else MOST_TOKENS
    return min(max(cached, FEWEST_TOKENS), MOST_TOKENS)


def token_batches(
    members: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], budget: int
) -> Iterator[npt.NDArray[np.int64]]:
    """Cut members, ascending in length, into batches of at most `budget` padded tokens."""
    start = 0
    for end in range(1, len(members) + 1):
        longest = lengths[members[end]] if end < len(members) else 0
        if end == len(members) or longest * (end + 1 - start) > budget:
            yield members[start:end]
            start = end


def batches_of(
    shards: Sequence[int], layout: Layout, lengths: npt.NDArray[np.int64], budget: int
) -> Iterator[npt.NDArray[np.int64]]:
    """The batches of shards, one after another; arguments as of `token_batches`."""
    for shard in shards:
        yield from token_batches(layout.members(shard), lengths, budget)


def side_by_side(
    work: Callable[[Job], Tensor], batches: Iterable[Job], device: torch.device
) -> States:
    """What `work` makes of each batch, in order, without gradients.

    On a processor several batches are computed at the same time, each by one thread. Threads that
    share the operations of one batch wait for one another at the end of each, for whichever of them
    has to share its core with what compresses and writes. And they may change the last bits of a
    product, depending on how many they are (MKL's on AMD's processors do), where features have to
    be the same bytes for any number of them.
    """

    @torch.inference_mode()
    def frozen(batch: Job) -> Tensor:
        return work(batch)

    if device.type != "cpu":
        yield from map(frozen, batches)
        return
    threads, source = torch.get_num_threads(), iter(batches)
    first = list(islice(source, min(threads, TOGETHER)))
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(
        max(1, len(first)), "forward", initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        waiting: deque[Future[Tensor]] = deque()
        for batch in chain(first, source):
            waiting.append(pool.submit(frozen, batch))
            # One more than there are threads, so that none waits while a result is made use of.
            if len(waiting) > len(first):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class MainPass:
    """The backbone up to its last tap, over the tokens of a split."""

    def __init__(
        self,
        backbone: Backbone,
        stream: str,
        spec: StreamSpec,
        tokens: Tokens,
        pad_id: int,
        batch_tokens: int,
    ) -> None:
        model: Any = cut_after(backbone, stream, spec.taps[-1])
        family = backbone.family
        self._recorder = TapRecorder(blocks_of(model, family, stream), spec.taps)
        tower = family.towers.get(stream)
        self._model: Any = model
        if tower:
            self._model = model.get_submodule(tower.model)
        elif family.seq2seq:
            self._model = stack_of(model, family, stream)
        self._device, self._spec, self.tokens = backbone.device, spec, tokens
        self._pad_id, self._batch_tokens = pad_id, batch_tokens

    def states(self, shards: Sequence[int], layout: Layout) -> States:
        """`[K, n, d]` of the rows of shards, one after another, batch by batch, in their order."""
        batches = batches_of(shards, layout, self.tokens.lengths, self._batch_tokens)
        return side_by_side(self.of, batches, self._device)

    def of(self, examples: npt.NDArray[np.int64]) -> Tensor:
        """`[K, n, d]` of some examples, in one forward pass."""
        inputs = self.tokens.batch(examples.tolist(), self._pad_id)
        inputs = {name: values.to(self._device) for name, values in inputs.items()}
        self._model(**inputs)
        states = [self._recorder.states[tap].flatten(0, 1) for tap in self._spec.taps]
        if "attention_mask" not in inputs:  # images: nothing is padded
            return torch.stack(states)
        places = inputs["attention_mask"].flatten().nonzero().squeeze(-1)
        out = states[0].new_empty(len(states), len(places), states[0].shape[-1])
        for place, state in enumerate(states):
            torch.index_select(state, 0, places, out=out[place])
        return out


class DecoderPass:
    """A decoder up to its last tap, over given encoder states."""

    def __init__(self, backbone: Backbone, taps: Sequence[int]) -> None:
        model: Any = cut_after(backbone, "decoder", taps[-1])
        self._recorder = TapRecorder(blocks_of(model, backbone.family, "decoder"), taps)
        self._decoder = stack_of(model, backbone.family, "decoder")
        self._norm = norm_of(model, backbone.family, "encoder")
        self._taps, self._dtype = taps, backbone.dtype
        self._family = backbone.family

    def placed(self, places: Tensor) -> AbstractContextManager[None]:
        """Inside, tokens stand at `places`, `[P]`, for learned positions."""
        return placed(self._decoder, self._family, places)

    def states(self, encoder: Packed, inputs: Tensor, mask: Tensor | None) -> Tensor:
        """`[K, B, P, d]` at every position.

        Args:
            encoder: its top tap, `states [1, n, d]`.
            inputs: decoder token ids `[B, P]`.
            mask: additive, `[B, 1, P, P]`; causal where None.
        """
        self._decoder(
            input_ids=inputs,
            attention_mask=mask,
            encoder_hidden_states=encoder.pad(self._norm(encoder.states[0].to(self._dtype))),
            encoder_attention_mask=encoder.mask().long(),
            use_cache=False,
        )
        return torch.stack([self._recorder.states[tap] for tap in self._taps])


class CachedTop:
    """The top tap of a shard of a cached encoder, decoded.

    Args:
        stream: the encoder's.
        shard: its number.
        device: where states are decoded.
    """

    def __init__(self, stream: Stream, shard: int, device: torch.device) -> None:
        self._stream, self._device = stream, device
        self._data = stream.read_shard(shard, [stream.spec.taps[-1]])

    def states(self, examples: Sequence[int]) -> Packed:
        """`[1, n, d]` of examples that are neighbours in the shard."""
        stream, data, index = self._stream, self._data, self._stream.layout.index
        first, last = examples[0], examples[-1]
        rows = slice(int(index[first, 1]), int(index[last, 1] + index[last, 2]))
        scales = None if data.scales is None else torch.from_numpy(data.scales[:, rows])
        state = quantize.decode(
            stream.codec,
            torch.from_numpy(data.codes[:, rows]).to(self._device),
            None if scales is None else scales.to(self._device),
            stream.spec.width,
            data.picks,
        )
        return Packed(state, torch.from_numpy(index[list(examples), 2]).to(self._device))


def batches_with_tops(
    encoder: Stream,
    shards: Sequence[int],
    layout: Layout,
    beside: int,
    budget: int,
    device: torch.device,
) -> Iterator[tuple[CachedTop, npt.NDArray[np.int64]]]:
    """The batches of shards, one after another, each with its shard's encoder states.

    Args:
        encoder: the cached stream.
        layout: of what is computed; its examples stand in the same shards as the encoder's.
        beside: what an example takes of a batch's `budget` beside its encoder tokens.
    """
    lengths = encoder.layout.index[:, 2] + beside
    for shard in shards:
        top = CachedTop(encoder, shard, device)
        for batch in batches_of([shard], layout, lengths, budget):
            yield top, batch


class WordsPass:
    """The decoder over all label-word prefixes, fed by the cached encoder."""

    def __init__(
        self, backbone: Backbone, spec: StreamSpec, encoder: Stream, tree: PrefixTree, batch: int
    ) -> None:
        self._decoder = DecoderPass(backbone, spec.taps)
        self._encoder, self._batch, self._device = encoder, batch, backbone.device
        self._tokens = tree.flat_tokens().to(self._device)
        self._mask = tree.flat_mask(backbone.dtype).to(self._device)
        self._first = tree.first_places().to(self._device)
        self._places = tree.flat_places().to(self._device)

    def states(self, shards: Sequence[int], layout: Layout) -> States:
        """`[K, n, d]` of the rows of shards: all nodes of one example, then of the next."""
        batches = batches_with_tops(
            self._encoder, shards, layout, len(self._tokens), self._batch, self._device
        )
        with self._decoder.placed(self._places):
            yield from side_by_side(self._of, batches, self._device)

    def _of(self, job: tuple[CachedTop, npt.NDArray[np.int64]]) -> Tensor:
        top, batch = job
        tokens = self._tokens.expand(len(batch), -1)
        mask = self._mask.expand(len(batch), -1, -1, -1)
        states = self._decoder.states(top.states(batch.tolist()), tokens, mask)
        return states[:, :, self._first].flatten(1, 2)


class LivePass:
    """The features of training batches without a cache: the frozen forward, batch by batch.

    Args:
        backbone: the frozen model.
        reads: taps by role, as a route reads them.
        tokens: of all inputs.
        pad_id: of the tokenizer.
        tree: label words; text-to-text backbones only.
    """

    def __init__(
        self,
        backbone: Backbone,
        reads: Mapping[str, Sequence[int]],
        tokens: Tokens,
        pad_id: int,
        tree: PrefixTree | None,
    ) -> None:
        self._role = backbone.family.main
        self._tree, self._tokens, self._device = tree, tokens, backbone.device
        blocks, taps = len(backbone.blocks(self._role)), tuple(reads[self._role])
        self._kept = len(taps)
        if tree is not None and taps[-1] != blocks:
            taps = (*taps, blocks)  # what the decoder attends to
        spec = StreamSpec(taps, blocks, backbone.width)
        self._main = MainPass(backbone, self._role, spec, tokens, pad_id, 0)
        self._decoder = DecoderPass(backbone, reads["decoder"]) if tree is not None else None

    @torch.no_grad()
    def batch(self, rows: npt.NDArray[np.int64], words: npt.NDArray[np.int64] | None) -> Batch:
        """The inputs `rows` as a training batch; `words` are the labels' numbers in the tree."""
        states = self._main.of(rows)
        lengths = torch.from_numpy(self._tokens.lengths[rows]).to(self._device)
        streams = {self._role: Packed(states[: self._kept].float(), lengths)}
        if self._decoder is not None and self._tree is not None and words is not None:
            paths = [self._tree.words[word] for word in words.tolist()]
            inputs = torch.zeros(len(paths), max(map(len, paths)), dtype=torch.long)
            for row, path in enumerate(paths):
                inputs[row, : len(path)] = torch.tensor([self._tree.start, *path[:-1]])
            sizes = torch.tensor([len(path) for path in paths], device=self._device)
            top = Packed(states[-1:], lengths)
            deep = self._decoder.states(top, inputs.to(self._device), None)
            inside = torch.arange(inputs.shape[1], device=self._device) < sizes[:, None]
            streams["decoder"] = Packed(deep[:, inside].float(), sizes)
        return Batch(rows, streams)
