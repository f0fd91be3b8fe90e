"""Inputs: templates, files of every kind, labels and what they mean."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from cli_tools import write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_tools import save_model
from sherl_pipe.cache import FeatureCache, InputError
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.steps import run_extract
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.targets import encode_label, label_tables, task_spec
from sherl_pipe.stages.templates import GLUE_COLUMNS, Template, make_template

# SPEC section 8, written out.
PUBLISHED = {
    "cola": "cola sentence: A",
    "sst2": "sst2 sentence: A",
    "mrpc": "mrpc sentence1: A sentence2: B",
    "rte": "rte sentence1: A sentence2: B",
    "wnli": "wnli sentence1: A sentence2: B",
    "stsb": "stsb sentence1: A sentence2: B",
    "qqp": "qqp question1: A question2: B",
    "qnli": "qnli question: A sentence: B",
    "mnli": "mnli premise: A hypothesis B",
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_templates(tmp_path: Path, task: str) -> None:
    row = dict(zip(GLUE_COLUMNS[task], "AB", strict=False)) | {"label": 1, "idx": 7}
    (source,) = load_sources(str(write_rows(tmp_path / f"{task}.jsonl", [row])))
    text = PUBLISHED[task]
    assert source.texts(make_template("task", task, source.columns, joined=True)) == [(text,)]
    neutral = text.removeprefix(f"{task} ")
    assert source.texts(make_template("neutral", task, source.columns, joined=True)) == [(neutral,)]
    pair = tuple("AB"[: len(source.columns)])
    assert source.texts(make_template("neutral", task, source.columns, joined=False)) == [pair]
    named = (f"{task} A", *pair[1:])
    assert source.texts(make_template("task", task, source.columns, joined=False)) == [named]
    assert (source.name, source.label_column) == (f"{task}/train", "label")


def test_all_glue_tasks_are_covered() -> None:
    assert set(PUBLISHED) == set(GLUE_COLUMNS)


def test_templates_round_trip_and_read_other_columns() -> None:
    template = make_template("task", "mnli", ("premise", "hypothesis"), joined=True)
    assert Template.from_json(json.loads(json.dumps(template.to_json()))) == template
    other = template.reading(("a", "b"))
    assert other.columns == ("a", "b")
    assert other.render({"a": "X", "b": "Y"}) == ("mnli premise: X hypothesis Y",)
    assert template.reading(("a", "a")).render({"a": "X"}) == ("mnli premise: X hypothesis X",)
    with pytest.raises(ValueError, match="zip"):
        template.reading(("a",))


def test_templates_that_make_no_sense() -> None:
    with pytest.raises(InputError, match="one or two, found"):
        make_template("neutral", "t", ("a", "b", "c"), joined=False)
    with pytest.raises(InputError, match="template: expected one of"):
        make_template("fancy", "t", ("a",), joined=True)


ROWS = [
    {"text": 'says "no", twice', "label": 1},
    {"text": "tab\tand\nline", "label": 0},
    {"text": "ünïcode 猫", "label": 2},
    {"text": "", "label": 1},
]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet", "csv with a mark"])
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    suffix, _, mark = kind.partition(" ")
    file = tmp_path / f"reviews.{suffix}"
    if suffix == "jsonl":
        write_rows(file, ROWS)
    elif suffix == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    else:
        with file.open("w", newline="", encoding="utf-8-sig" if mark else "utf-8") as out:
            writer = csv.DictWriter(
                out, ["text", "label"], delimiter="\t" if suffix == "tsv" else ","
            )
            writer.writeheader()
            writer.writerows(ROWS)
    (source,) = load_sources(str(file))
    assert (source.task, source.role, source.columns) == ("reviews", "train", ("text",))
    assert source.texts(make_template("neutral", "x", ("text",), joined=False)) == [
        (row["text"],) for row in ROWS
    ]
    assert source.labels() == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", b"", "x.csv has no rows"),
        ("x.csv", b"text,label\n", "x.csv has no rows"),
        ("x.csv", b"text,label\n\xfc,1\n", "x.csv: expected UTF-8"),
        ("x.csv", b"text,label\na, b,1\n", "x.csv, line 2: expected 2 cells, found 3"),
        ("x.csv", b'text,label\na,1\n"b,0\nc,1\n', "x.csv: the row that begins in line 3"),
        ("x.csv", b"text,label,label\na,1,0\n", "x.csv: two columns are named 'label'"),
        ("x.csv", b"text,label\na,1\nb\n", "x.csv, row 2, column 'label': expected a label"),
        ("x.csv", b"body,label\na,1\n", "x.csv: text columns: expected one of the usual names"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', "x.jsonl, line 2, is no JSON"),
        ("x.jsonl", b"[1]\n", "x.jsonl, line 1: expected a JSON object, found [1]"),
        (
            "x.jsonl",
            b'{"text": 5, "label": 0}\n',
            "row 1, column 'text': expected text, found int 5",
        ),
        ("x.jsonl", b'{"text": null, "label": 0}', "column 'text': expected text, found nothing"),
        ("x.jsonl", b'{"text": "\\ud800", "label": 0}', "expected text in Unicode, found half a"),
        ("x.jsonl", b'{"text": "a", "label": null}', "row 1, column 'label': expected a label"),
        ("x.jsonl", b'{"text": "a", "label": ""}', "expected a label (text or a finite number)"),
        ("x.jsonl", b'{"text": "a", "label": NaN}', "finite number), found nan"),
        ("x.jsonl", b'{"text": "a", "label": Infinity}', "finite number), found inf"),
        ("x.jsonl", b'{"text": "a", "label": [1]}', "finite number), found [1]"),
        ("x.parquet", b"hello", "x.parquet cannot be read"),
        ("x.txt", b"hello", "a name that ends in .jsonl, .csv, .tsv, .parquet, found 'x.txt'"),
    ],
)
def test_bad_files_name_the_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        (source,) = load_sources(str(tmp_path / name))
        source.labels()
        source.texts(make_template("neutral", "x", source.columns, joined=True))
    assert message in str(caught.value)


def test_a_folder_is_tasks_of_splits(tmp_path: Path) -> None:
    for name in ("b/validation", "b/train", "a/test", "a/train"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name, "label": 0}] * 3)
    (tmp_path / "b" / "readme.txt").touch()
    # Training data first: its shards own the texts that splits share.
    names = ["a/train", "a/test", "b/train", "b/validation"]
    assert [source.name for source in load_sources(str(tmp_path))] == names
    assert [source.name for source in load_sources(str(tmp_path), tasks=["b"])] == names[2:]
    assert [source.name for source in load_sources(str(tmp_path / "b"))] == names[2:]
    assert [len(source.rows) for source in load_sources(str(tmp_path), limit=2)] == [2] * 4
    for tasks in (["c"], ["b", "c"]):
        with pytest.raises(InputError, match=r"expected one of \['a', 'b'\], found 'c'"):
            load_sources(str(tmp_path), tasks=tasks)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected files <task>/<split>.*found none"):
        load_sources(str(tmp_path / "empty"))


def test_withheld_labels_are_no_class(tmp_path: Path) -> None:
    """GLUE's test files say -1 where the label is not public."""
    for role, labels in (("train", (0, 1, 0)), ("test", (-1, -1, -1))):
        rows = [{"sentence": f"{role} {n}", "label": label} for n, label in enumerate(labels)]
        write_rows(tmp_path / "cola" / f"{role}.jsonl", rows)
    sources = load_sources(str(tmp_path))
    assert [source.label_column for source in sources] == ["label", None]
    template = Template(((("", "sentence"),),))
    (table,) = label_tables(sources, {source.name: template for source in sources})
    assert (table.role, table.spec.classes) == ("train", ("0", "1"))


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ([1, 0, 1], ("0", "1")),
        ([2, 0], ("0", "1", "2")),  # a class that no row has keeps its number
        ([True, False], ("0", "1")),
        ([-1, 1], ("-1", "1")),
        ([1_700_000_000, 3], ("3", "1700000000")),  # and not every number between them
        (["good", "bad"], ("bad", "good")),
        (["1", "0"], ("0", "1")),  # a CSV file has text only
        (["0", 0, "x"], ("0", "x")),
    ],
)
def test_classes(tmp_path: Path, values: list[Any], classes: tuple[str, ...]) -> None:
    rows = [{"text": str(number), "label": value} for number, value in enumerate(values)]
    (source,) = load_sources(str(write_rows(tmp_path / "x.jsonl", rows)))
    (table,) = label_tables([source], {"x/train": Template(((("", "text"),),))})
    assert (table.spec.kind, table.spec.classes) == ("classification", classes)
    assert table.spec.words == classes
    found = [classes[int(label)] for label in table.labels]
    assert found == [str(int(v) if isinstance(v, bool) else v) for v in values]


def test_grades() -> None:
    stsb = task_spec("stsb", [0, 5, 3.25])
    assert stsb.kind == task_spec("stsb", [0, 5]).kind == "regression"
    assert stsb.words == tuple(f"{tenths / 10:.1f}" for tenths in range(0, 51, 2))
    assert task_spec("size", [1.0, 0.5, 1]).words == ("0.5", "1")
    many = task_spec("size", [number / 7 for number in range(100)])
    assert len(many.words) == 26 and (many.words[0], many.words[-1]) == ("0", "14.1429")
    # Grades that read the same are one word.
    assert task_spec("size", [0.5, 0.5 + 1e-9, 1.0]).words == ("0.5", "1")
    assert encode_label(stsb, 3) == 3.0


@pytest.mark.parametrize(
    ("task", "metrics"),
    [
        ("cola", ("matthews",)),
        ("sst2", ("accuracy",)),
        ("mrpc", ("accuracy", "f1")),
        ("qqp", ("accuracy", "f1")),
        ("mine", ("accuracy",)),
    ],
)
def test_metrics_are_glues(task: str, metrics: tuple[str, ...]) -> None:
    assert task_spec(task, [0, 1]).metrics == metrics
    assert task_spec("stsb", [0.0, 1.0]).metrics == ("pearson", "spearman")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", "a"], r"two classes or more, found \['a'\]"),
        ([0, 0], r"two classes or more, found \[0\]"),
        ([f"w{number}" for number in range(300)], "at most 256 classes.*found 300"),
        ([0.5, "high"], r"numbers only, found \['high'\] too"),
    ],
)
def test_labels_without_a_meaning(values: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        task_spec("mine", values)


def test_labels_of_another_meaning() -> None:
    with pytest.raises(InputError, match=r"one of \['0', '1'\], found 2"):
        encode_label(task_spec("mine", [0, 1]), 2)
    with pytest.raises(InputError, match="a number, found 'good'"):
        encode_label(task_spec("mine", [0.5, 1.0]), "good")


def test_odd_texts_are_extracted_or_counted(tmp_path: Path) -> None:
    """Empty, far too long, and twice with equal and with other labels."""
    texts = [("", 0), ("cat " * 500, 1), ("a dog", 0), ("a dog", 0), ("a dog", 1)]
    rows = [{"text": text, "label": label} for text, label in texts]
    config = make_config(
        {
            "model": save_model(tmp_path / "model", "bert"),  # has 64 positions
            "cache": tmp_path / "cache",
            "data": {"source": str(write_rows(tmp_path / "x.jsonl", rows))},
        },
        "test",
    )
    (report,) = run_extract(config, Bars(None))
    assert (report.examples, report.truncated, report.rows) == (3, 1, 2 + 64 + 4)
    cache = FeatureCache.open(tmp_path / "cache")
    assert cache.identity.max_length == 64
    table = cache.tasks["x"]["train"]
    assert table.labels == (0, 1, 0, 0, 1)
    assert len(set(table.ids[2:])) == 1 and set(table.ids) == set(cache.places)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(codec="utf-8")), min_size=1, unique=True))
def test_any_text_survives_its_file(tmp_path: Path, texts: list[str]) -> None:
    rows = [{"text": text, "label": 0} for text in texts]
    (source,) = load_sources(str(write_rows(tmp_path / "x.jsonl", rows)))
    found = source.texts(Template(((("", "text"),),)))
    assert found == [(text,) for text in texts]
    assert len({example_id(each) for each in found}) == len(texts)
