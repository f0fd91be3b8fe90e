"""Labels: attached beside the features, joined by example id, replaced at any time.

A task's labels of one role (`train`, `validation`, ...) are one sealed file,
`_labels/<task>/<role>.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache.errors import CorruptCacheError
from sherl_pipe.cache.schema import check_name, seal, unseal
from sherl_pipe.cache.store import LocalStore, is_partial

FOLDER = "_labels"

Label = int | float


@dataclass(frozen=True)
class TaskSpec:
    """What the labels of a task mean.

    Attributes:
        kind: `classification` (labels index `classes`) or `regression` (labels are numbers).
        classes: names of the classes; empty for regression.
        words: label words of a text-to-text backbone, one per class; for regression the graded
            values as text.
        metrics: names of the metrics, the GLUE ones where the task is known.
    """

    kind: str
    classes: tuple[str, ...]
    words: tuple[str, ...]
    metrics: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "words": list(self.words),
            "metrics": list(self.metrics),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TaskSpec:
        return cls(
            str(data["kind"]),
            tuple(data["classes"]),
            tuple(data["words"]),
            tuple(data["metrics"]),
        )


@dataclass(frozen=True)
class LabelTable:
    """Labels of one task and role: `labels[i]` belongs to the example `ids[i]`.

    A text that occurs twice in the data is one example with two rows here.
    """

    task: str
    role: str
    spec: TaskSpec
    ids: tuple[bytes, ...]
    labels: tuple[Label, ...]

    @property
    def key(self) -> str:
        return f"{FOLDER}/{check_name(self.task, 'task')}/{check_name(self.role, 'role')}.json"

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "role": self.role,
            "spec": self.spec.to_json(),
            "ids": [identity.hex() for identity in self.ids],
            "labels": list(self.labels),
        }


def write(store: LocalStore, table: LabelTable) -> int:
    """Write or replace a table; returns how many of its rows are new or changed."""
    old: set[tuple[bytes, Label]] = set()
    if store.exists(table.key):
        before = read(store, table.key)
        if before == table:
            return 0
        old = set(zip(before.ids, before.labels, strict=True))
    store.replace(table.key, seal(table.to_json()))
    return sum(row not in old for row in zip(table.ids, table.labels, strict=True))


def read(store: LocalStore, key: str) -> LabelTable:
    """One table. Raises CorruptCacheError for a damaged file."""
    path = str(store.path(key))
    body = unseal(store.read(key), path)
    try:
        table = LabelTable(
            body["task"],
            body["role"],
            TaskSpec.from_json(body["spec"]),
            tuple(bytes.fromhex(identity) for identity in body["ids"]),
            tuple(body["labels"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(f"{path} lacks or misstates {error}") from error
    if len(table.ids) != len(table.labels) or table.key != key:
        raise CorruptCacheError(f"{path}: ids, labels and name do not belong together")
    return table


def read_all(store: LocalStore) -> dict[str, dict[str, LabelTable]]:
    """Every table, by task and role."""
    tasks: dict[str, dict[str, LabelTable]] = {}
    for key in keys(store):
        table = read(store, key)
        tasks.setdefault(table.task, {})[table.role] = table
    return tasks


def keys(store: LocalStore) -> list[str]:
    """The tables' files; what a writer has under way, or left behind when it died, is none."""
    found = store.list(FOLDER)
    return [key for key in found if key.endswith(".json") and not is_partial(key)]
