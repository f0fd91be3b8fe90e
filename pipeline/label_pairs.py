"""Pair the texts and images that a dual encoder's cache already holds anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sherl_pipe.cache import CacheWriter, FeatureCache, InputError, LabelTable
from sherl_pipe.cache.errors import explain
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.pairs import CAPTION, pairs_of


def attach_pairs(
    cache: FeatureCache,
    task: str,
    files: dict[str, Path],
    text_columns: Sequence[str],
    image_column: str | None,
) -> dict[str, int]:
    """Attach one task's pairs; by role, how many are new.

    Args:
        cache: of a dual encoder.
        task: its name.
        files: of pairs, by role.
        text_columns, image_column: as for `extract`.

    Raises InputError for a file without pairs, and naming the first text or image that the cache
    does not hold; nothing is written then.
    """
    tables = []
    for role, file in files.items():
        (source,) = load_sources(str(file), images=True, image_column=image_column)
        pairs = pairs_of(source, text_columns)
        table = replace(pairs.table(), task=task, role=role)
        texts, images = pairs.texts.rows, pairs.images.rows
        named: dict[bytes, str] = {each["image"].identity: each["image"].origin for each in images}
        for name, each in zip(
            (row["caption"] for row in texts), pairs.texts.ids(CAPTION), strict=True
        ):
            named.setdefault(each, f"the text {name!r}")
        _check(cache, table, named, str(file))
        tables.append(table)
    with CacheWriter.open(cache.path, cache.identity) as writer:
        return {table.role: writer.write_labels(table) for table in tables}


def _check(cache: FeatureCache, table: LabelTable, named: dict[bytes, str], origin: str) -> None:
    for each in (*table.ids, *table.images):
        if each not in cache.places:
            raise InputError(
                explain(
                    f"{origin}: {named[each]}",
                    expected=f"one that is in the cache {cache.path}",
                    found="another",
                    todo="Extract it first, or remove its rows.",
                )
            )
