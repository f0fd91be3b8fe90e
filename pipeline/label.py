"""Attach labels to texts or images, or pairs of them, that a cache already holds, joined by id."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sherl_pipe.cache import CacheWriter, FeatureCache, InputError, LabelTable, TaskSpec
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import ID_BYTES
from sherl_pipe.cache.labels import Label
from sherl_pipe.pipeline.label_pairs import attach_pairs
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.source import Source
from sherl_pipe.stages.targets import TEXT, encode_label, task_spec
from sherl_pipe.stages.templates import PictureTemplate, Template


@dataclass(frozen=True)
class LabelOptions:
    """How a label file is read.

    Attributes:
        id_column: hexadecimal example ids; else ids are made from the text columns, or from the
            images that the image column names.
        role: of the labels; the file's stem where None.
        target_column: of free text, which the labels are then.
        partial: accept examples of the split that get no label.
    """

    text_columns: tuple[str, ...] = ()
    image_column: str | None = None
    label_column: str | None = None
    target_column: str | None = None
    id_column: str | None = None
    role: str | None = None
    partial: bool = False


def attach_labels(
    cache: FeatureCache,
    task: str,
    files: Sequence[Path],
    options: LabelOptions,
    check: Callable[[str, TaskSpec], None] = lambda _, __: None,
) -> dict[str, int]:
    """Attach one task's labels; by role, how many rows are new or changed.

    Nothing is written unless `check` accepts what the labels mean.

    Raises InputError naming the first row or id that does not fit.
    """
    roles = [options.role or file.stem for file in files]
    for role in roles:
        if roles.count(role) > 1:
            raise InputError(
                explain(
                    "--file",
                    expected="one for each split",
                    found=f"{roles.count(role)} for the split {role!r}",
                    todo="A file is named by its split: train.jsonl, validation.jsonl, ...",
                )
            )
    if "image" in cache.identity.streams:
        _check_pairs(options)
        named = dict(zip(roles, files, strict=True))
        return attach_pairs(cache, task, named, options.text_columns, options.image_column)
    if options.target_column and "decoder" not in cache.identity.streams:
        raise InputError(
            explain(
                "target column",
                expected="a cache of a text-to-text model",
                found=str(cache.identity.backbone["model_type"]),
                todo="A causal model reads a target behind its text, which the cache does not "
                "hold: run `sherl-pipe extract` with --target-column on the same --cache.",
            )
        )
    read = [_read(cache, file, options) for file in files]
    others = [table for role, table in cache.tasks.get(task, {}).items() if role not in roles]
    # Labels of a part of a task's splits keep the meaning that the task has.
    values = [value for _, column in read for value in column]
    fresh = TEXT if options.target_column else None
    spec = others[0].spec if others else fresh or task_spec(task, values)
    if (spec.kind == "text") != (fresh is not None):
        raise InputError(
            explain(
                f"labels of {task}",
                expected=f"the kind of its other splits, {spec.kind}",
                found="free text" if fresh else "labels",
                todo="Attach all splits of the task in one command.",
            )
        )
    check(task, spec)
    tables = [
        LabelTable(task, role, spec, tuple(ids), tuple(_encode(spec, file, column)))
        for role, file, (ids, column) in zip(roles, files, read, strict=True)
    ]
    with CacheWriter.open(cache.path, cache.identity) as writer:
        return {table.role: writer.write_labels(table) for table in tables}


def _check_pairs(options: LabelOptions) -> None:
    """Raise InputError for what files of pairs do not have."""
    for name in ("id_column", "label_column"):
        given = getattr(options, name)
        if given:
            wanted = "none: the cache is of a dual encoder, which has pairs of texts and images"
            raise InputError(explain(name.replace("_", " "), expected=wanted, found=repr(given)))


def _encode(spec: TaskSpec, file: Path, values: Sequence[Any]) -> Iterator[Label]:
    for number, value in enumerate(values):
        if spec.kind == "text":
            yield value
            continue
        try:
            yield encode_label(spec, value)
        except InputError as error:
            raise InputError(
                f"{file}, row {number + 1}: {error} To change what the labels mean, attach all "
                "splits of the task in one command."
            ) from error


def _read(cache: FeatureCache, file: Path, options: LabelOptions) -> tuple[list[bytes], list[Any]]:
    """Ids and raw labels of a file."""
    columns = options.text_columns
    if options.id_column and not columns:
        columns = (options.id_column,)
    pictures = any(isinstance(each, PictureTemplate) for each in cache_templates(cache))
    for name, given in (("text", options.text_columns), ("image", options.image_column)):
        if given and pictures == (name == "text"):
            kind = "images" if pictures else "texts"
            raise InputError(
                explain(f"{name} column", expected=f"none: the cache holds {kind}", found=given)
            )
    (source,) = load_sources(
        str(file),
        text_columns=columns,
        label_column=options.label_column,
        target_column=options.target_column,
        images=pictures and not options.id_column,
        image_column=options.image_column,
    )
    if source.label_column is None and source.target_column is None:
        raise InputError(
            explain(
                f"{file}: columns",
                expected="'label'",
                found=sorted(source.rows[0]),
                todo="Name the column with --label-column.",
            )
        )
    values = source.targets() if source.target_column else source.labels()
    ids = (_given_ids if options.id_column else _ids_by_text)(cache, source, options)
    _check_ids(cache, source, ids, values, options)
    return ids, values


def _given_ids(_: FeatureCache, source: Source, options: LabelOptions) -> list[bytes]:
    ids = []
    for number, row in enumerate(source.rows):
        value = row.get(options.id_column or "")
        try:
            identity = bytes.fromhex(str(value))
        except ValueError:
            identity = b""
        if len(identity) != ID_BYTES:
            raise InputError(
                explain(
                    f"{source.origin}, row {number + 1}, column {options.id_column!r}",
                    expected=f"an example id ({2 * ID_BYTES} hexadecimal digits)",
                    found=repr(value),
                )
            )
        ids.append(identity)
    return ids


def _ids_by_text(cache: FeatureCache, source: Source, options: LabelOptions) -> list[bytes]:
    """Ids of the texts under the cache's template that knows most of them."""
    best: tuple[int, list[bytes]] | None = None
    named = options.text_columns
    for template in cache_templates(cache):
        if isinstance(template, PictureTemplate):
            return source.ids(template.reading(source.columns))
        if named and len(named) == len(template.columns):
            template = template.reading(named)
        if not set(template.columns) <= source.rows[0].keys():
            continue
        ids = source.ids(template)
        known = sum(identity in cache.places for identity in ids)
        if best is None or known > best[0]:
            best = known, ids
    if best is None:
        wanted = sorted({template.columns for template in cache_templates(cache)})
        raise InputError(
            explain(
                f"{source.origin}: text columns",
                expected=" or ".join(str(list(columns)) for columns in wanted),
                found=sorted(source.rows[0]),
                todo="Name as many columns with --text-column.",
            )
        )
    return best[1]


def cache_templates(cache: FeatureCache) -> list[Template]:
    """The distinct templates of a cache's splits."""
    found: dict[str, Template] = {}
    for split in cache.splits:
        for stream in cache.streams(split).values():
            if "template" in stream.notes:
                data = stream.notes["template"]
                found[str(data)] = Template.from_json(data)
    return list(found.values())


def _check_ids(
    cache: FeatureCache,
    source: Source,
    ids: Sequence[bytes],
    values: Sequence[Any],
    options: LabelOptions,
) -> None:
    """Raise for ids that the cache lacks, that contradict themselves, or that are left out."""
    labels: dict[bytes, Any] = {}
    counts: dict[str, int] = {}
    for number, (identity, value) in enumerate(zip(ids, values, strict=True)):
        where = f"{source.origin}, row {number + 1}"
        if identity not in cache.places:
            raise InputError(
                f"{where}: example {identity.hex()} is not in the cache {cache.path}. Extract it "
                f"first, or remove the row: {_short(source.rows[number])}"
            )
        if options.id_column and labels.setdefault(identity, value) != value:
            raise InputError(
                explain(
                    f"{where}: example {identity.hex()} is labelled twice",
                    expected=repr(labels[identity]),
                    found=repr(value),
                )
            )
        split = cache.places[identity][0]
        counts[split] = counts.get(split, 0) + 1
    split = max(counts, key=lambda name: counts[name])
    given = set(ids)
    for identity, (owner, _) in cache.places.items():
        if owner == split and identity not in given and not options.partial:
            raise InputError(
                f"{source.origin}: example {identity.hex()} of {split} has no label. Label every "
                "example, or allow gaps with --partial."
            )


def _short(row: Mapping[str, Any]) -> str:
    text = str(dict(row))
    return text if len(text) <= 120 else text[:117] + "..."
