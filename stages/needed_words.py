"""Which label words' decoder states a cache needs, and still lacks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sherl_pipe.cache import FeatureCache, LabelTable
from sherl_pipe.cache.schema import stream_kind
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
            if stream_kind(name) == "decoder" and stream.spec.taps != taps
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
    for table in tables:
        tree = PrefixTree.of_words(table.spec.words, tokenizer, start)
        splits = {places[each] for each in table.ids if each in places}
        needed.setdefault(tree.stream, (tree, set()))[1].update(splits)
    return [(tree, sorted(splits)) for tree, splits in needed.values()]
