"""Which part of the data stands for the whole when an extraction is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sherl_pipe.cache import LabelTable
from sherl_pipe.stages.features import Ints, blurred
from sherl_pipe.stages.survey import Survey, lengths_by_id

# Batches of one task that training steps are timed on.
MOST_BATCHES = 6


@dataclass(frozen=True)
class Sample:
    """What is measured.

    Attributes:
        members: by split, places in `Split.known`, ascending.
        batches: by task, rows of its training table; neighbours in length, as in training.
    """

    members: Mapping[str, Ints]
    batches: Mapping[str, Sequence[Ints]]


def choose(
    counted: Survey, tables: Mapping[str, LabelTable], batch_size: int, tokens: float
) -> Sample:
    """A sample of about `tokens` tokens, or all there is where that is no more.

    Whole training batches are taken, so that steps can be timed on them: of every task as many as
    its share of the batches says, short and long ones alike. Without tasks, any inputs.

    Args:
        tables: the training rows of every task that is to be tuned.
        batch_size: of training.
    """
    length = lengths_by_id(counted)
    # As in training: neighbours in length, but not the very next ones, so that some is padded.
    # Tasks that share their texts get the same batches.
    noise = dict(zip(sorted(length), blurred(len(length), np.random.default_rng(0)), strict=True))
    batches, sizes = {}, {}
    for task, table in tables.items():
        rows = np.array([row for row, each in enumerate(table.ids) if each in length], np.int64)
        sizes_of = np.array([length[table.ids[row]] for row in rows], np.int64)
        factors = np.array([noise[table.ids[row]] for row in rows], np.float64)
        order = np.argsort(sizes_of * factors, kind="stable")
        cuts = range(batch_size, len(rows), batch_size)
        if len(rows):
            batches[task] = np.split(rows[order], cuts)
            sizes[task] = [int(part.sum()) for part in np.split(sizes_of[order], cuts)]
    if counted.whole and sum(split.rows for split in counted.splits) <= tokens:
        members = {split.name: np.arange(len(split.known)) for split in counted.splits}
        picked = {task: strata(batches[task], sizes[task], MOST_BATCHES) for task in batches}
        return Sample(members, picked)
    # An input that several tasks label is run once.
    once = sum(length.get(each, 0) for each in {i for t in tables.values() for i in t.ids})
    counts = _shares(sizes, tokens * sum(map(sum, sizes.values())) / max(1, once))
    picked = {task: strata(batches[task], sizes[task], n) for task, n in counts.items() if n}
    wanted = {
        tables[task].ids[row] for task, found in picked.items() for each in found for row in each
    } or _any(counted, tokens)
    members = {
        split.name: np.array(
            [at for at, place in enumerate(split.known) if split.ids[place] in wanted], np.int64
        )
        for split in counted.splits
    }
    return Sample(members, {task: found[:MOST_BATCHES] for task, found in picked.items()})


def strata(batches: Sequence[Ints], sizes: Sequence[int], count: int) -> list[Ints]:
    """`count` of the batches whose mean size is about that of all of them.

    They are cut into `count` groups of neighbours; of each comes the batch that is nearest to the
    group's mean.
    """
    groups = np.array_split(np.array(sizes), min(count, len(sizes)))
    starts = np.cumsum([0, *map(len, groups)])
    return [
        batches[int(start + np.abs(group - group.mean()).argmin())]
        for start, group in zip(starts, groups, strict=False)
    ]


def _shares(sizes: Mapping[str, Sequence[int]], tokens: float) -> dict[str, int]:
    """How many batches of every task make about `tokens` tokens; one at least of the largest."""
    counts = dict.fromkeys(sizes, 0)
    spent = 0.0
    while any(counts[task] < len(sizes[task]) for task in sizes):
        # The task that has the most batches for each that it was given.
        task = max(
            (task for task in sizes if counts[task] < len(sizes[task])),
            key=lambda each: len(sizes[each]) / (counts[each] + 1),
        )
        spent += float(np.mean(sizes[task]))
        if spent > tokens and any(counts.values()):
            break
        counts[task] += 1
    return counts


def _any(counted: Survey, tokens: float) -> set[bytes]:
    """Ids of inputs, evenly from all splits, of about `tokens` tokens."""
    length = lengths_by_id(counted)
    step = max(1, round(sum(length.values()) / max(1.0, tokens)))
    return set(list(length)[::step])
