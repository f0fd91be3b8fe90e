"""Which rows train a task, which evaluate it, and where a cache holds them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from sherl_pipe.cache import FeatureCache, InputError, LabelTable
from sherl_pipe.cache.errors import explain

HOLD_OUT = 10  # one in so many training examples, where a task has no validation split


def train_and_held_out(tables: Mapping[str, LabelTable]) -> tuple[LabelTable, LabelTable]:
    """Training and evaluation rows. Without a validation split, one training text in ten is held
    out, chosen by its id; of pairs one image in ten with all its texts."""
    if "train" not in tables:
        raise InputError(
            explain(
                "labels",
                expected="a split named train",
                found=f"{sorted(tables)}",
                todo="Name the training file train.*, or attach labels with --role train.",
            )
        )
    train = tables["train"]
    others = [role for role in sorted(tables) if role.startswith("validation")]
    if others:
        return train, tables[others[0]]
    order = [int.from_bytes(identity[:4], "big") for identity in train.image_ids or train.ids]
    # The least number too, so that a small file has something held out.
    held = [number % HOLD_OUT == 0 or number == min(order) for number in order]

    def part(wanted: bool, role: str) -> LabelTable:
        rows = [row for row, out in enumerate(held) if out == wanted]
        if not rows:
            raise InputError(
                f"task {train.task} has {len(held)} rows, too few to hold some out for "
                "evaluation. Add a validation split."
            )
        ids = tuple(train.ids[row] for row in rows)
        labels = tuple(train.labels[row] for row in rows)
        return replace(train, role=role, ids=ids, labels=labels)

    return part(False, "train"), part(True, "held-out")


def splits_of(cache: FeatureCache, tables: Iterable[LabelTable]) -> set[str]:
    """The splits of a cache that hold the examples of label tables, as far as it has them."""
    places = cache.places
    examples = (each for table in tables for each in (*table.ids, *table.image_ids))
    return {places[each][0] for each in examples if each in places}
