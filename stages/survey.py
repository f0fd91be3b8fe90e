"""What an extraction would have to do: examples, tokens and shards, counted before it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sherl_pipe.cache import Identity, LabelTable
from sherl_pipe.cache.layout import Layout, assign, same_shards, shard_capacity
from sherl_pipe.cache.schema import MAX_ROWS
from sherl_pipe.stages.amounts import Amount, TaskAmount
from sherl_pipe.stages.features import Ints
from sherl_pipe.stages.inputs import read_inputs
from sherl_pipe.stages.passes import batches_of
from sherl_pipe.stages.pictures import Picture
from sherl_pipe.stages.progress import Progress, silent
from sherl_pipe.stages.shard_buffer import token_bytes
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.splits import Inputs, inputs_of
from sherl_pipe.stages.templates import Template
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.words import PrefixTree

# Inputs of a split that are tokenised whatever it takes: enough for a mean length.
FIRST = 256
# Shards that are cut into batches to see how much padding there is: they are alike.
LOOKED_AT = 8
# Generous: what a stream takes beside its shards and tables; id, index and label of an example in
# one stream; tokens of a template.
STREAM_BYTES, EXAMPLE_BYTES, TEMPLATE_TOKENS = 64 << 10, 128, 64

Trees = Sequence[tuple[PrefixTree, Sequence[str]]]


@dataclass(frozen=True)
class Split:
    """A split as it was counted.

    Attributes:
        inputs: what it will store.
        ids: of `inputs`, in order.
        known: positions in `ids` of the inputs that were tokenised, ascending.
        tokens: of those.
    """

    name: str
    inputs: Inputs
    ids: Sequence[bytes]
    known: Ints
    tokens: Tokens

    @property
    def rows(self) -> int:
        """Tokens of all inputs; extrapolated where only some were tokenised."""
        counted = int(self.tokens.lengths.sum())
        return round(counted * len(self.ids) / len(self.known)) if len(self.known) else 0


@dataclass(frozen=True)
class Survey:
    """All splits of an extraction.

    Attributes:
        splits: in the order of the data.
        places: the split that stores every example.
        seconds: that hashing and tokenising all of them takes.
    """

    splits: Sequence[Split]
    places: Mapping[bytes, str]
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether every input was tokenised."""
        return all(len(split.known) == len(split.ids) for split in self.splits)


def survey(
    sources: Iterable[Source],
    templates: Mapping[str, Template],
    tokenizer: Any,
    max_length: int,
    *,
    known: Mapping[bytes, str] | None = None,
    seconds: float = 2.0,
    progress: Progress = silent,
) -> Survey:
    """Count the splits of an extraction.

    Args:
        sources, templates, tokenizer, max_length: of the extraction.
        known: the split of every example that its cache holds already.
        seconds: tokenise all inputs if it takes about so long, else as many as can be.

    Raises InputError for a value that is no text.
    """
    begun = time.perf_counter()
    places = dict(known or {})
    inputs = {source.name: inputs_of(source, templates[source.name], places) for source in sources}
    texts = {name: list(each.texts.values()) for name, each in inputs.items()}
    hashing = time.perf_counter() - begun
    rng = np.random.default_rng(0)
    order = {name: rng.permutation(len(each)) for name, each in texts.items()}
    parts: dict[str, list[Tokens]] = {name: [] for name in texts}
    done = dict.fromkeys(texts, 0)
    spent = 0.0

    def read(share: float, least: int) -> None:
        nonlocal spent
        for name, each in texts.items():
            left = len(each) - done[name]
            count = min(left, max(least, math.ceil(share * left)))
            chosen = order[name][done[name] : done[name] + count]
            now = time.perf_counter()
            some = [each[i] for i in chosen]
            parts[name].append(read_inputs(tokenizer, some, max_length, progress))
            spent += time.perf_counter() - now
            done[name] += count

    read(0.0, FIRST)
    total, first = sum(map(len, texts.values())), sum(done.values())
    left = spent / max(1, first) * (total - first)
    read(min(1.0, seconds / left) if left else 1.0, 0)
    splits = [
        _split(name, inputs[name], order[name][: done[name]], each) for name, each in parts.items()
    ]
    return Survey(splits, places, hashing + spent / max(1, sum(done.values())) * total)


def amounts(
    counted: Survey,
    trees: Trees,
    identity: Identity,
    *,
    shard_bytes: int,
    batch_tokens: int,
) -> list[Amount]:
    """Every stream that the extraction writes, in the order in which it does.

    Args:
        trees: label words and the splits that need them, as `words_of` gives them.
        shard_bytes, batch_tokens: of the extractor.
    """
    main = "encoder" if "encoder" in identity.streams else "hidden"
    spec = identity.streams[main]
    capacity = shard_capacity(spec, identity.codec, shard_bytes)
    found, decoders = [], []
    for split in counted.splits:
        lengths = split.tokens.lengths
        layout = assign(lengths, capacity, identity.seed)
        scale = split.rows / max(1, int(lengths.sum()))
        shards = round(layout.shards * scale)
        values = split.rows * len(spec.taps) * spec.width
        padded = round(padded_tokens(layout, lengths, batch_tokens) * scale)
        examples = len(split.ids)
        found.append(Amount(split.name, main, examples, split.rows, padded, shards, values))
        for tree in (tree for tree, splits in trees if split.name in splits):
            deep, nodes = identity.streams["decoder"], len(tree.nodes)
            wide = lengths + len(tree.flat_nodes)
            padded = round(padded_tokens(same_shards(layout, nodes), wide, batch_tokens) * scale)
            rows = examples * nodes
            values = rows * len(deep.taps) * deep.width
            decoders.append(Amount(split.name, tree.stream, examples, rows, padded, shards, values))
    return found + decoders


def task_amounts(
    counted: Survey, tables: Mapping[str, LabelTable], batch_size: int
) -> list[TaskAmount]:
    """An epoch of every task.

    Args:
        tables: the training rows of each.
        batch_size: of a step.
    """
    length = lengths_by_id(counted)
    rows = {split.name: split.rows for split in counted.splits}
    found = []
    for task, table in tables.items():
        known = [length[each] for each in table.ids if each in length]
        tokens = round(sum(known) / max(1, len(known)) * len(table.ids))
        held = sum(rows[split] for split in {counted.places[each] for each in table.ids})
        steps = math.ceil(len(table.ids) / batch_size)
        found.append(TaskAmount(task, len(table.ids), tokens, held, steps))
    return found


def lengths_by_id(counted: Survey) -> dict[bytes, int]:
    """Tokens of every input that was tokenised."""
    return {
        split.ids[position]: int(length)
        for split in counted.splits
        for position, length in zip(split.known, split.tokens.lengths, strict=True)
    }


def padded_tokens(layout: Layout, lengths: Ints, batch_tokens: int) -> int:
    """Tokens, padding included, in the batches that compute a layout.

    Args:
        lengths: of every example, in the batches; ascending inside a shard.
        batch_tokens: largest batch.
    """
    shards = range(layout.shards)[:: max(1, layout.shards // LOOKED_AT)]
    padded = plain = 0
    for batch in batches_of(shards, layout, lengths, batch_tokens):
        plain += int(lengths[batch].sum())
        padded += int(lengths[batch].max()) * len(batch)
    return round(padded * int(lengths.sum()) / max(1, plain))


def upper_bound(
    sources: Iterable[Source],
    trees: Iterable[PrefixTree],
    identity: Identity,
    image_tokens: int | None = None,
) -> int:
    """Bytes below which an extraction stays, at the cost of looking at its texts once.

    No tokenizer makes more tokens than a text has bytes, beside some of its own and the template's;
    nothing is compressed, and every tree is needed everywhere. An image makes the same number of
    tokens whatever is in it: `image_tokens`, or the identity's `max_length`.
    """
    main = "encoder" if "encoder" in identity.streams else "hidden"
    said_in = identity.streams.get("decoder") or identity.streams.get(main)
    deep = token_bytes(identity.codec, said_in) if said_in else 0
    nodes, streams = 0, 1
    for tree in trees:
        nodes, streams = nodes + len(tree.nodes), streams + 1
    example = EXAMPLE_BYTES * streams
    if nodes:
        example += nodes * token_bytes(identity.codec, identity.streams["decoder"])
    total = 0
    for source in sources:
        total += STREAM_BYTES * streams + example * len(source.rows)
        row = token_bytes(identity.codec, identity.streams[source.stream or main])
        for each in source.rows:
            if source.target_column is not None:
                said = TEMPLATE_TOKENS + _most_tokens(each.get(source.target_column))
                total += deep * min(identity.max_length, said) + EXAMPLE_BYTES
            size = TEMPLATE_TOKENS + sum(_most_tokens(each.get(name)) for name in source.columns)
            most = image_tokens if source.stream == "image" else None
            total += row * min(most or identity.max_length, size)
    return total


def uncompressed_bytes(
    sources: Iterable[Source], templates: Mapping[str, Template], tokenizer: Any, identity: Identity
) -> int:
    """Bytes that the inputs of a dual encoder take without compression; all are tokenised.

    Args:
        templates: by the sources' keys.
        tokenizer: the `DualReader`.

    Raises InputError for a text that does not end as the model wants it.
    """
    places: dict[bytes, str] = {}
    total = 0
    for source in sources:
        inputs = inputs_of(source, templates[source.key], places)
        tokens = read_inputs(tokenizer, list(inputs.texts.values()), identity.max_length)
        row = token_bytes(identity.codec, identity.streams[source.stream or ""])
        total += int(tokens.lengths.sum()) * row + EXAMPLE_BYTES * len(source.rows) + STREAM_BYTES
    return total


def _most_tokens(value: Any) -> int:
    """What no input of this value exceeds; of an image, as many as there may be."""
    return (
        MAX_ROWS if isinstance(value, Picture) else len(str(value).encode(errors="surrogatepass"))
    )


def _split(name: str, inputs: Inputs, known: Ints, parts: Sequence[Tokens]) -> Split:
    """Of inputs that were tokenised in the order `known`, in parts."""
    rows = [row for part in parts for row in part.inputs]
    order = np.argsort(known)
    truncated = sum(part.truncated for part in parts)
    tokens = replace(parts[0], inputs=[rows[place] for place in order], truncated=truncated)
    return Split(name, inputs, list(inputs.texts), known[order], tokens)
