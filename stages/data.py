"""Inputs and tasks: files or the hub -> rendered texts, ids, labels with their meaning."""

from __future__ import annotations

import csv
import json
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sherl_pipe.cache import InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.cache.labels import Label

DEMO_DATA = "demo"
TEMPLATES = ("task", "neutral")
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")

# GLUE's text fields as in the published runs (SPEC section 8); a field without a colon there has
# none here.
GLUE: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "rte": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "qnli": ("question", "sentence"),
    "mnli": ("premise", "hypothesis"),
}
_NO_COLON = {("mnli", "hypothesis")}
GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
}
_USUAL_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"), ("question", "sentence"))

# More label words than this are no classes but free text.
MAX_WORDS = 256


@dataclass(frozen=True)
class Template:
    """How the columns of a row become the text segments of an input.

    Attributes:
        segments: per segment, pieces (prefix, column) that are joined by a blank.
    """

    segments: tuple[tuple[tuple[str, str], ...], ...]

    def render(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts of a row. Raises KeyError for a column that it lacks."""
        return tuple(
            " ".join(f"{prefix}{row[column]}" for prefix, column in pieces)
            for pieces in self.segments
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column for pieces in self.segments for _, column in pieces)

    def reading(self, columns: Sequence[str]) -> Template:
        """The same texts from columns of other names, one for each of `columns`, in order."""
        names = dict(zip(self.columns, columns, strict=True))
        return Template(
            tuple(tuple((prefix, names[old]) for prefix, old in each) for each in self.segments)
        )

    def to_json(self) -> list[Any]:
        return [[list(piece) for piece in pieces] for pieces in self.segments]

    @classmethod
    def from_json(cls, data: Any) -> Template:
        return cls(tuple(tuple((p, c) for p, c in pieces) for pieces in data))


def make_template(kind: str, task: str, columns: Sequence[str], *, seq2seq: bool) -> Template:
    """The template of a task.

    A text-to-text backbone reads one string, `task name: value ...`; `neutral` leaves the task's
    name out. An encoder reads the columns as one or two segments, `task` putting the name before
    the first.
    """
    if kind not in TEMPLATES:
        raise InputError(explain("template", expected=f"one of {TEMPLATES}", found=kind))
    lead = f"{task} " if kind == "task" else ""
    if seq2seq:
        pieces = []
        for number, column in enumerate(columns):
            colon = "" if (task, column) in _NO_COLON else ":"
            pieces.append((f"{lead if number == 0 else ''}{column}{colon} ", column))
        return Template((tuple(pieces),))
    if len(columns) > 2:
        raise InputError(
            explain("text columns of an encoder", expected="one or two", found=list(columns))
        )
    return Template(
        tuple(((lead if number == 0 else "", column),) for number, column in enumerate(columns))
    )


@dataclass(frozen=True)
class Source:
    """One split of one task as it was found.

    Attributes:
        task, role: such as `sst2` and `train`.
        rows: one mapping per row.
        columns: the text columns.
        label_column: None where there are no labels.
        origin: file or hub id, for messages.
    """

    task: str
    role: str
    rows: Sequence[Mapping[str, Any]]
    columns: tuple[str, ...]
    label_column: str | None
    origin: str

    @property
    def name(self) -> str:
        """The split's name in a cache."""
        return f"{self.task}/{self.role}"

    def texts(self, template: Template) -> list[tuple[str, ...]]:
        """Rendered segments of every row. Raises InputError for a missing or odd value."""
        return [self._render(number, row, template) for number, row in enumerate(self.rows)]

    def labels(self) -> list[Any]:
        """The raw label of every row. Raises InputError for a row without one."""
        values = [row.get(self.label_column or "") for row in self.rows]
        if all(isinstance(value, str) for value in values):
            values = _numbers(values)
        for number, value in enumerate(values):
            good = isinstance(value, (int, float, str)) and value != ""
            if not good or (isinstance(value, float) and not math.isfinite(value)):
                raise InputError(
                    explain(
                        f"{self.origin}, row {number + 1}, column {self.label_column!r}",
                        expected="a label (text or a finite number)",
                        found="nothing" if value is None else repr(value),
                        todo="Give every row a label, or remove the row.",
                    )
                )
        # JSON's true and false are classes 1 and 0.
        return [int(value) if isinstance(value, bool) else value for value in values]

    def _render(self, number: int, row: Mapping[str, Any], template: Template) -> tuple[str, ...]:
        for column in template.columns:
            check_text(row.get(column), f"{self.origin}, row {number + 1}, column {column!r}")
        return template.render(row)


def check_text(value: Any, where: str) -> None:
    """Raise InputError unless `value` is text that a tokenizer can read."""
    if not isinstance(value, str):
        found = "nothing" if value is None else f"{type(value).__name__} {value!r}"
        raise InputError(explain(where, expected="text", found=found))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            explain(where, expected="text in Unicode", found=f"half a character in {value!r}")
        ) from error


def load_sources(
    data: str,
    *,
    text_columns: Sequence[str] = (),
    label_column: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
) -> list[Source]:
    """Find the splits that `data` names.

    Args:
        data: `demo`; a folder `NAME/<task>/<split>.{jsonl,csv,tsv,parquet}` or `<task>/<split>.*`;
            one such file; `glue`, `glue/<task>` or another hub id.
        text_columns: columns that hold the text; guessed for GLUE and the usual names.
        label_column: `label` where it exists by default.
        tasks: keep these only.
        limit: keep the first rows of every split.

    Raises InputError naming the file and row.
    """
    path = Path(data)
    if data == DEMO_DATA and not path.exists():
        found = _demo()
    elif path.is_file():
        found = [(path.stem, "train", _read_file(path), str(path))]
    elif path.is_dir():
        found = list(_folder(path))
    else:
        found = list(_hub(data, tasks))
    known = sorted({task for task, *_ in found})
    if not known:
        raise InputError(
            explain(
                f"data {data}",
                expected=f"files <task>/<split> that end in {', '.join(SUFFIXES)}",
                found="none",
                todo="Point --data at such a folder, or at one file.",
            )
        )
    for task in tasks:
        if task not in known:
            raise InputError(
                explain(f"task of {data}", expected=f"one of {known}", found=repr(task))
            )
    sources = []
    for task, role, rows, origin in found:
        if tasks and task not in tasks:
            continue
        rows = rows[:limit] if limit is not None else rows
        if not rows:
            raise InputError(f"{origin} has no rows. Remove it or fill it.")
        columns, label = _columns(task, rows[0], text_columns, label_column, origin)
        sources.append(Source(task, role, rows, columns, label, origin))
    return sources


_Found = tuple[str, str, Sequence[Mapping[str, Any]], str]


def _folder(path: Path) -> Iterator[_Found]:
    files = [file for file in sorted(path.iterdir()) if file.suffix in SUFFIXES]
    folders = [(path.resolve().name, files)] if files else []
    for folder in sorted(path.iterdir()):
        if folder.is_dir():
            inner = [file for file in sorted(folder.iterdir()) if file.suffix in SUFFIXES]
            folders.append((folder.name, inner))
    for task, members in folders:
        # Training data first, so that its shards own the texts that splits share.
        for file in sorted(members, key=lambda file: (file.stem != "train", file.stem)):
            yield task, file.stem, _read_file(file), str(file)


def _demo() -> list[_Found]:
    from sherl_pipe.stages.demo.data import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(folder)
        return [
            (task, role, rows, f"demo/{task}/{role}")
            for task, role, rows, _ in _folder(Path(folder))
        ]


def _hub(data: str, tasks: Sequence[str]) -> Iterator[_Found]:
    name, _, task = data.partition("/") if data.startswith("glue/") else (data, "", "")
    wanted: Sequence[str | None] = [None]
    if name == "glue":
        name = "nyu-mll/glue"
        wanted = [task] if task else [known for known in GLUE if not tasks or known in tasks]
    try:
        import datasets

        datasets.disable_progress_bars()
        for config in wanted:
            for split, content in datasets.load_dataset(name, config).items():
                if not split.startswith("test"):  # GLUE's test labels are not public
                    origin = f"{name} {config or ''} {split}".replace("  ", " ")
                    yield config or name.rsplit("/", 1)[-1], split, content.to_list(), origin
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"cannot find the data {data!r}: there is no such folder or file here, and the hub "
            f"did not give the data set {name!r} ({' '.join(str(error).split())[:160]}). Point "
            "--data at a folder NAME/<task>/<split>.jsonl, or at one file with --text-column."
        ) from error


def _read_file(path: Path) -> list[Mapping[str, Any]]:
    """Rows of one file. Raises InputError naming the line."""
    if path.suffix not in SUFFIXES:
        raise InputError(
            explain(
                f"{path}",
                expected=f"a name that ends in {', '.join(SUFFIXES)}",
                found=repr(path.name),
            )
        )
    try:
        if path.suffix == ".jsonl":
            return _read_jsonl(path)
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows: list[Mapping[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
            return rows
        return _read_table(path, "\t" if path.suffix == ".tsv" else ",")
    except UnicodeDecodeError as error:
        raise InputError(
            explain(
                f"{path}",
                expected="UTF-8",
                found=f"another encoding ({error})",
                todo="Convert the file to UTF-8.",
            )
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from error


def _read_table(path: Path, delimiter: str) -> list[Mapping[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    rows: list[Mapping[str, Any]] = []
    # Spreadsheets put a byte order mark first. Strict, because a stray quote would otherwise make
    # one cell of many lines.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter, strict=True)
        try:
            names = [name for name in reader.fieldnames or () if name]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise InputError(f"{path}: two columns are named {twice!r}. Rename one of them.")
            for row in reader:
                extra = row.get(None, ())
                if extra:
                    raise InputError(
                        explain(
                            f"{path}, line {reader.line_num}",
                            expected=f"{len(row) - 1} cells",
                            found=len(row) - 1 + len(extra),
                            todo=f"Put texts that hold {delimiter!r} in double quotes.",
                        )
                    )
                rows.append(row)
        except csv.Error as error:
            raise InputError(
                f"{path}: the row that begins in line {reader.line_num + 1} cannot be read: "
                f"{error}. Inside a quoted text, write a quote twice; or use jsonl."
            ) from error
    return rows


def _read_jsonl(path: Path) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}, line {number}, is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(
                    explain(f"{path}, line {number}", expected="a JSON object", found=repr(row))
                )
            rows.append(row)
    return rows


def _columns(
    task: str,
    row: Mapping[str, Any],
    text_columns: Sequence[str],
    label_column: str | None,
    origin: str,
) -> tuple[tuple[str, ...], str | None]:
    """Text and label columns of a split."""
    for asked in (*text_columns, *([label_column] if label_column else [])):
        if asked not in row:
            raise InputError(
                explain(
                    f"{origin}: columns",
                    expected=repr(asked),
                    found=sorted(map(str, row)),
                    todo="Name columns that are there with --text-column and --label-column.",
                )
            )
    label = label_column or ("label" if "label" in row else None)
    if text_columns:
        return tuple(text_columns), label
    for columns in (GLUE.get(task, ()), *sorted(_USUAL_COLUMNS, key=len, reverse=True)):
        if columns and all(column in row for column in columns):
            return columns, label
    raise InputError(
        explain(
            f"{origin}: text columns",
            expected="one of the usual names, or --text-column",
            found=sorted(map(str, row)),
            todo="Name the columns with --text-column (twice for pairs).",
        )
    )


def label_tables(sources: Iterable[Source], templates: Mapping[str, Template]) -> list[LabelTable]:
    """The labels of every labelled split, by example id.

    Args:
        sources: splits; those of one task share the meaning of their labels.
        templates: by split name; what ids are made from.
    """
    by_task: dict[str, list[Source]] = {}
    for source in sources:
        if source.label_column is not None:
            by_task.setdefault(source.task, []).append(source)
    tables = []
    for task, members in by_task.items():
        values = {source.name: source.labels() for source in members}
        spec = task_spec(task, [value for column in values.values() for value in column])
        for source in members:
            ids = [example_id(texts) for texts in source.texts(templates[source.name])]
            labels = [encode_label(spec, value) for value in values[source.name]]
            tables.append(LabelTable(task, source.role, spec, tuple(ids), tuple(labels)))
    return tables


def _numbers(values: list[Any]) -> list[Any]:
    """Text labels of a CSV file as numbers where all of them are."""
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return values


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
                todo="Free-text targets are not classes; write numbers with a decimal point "
                "for a regression.",
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
    try:
        return float(value) if spec.kind == "regression" else spec.classes.index(str(value))
    except ValueError as error:
        wanted = "a number" if spec.kind == "regression" else f"one of {list(spec.classes)}"
        raise InputError(explain("label", expected=wanted, found=repr(value))) from error
