"""What the labels of a cache need of its backbone beside the texts' own features."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sherl_pipe.cache import FeatureCache, LabelTable
from sherl_pipe.cache.names import stream_kind
from sherl_pipe.stages.texts import TargetTexts
from sherl_pipe.stages.words import PrefixTree


def missing_words(
    cache: FeatureCache, tokenizer: Any, start: int, *, whole: bool = False
) -> list[tuple[str, PrefixTree]]:
    """Splits and prefix trees whose decoder states the cache's tasks need and it lacks.

    Args:
        cache: of a text-to-text backbone.
        tokenizer: the backbone's.
        start: token id that decoding starts from.
        whole: whether those count that lack added taps, of whatever task they are or were.
    """
    places = {identity: split for identity, (split, _) in cache.places.items()}
    tables = (table for roles in cache.tasks.values() for table in roles.values())
    missing = [
        (split, tree)
        for tree, splits in words_of(tables, places, tokenizer, start)
        for split in splits
        if tree.stream not in cache.streams(split)
    ]
    if whole:
        taps = cache.identity.held("decoder").taps
        missing += [
            (split, PrefixTree.from_json(stream.notes["tree"]))
            for split in cache.splits
            for name, stream in cache.streams(split).items()
            if "tree" in stream.notes and stream.spec.taps != taps
        ]
    return missing


def words_of(
    tables: Iterable[LabelTable], places: Mapping[bytes, str], tokenizer: Any, start: int
) -> list[tuple[PrefixTree, list[str]]]:
    """The prefix trees that label tables need, each with the splits that hold its examples.

    Args:
        tables: labels of the tasks.
        places: the split of every example.
        tokenizer, start: as for `missing_words`.
    """
    needed: dict[str, tuple[PrefixTree, set[str]]] = {}
    for table in (each for each in tables if each.spec.kind != "text"):
        tree = PrefixTree.of_words(table.spec.words, tokenizer, start)
        splits = {places[each] for each in table.ids if each in places}
        needed.setdefault(tree.stream, (tree, set()))[1].update(splits)
    return [(tree, sorted(splits)) for tree, splits in needed.values()]


def missing_targets(
    cache: FeatureCache,
    tokenizer: Any,
    start: int | None,
    tasks: Collection[str] | None = None,
    *,
    whole: bool = False,
) -> list[tuple[str, TargetTexts]]:
    """Splits and free-text targets whose states the cache's tasks need and it lacks.

    Args:
        cache: of a backbone that generates.
        tokenizer: the backbone's.
        start: token id that decoding starts from; None for a causal model.
        tasks: of these alone.
        whole: whether those count that lack added taps.
    """
    found = []
    for table in (table for roles in cache.tasks.values() for table in roles.values()):
        if table.spec.kind != "text" or (tasks is not None and table.task not in tasks):
            continue
        texts = TargetTexts.of_table(table, tokenizer, start, cache.identity.max_length)
        splits = {cache.places[each][0] for each in table.ids if each in cache.places}
        taps = cache.identity.held(stream_kind(texts.stream)).taps
        for each in sorted(splits):
            held = cache.streams(each).get(texts.stream)
            if held is None or (whole and held.spec.taps != taps):
                found.append((each, texts))
    return found
