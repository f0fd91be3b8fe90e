"""Labels of tasks, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sherl_pipe.cache import InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.labels import Label
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.templates import Template

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}

# Of free text nothing is counted; `text_metrics` says what its metrics are.
TEXT = TaskSpec("text", (), (), ("exact_match", "token_accuracy", "perplexity"))

# More label words than this are no classes but free text.
MAX_WORDS = 256


def label_tables(sources: Iterable[Source], templates: Mapping[str, Template]) -> list[LabelTable]:
    """The labels of every labelled split, by example id.

    Args:
        sources: splits; those of one task share the meaning of their labels.
        templates: by split name; what ids are made from.

    Raises what `Source.ids` and `Source.labels` raise.
    """
    by_task: dict[str, list[Source]] = {}
    for source in sources:
        if source.label_column is not None or source.target_column is not None:
            by_task.setdefault(source.task, []).append(source)
    tables = []
    for task, members in by_task.items():
        if members[0].target_column is not None:
            tables += [_text_table(source, templates[source.name]) for source in members]
            continue
        values = {source.name: source.labels() for source in members}
        spec = task_spec(task, [value for column in values.values() for value in column])
        for source in members:
            ids = source.ids(templates[source.key])
            labels = [encode_label(spec, value) for value in values[source.name]]
            tables.append(LabelTable(task, source.role, spec, tuple(ids), tuple(labels)))
    return tables


def _text_table(source: Source, template: Template) -> LabelTable:
    ids = tuple(source.ids(template))
    return LabelTable(source.task, source.role, TEXT, ids, tuple(source.targets()))


def task_spec(task: str, values: Sequence[Any]) -> TaskSpec:
    """What the labels of a task mean: fractions make it a regression, all else classes.

    Raises InputError for a task with one class, or with more words than can be scored.
    """
    metrics = GLUE_METRICS.get(task, ())
    texts = sorted({value for value in values if isinstance(value, str)})
    if task == "stsb" or any(isinstance(value, float) for value in values):
        if texts:
            raise InputError(
                explain(f"labels of {task}", expected="numbers only", found=f"{texts[:3]} too")
            )
        grades = _grades([float(value) for value in values])
        words = tuple(dict.fromkeys(f"{value:.6g}" for value in grades))
        if task == "stsb":
            words = tuple(f"{grade / 5:.1f}" for grade in range(26))
        return TaskSpec("regression", (), words, metrics or ("pearson", "spearman"))
    classes = [*sorted({value for value in values if not isinstance(value, str)}), *texts]
    if not texts and classes and classes[0] >= 0 and classes[-1] < MAX_WORDS:
        # A class that no row of this data has keeps its number.
        classes = list(range(classes[-1] + 1))
    if len(classes) < 2:
        raise InputError(
            explain(f"labels of {task}", expected="two classes or more", found=classes)
        )
    if len(classes) > MAX_WORDS:
        raise InputError(
            explain(
                f"labels of {task}",
                expected=f"at most {MAX_WORDS} classes, or fractions for a regression",
                found=f"{len(classes)} different values",
                todo="Name the column with --target-column if they are free text; write numbers "
                "with a decimal point for a regression.",
            )
        )
    # 1 and "1" are one class.
    names = tuple(dict.fromkeys(str(value) for value in classes))
    return TaskSpec("classification", names, names, metrics or ("accuracy",))


def _grades(values: Sequence[float]) -> list[float]:
    """The values that a graded task's words stand for: its own, or 26 even steps."""
    distinct = sorted(set(values))
    if len(distinct) <= 26:
        return distinct
    low, high = distinct[0], distinct[-1]
    return [low + (high - low) * step / 25 for step in range(26)]


def encode_label(spec: TaskSpec, value: Any) -> Label:
    """The class number, or the float, of a label. Raises InputError for any other."""
    if spec.kind == "text":
        raise InputError(
            explain(
                "label",
                expected="free text, which the task has",
                found=repr(value),
                todo="Name its column with --target-column.",
            )
        )
    try:
        return float(value) if spec.kind == "regression" else spec.classes.index(str(value))
    except ValueError as error:
        wanted = "a number" if spec.kind == "regression" else f"one of {list(spec.classes)}"
        raise InputError(explain("label", expected=wanted, found=repr(value))) from error
