"""Labels: attached beside the features, joined by example id, replaced at any time.

A task's labels of one role (`train`, `validation`, ...) are one sealed file,
`_labels/<task>/<role>.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sherl_pipe.cache import catalogue
from sherl_pipe.cache.catalogue import LABELS as FOLDER
from sherl_pipe.cache.errors import CorruptCacheError, InputError, explain, hint, shown
from sherl_pipe.cache.fingerprint import ID_BYTES
from sherl_pipe.cache.names import check_part
from sherl_pipe.cache.sealed import seal, take, unseal
from sherl_pipe.cache.stores import Store

KINDS = ("classification", "regression", "text", "retrieval")

Label = int | float | str
BIGGEST = 1e300  # an integer of JSON can be larger than any float


@dataclass(frozen=True)
class TaskSpec:
    """What the labels of a task mean.

    Attributes:
        kind: `classification` (labels index `classes`), `regression` (labels are numbers), `text`
            (labels are texts) or `retrieval` (labels index the table's `images`).
        classes: names of the classes; of a classification only.
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
        """Raises KeyError for a missing field, TypeError or ValueError for one of another kind."""
        if data["kind"] not in KINDS:
            raise ValueError(
                explain("kind", expected=" or ".join(KINDS), found=shown(data["kind"]))
            )
        for name in ("classes", "words", "metrics"):
            if type(data[name]) is not list or not all(type(each) is str for each in data[name]):
                raise ValueError(explain(name, expected="a list of texts", found=shown(data[name])))
        return cls(
            data["kind"], tuple(data["classes"]), tuple(data["words"]), tuple(data["metrics"])
        )


@dataclass(frozen=True)
class LabelTable:
    """Labels of one task and role: `labels[i]` belongs to the example `ids[i]`.

    A text that occurs twice in the data is one example with two rows here. Task and role are one
    part each, so that a file is of one table only.

    Attributes:
        images: of a retrieval task, ids of the images; a row says that its text, `ids[i]`, and
            `images[labels[i]]` belong together.
    """

    task: str
    role: str
    spec: TaskSpec
    ids: tuple[bytes, ...]
    labels: tuple[Label, ...]
    images: tuple[bytes, ...] = ()

    @property
    def image_ids(self) -> tuple[bytes, ...]:
        """The image of every row of a retrieval task; empty for the other kinds."""
        return tuple(self.images[int(label)] for label in self.labels) if self.images else ()

    @property
    def key(self) -> str:
        return f"{FOLDER}/{check_part(self.task, 'task')}/{check_part(self.role, 'role')}.json"

    def to_json(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "role": self.role,
            "spec": self.spec.to_json(),
            "ids": [identity.hex() for identity in self.ids],
            "labels": list(self.labels),
            **({"images": [each.hex() for each in self.images]} if self.images else {}),
        }


def write(store: Store, table: LabelTable) -> int:
    """Write or replace a table; returns how many of its rows are new or changed.

    Raises InputError for labels that are none of the task, UnsafeError for odd names.
    """
    if problem := _problem(table):
        raise InputError(f"labels of {table.task}/{table.role}: {problem}")
    old: set[tuple[bytes, Label | bytes]] = set()
    if store.exists(table.key):
        before = read(store, table.key)
        if before == table:
            return 0
        old = set(zip(before.ids, before.image_ids or before.labels, strict=True))
    catalogue.enter(store, table.key)
    store.replace(table.key, seal(table.to_json()))
    rows = zip(table.ids, table.image_ids or table.labels, strict=True)
    return sum(row not in old for row in rows)


def read(store: Store, key: str) -> LabelTable:
    """One table. Raises CorruptCacheError for a damaged file, UnsafeError for an odd name."""
    data, path = store.read(key), str(store.path(key))
    with hint("Delete it and attach the labels again."):
        body = unseal(data, path)
        task, role = take(body, "task", str, path), take(body, "role", str, path)
        if key != f"{FOLDER}/{task}/{role}.json":
            raise CorruptCacheError(
                explain(
                    f"{path}: task and role",
                    expected="those of its name",
                    found=f"{shown(task)}, {shown(role)}",
                )
            )
        check_part(task, f"{path}: task")
        check_part(role, f"{path}: role")
        try:
            spec = TaskSpec.from_json(take(body, "spec", dict, path))
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptCacheError(f"{path}: field 'spec': {error}") from error
        ids = _ids_of(body, "ids", path)
        images = _ids_of(body, "images", path) if spec.kind == "retrieval" else ()
        table = LabelTable(task, role, spec, ids, tuple(take(body, "labels", list, path)), images)
        if problem := _problem(table):
            raise CorruptCacheError(f"{path}: {problem}")
        return table


def _ids_of(body: Any, name: str, path: str) -> tuple[bytes, ...]:
    try:
        return tuple(map(bytes.fromhex, take(body, name, list, path)))
    except (TypeError, ValueError) as error:
        raise CorruptCacheError(f"{path}: field {name!r} holds more than example ids.") from error


def _problem(table: LabelTable) -> str | None:
    """What is wrong with the rows of a table, in words."""
    if len(table.ids) != len(table.labels):
        return f"{len(table.ids)} ids and {len(table.labels)} labels; expected one for each."
    retrieval = table.spec.kind == "retrieval"
    classes = len(table.images) if retrieval else len(table.spec.classes)
    if any(len(image) != ID_BYTES for image in table.images) or (table.images and not retrieval):
        return explain("images", expected=f"ids of {ID_BYTES} bytes", found="others")
    for number, (identity, label) in enumerate(zip(table.ids, table.labels, strict=True)):
        where = f"row {number + 1}"
        if len(identity) != ID_BYTES:
            return explain(f"{where}: bytes of the id", expected=ID_BYTES, found=len(identity))
        if table.spec.kind == "regression":
            wanted = "a finite number"
            good = (
                isinstance(label, int | float)
                and not isinstance(label, bool)
                and -BIGGEST < label < BIGGEST
            )
        elif table.spec.kind == "text":
            wanted = "a text with more than blanks"
            good = type(label) is str and label.strip() != ""
        else:
            wanted = f"{'an image' if retrieval else 'a class'} from 0 to {classes - 1}"
            good = type(label) is int and 0 <= label < classes
        if not good:
            return explain(
                f"{where}, example {identity.hex()}", expected=wanted, found=shown(label)
            )
    return None


def read_all(store: Store) -> dict[str, dict[str, LabelTable]]:
    """Every table, by task and role."""
    tasks: dict[str, dict[str, LabelTable]] = {}
    for key in catalogue.label_keys(store):
        table = read(store, key)
        tasks.setdefault(table.task, {})[table.role] = table
    return tasks
