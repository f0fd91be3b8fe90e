"""New labels on old features: joined by id, nothing extracted again."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from cli_tools import done, refused, snapshot, write_rows
from model_tools import save_model, sentences, write_data
from sherl_pipe.cache import FeatureCache
from sherl_pipe.cache.fingerprint import example_id
from sherl_pipe.stages.words import PrefixTree
from transformers.models.t5.modeling_t5 import T5Stack

TEXTS = sentences(60)
TRAIN, VALIDATION = TEXTS[:40], TEXTS[40:]
Rows = list[dict[str, Any]]


def first_word(texts: list[str]) -> Rows:
    return [{"sentence": text, "label": len(text.split()[0]) % 2} for text in texts]


@pytest.fixture
def cache(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A cache of the texts; of BERT unless the test asks for another family."""
    family = getattr(request, "param", "bert")
    model = save_model(tmp_path / "model", family)
    data = write_data(tmp_path / "data")
    done("extract", "--model", model, "--data", data, "--cache", tmp_path / "cache")
    return tmp_path / "cache"


def attach(cache: Path, rows: dict[str, Rows], *options: object) -> tuple[object, ...]:
    """The command that attaches `rows` by role to the task `new`."""
    files = [write_rows(cache.parent / "new" / f"{role}.jsonl", r) for role, r in rows.items()]
    named = [part for file in files for part in ("--file", file)]
    return ("label", "--cache", cache, "--task", "new", *named, *options)


def features(cache: Path) -> dict[str, tuple[int, bytes]]:
    kept = snapshot(cache).items()
    return {k: v for k, v in kept if not k.startswith(("_labels/", "_lock", "_run"))}


def labels_by_text(cache: Path, role: str = "train") -> dict[str, str]:
    """What the cache says of every training text, joined by the id of the text."""
    table = FeatureCache.open(cache).tasks["new"][role]
    names = dict(zip(table.ids, (table.spec.classes[int(n)] for n in table.labels), strict=True))
    return {t: names[example_id((t,))] for t in TEXTS if example_id((t,)) in names}


def test_a_new_task_needs_no_new_features(cache: Path) -> None:
    before = features(cache)
    rows = {"train": first_word(TRAIN), "validation": first_word(VALIDATION)}
    for part in rows.values():
        random.Random(0).shuffle(part)  # order means nothing
    said = done(*attach(cache, rows)).out
    assert said == "new/train: 40 rows new or changed\nnew/validation: 20 rows new or changed\n"
    assert features(cache) == before
    for role, part in rows.items():
        assert labels_by_text(cache, role) == {row["sentence"]: str(row["label"]) for row in part}
    assert done(*attach(cache, rows)).out.count(": 0 rows") == 2
    runs = ("--out", cache.parent / "runs", "--epochs", 1, "--reduction", 1, "--json")
    (result,) = done("tune", "--cache", cache, "--task", "new", *runs).json
    assert (result["task"], result["examples"]) == ("new", 20)
    assert features(cache) == before


def test_labels_by_id_are_labels_by_text(cache: Path) -> None:
    rows = first_word(TRAIN)
    done(*attach(cache, {"train": rows}))
    by_text = labels_by_text(cache)
    ids = [{"id": example_id((row["sentence"],)).hex(), "gold": row["label"]} for row in rows]
    random.Random(1).shuffle(ids)
    options = ("--id-column", "id", "--label-column", "gold")
    assert ": 0 rows" in done(*attach(cache, {"train": rows[::-1]})).out
    done(*attach(cache, {"train": [row | {"label": 1 - row["label"]} for row in rows]}))
    done(*attach(cache, {"train": ids}, *options))
    assert labels_by_text(cache) == by_text
    (cache.parent / "any.csv").write_text(
        "phrase,gold\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in rows)
    )
    done("label", "--cache", cache, "--task", "new", "--file", cache.parent / "any.csv", "--role",
         "train", "--text-column", "phrase", "--label-column", "gold")  # fmt: skip
    assert labels_by_text(cache) == by_text


def test_changed_labels_replace_old_ones(cache: Path) -> None:
    rows = first_word(TRAIN)
    done(*attach(cache, {"train": rows}))
    rows[7]["label"] = 1 - rows[7]["label"]
    assert "new/train: 1 rows" in done(*attach(cache, {"train": rows})).out
    assert labels_by_text(cache)[TRAIN[7]] == str(rows[7]["label"])
    # Alone, the labels of a task may change their meaning altogether.
    words = [row | {"label": ["no", "yes"][row["label"]]} for row in rows]
    done(*attach(cache, {"train": words}))
    assert FeatureCache.open(cache).tasks["new"]["train"].spec.classes == ("no", "yes")


def test_gaps_are_allowed_on_request(cache: Path) -> None:
    rows = first_word(TRAIN)[:-3]
    missing = next(t for t in TRAIN[-3:])
    refused(3, "train.jsonl: example ", "of colour/train has no label", "--partial",
            argv=attach(cache, {"train": rows}))  # fmt: skip
    assert "new" not in FeatureCache.open(cache).tasks
    done(*attach(cache, {"train": rows}, "--partial"))
    assert missing not in labels_by_text(cache) and len(labels_by_text(cache)) == 37


def test_one_text_with_two_labels(cache: Path) -> None:
    """Two people may disagree on a text; an id is labelled once."""
    rows = first_word(TRAIN)
    other = {"sentence": TRAIN[0], "label": 1 - rows[0]["label"]}
    done(*attach(cache, {"train": [*rows, other]}))
    assert len(FeatureCache.open(cache).tasks["new"]["train"].ids) == 41
    ids = [{"id": example_id((r["sentence"],)).hex(), "label": r["label"]} for r in [*rows, other]]
    refused(3, "row 41: example", "is labelled twice: expected", "found",
            argv=attach(cache, {"train": ids}, "--id-column", "id"))  # fmt: skip
    done(*attach(cache, {"train": [*ids[:-1], ids[0]]}, "--id-column", "id"))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda rows: [*rows, {"sentence": "new", "label": 0}],
         ("train.jsonl, row 41: example", "not in the cache", "{'sentence': 'new', 'label': 0}")),
        (lambda rows: [*rows[:4], rows[4] | {"label": None}, *rows[5:]],
         ("train.jsonl, row 5, column 'label': expected a label", "found nothing")),
        (lambda rows: [row | {"label": 0} for row in rows], ("two classes or more, found [0]",)),
        (lambda rows: [{"sentence": row["sentence"]} for row in rows],
         ("columns: expected 'label', found ['sentence']", "--label-column")),
        (lambda rows: [{"phrase": row["sentence"], "label": 1} for row in rows],
         ("text columns: expected", "found ['label', 'phrase']", "--text-column")),
        (lambda _: [], ("train.jsonl has no rows",)),
    ],
)  # fmt: skip
def test_label_files_that_do_not_fit(cache: Path, change: Any, parts: tuple[str, ...]) -> None:
    before = snapshot(cache)
    refused(3, *parts, argv=attach(cache, {"train": change(first_word(TRAIN))}))
    assert snapshot(cache).keys() == before.keys()


@pytest.mark.parametrize("value", ["x", 7, -1, 0.5, "1.0"])
def test_labels_outside_the_task(cache: Path, value: object) -> None:
    """Where another split says what the labels mean."""
    done(*attach(cache, {"validation": first_word(VALIDATION)}))
    rows = first_word(TRAIN)
    rows[2]["label"] = value
    refused(3, "train.jsonl, row 3: label: expected one of ['0', '1'], found", "in one command",
            argv=attach(cache, {"train": rows}))  # fmt: skip
    assert list(FeatureCache.open(cache).tasks["new"]) == ["validation"]
    # One class alone is enough there.
    done(*attach(cache, {"train": [row | {"label": 1} for row in rows]}))


def test_ids_that_are_none(cache: Path) -> None:
    for value in ("", "abc", "zz" * 16, 5):
        rows = [{"id": value, "label": 0}, {"id": value, "label": 1}]
        refused(3, "row 1, column 'id': expected an example id (32 hex", f"found {value!r}",
                argv=attach(cache, {"train": rows}, "--id-column", "id"))  # fmt: skip
    rows = [{"id": "00" * 16, "label": 0}, {"id": "11" * 16, "label": 1}]
    refused(3, "row 1: example 00000", "is not in the cache",
            argv=attach(cache, {"train": rows}, "--id-column", "id"))  # fmt: skip


def test_odd_commands(cache: Path) -> None:
    file = write_rows(cache.parent / "new" / "train.jsonl", first_word(TRAIN))
    label = ("label", "--cache", cache, "--file", file, "--task")
    refused(3, "--file: expected one for each split, found 2 for the split 'train'",
            argv=(*label, "new", "--file", cache.parent / "data/colour/train.jsonl"))  # fmt: skip
    for name in ("../evil", "a b", ""):
        refused(8, f"task name {name!r}: expected letters", argv=(*label, name))
    refused(3, "columns: expected 'nope'", argv=(*label, "new", "--text-column", "nope"))


@pytest.mark.parametrize("cache", ["t5"], indirect=True)
def test_new_words_are_computed_without_the_encoder(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[bool] = []
    forward = T5Stack.forward

    def noted(stack: Any, *args: Any, **inputs: Any) -> Any:
        ran.append(bool(stack.is_decoder))
        return forward(stack, *args, **inputs)

    monkeypatch.setattr(T5Stack, "forward", noted)
    before = features(cache)
    words = ["good", "bad", "mixed"]
    rows = {
        role: [{"sentence": text, "label": words[len(text) % 3]} for text in texts]
        for role, texts in (("train", TRAIN), ("validation", VALIDATION))
    }
    done(*attach(cache, rows))
    assert ran and all(ran), "the encoder ran"
    after = features(cache)
    assert before.items() <= after.items()
    (stream,) = {name.split("/")[2] for name in after.keys() - before.keys()}
    assert stream.startswith("decoder-")
    # The nodes: the start, and what each word leads to; for every example of both splits.
    opened = FeatureCache.open(cache)
    tree = PrefixTree.from_json(opened.stream("colour/train", stream).notes["tree"])
    assert opened.stream("colour/train", stream).rows == 40 * len(tree.nodes)
    ran.clear()
    tune = ("tune", "--cache", cache, "--task", "new", "--out", cache.parent / "runs")
    (result,) = done(*tune, "--epochs", 1, "--reduction", 1, "--json").json
    assert ran and all(ran) and features(cache) == after
    assert json.loads((Path(result["folder"]) / "adapter_config.json").read_text())["labels"][
        "words"
    ] == sorted(words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_words_attached_later_have_the_states_of_words_extracted_at_once(
    tmp_path: Path, dtype: str
) -> None:
    data, words = tmp_path / "data", ("good", "bad")
    for task in ("colour", "mood"):
        for role, texts in (("train", TRAIN), ("validation", VALIDATION)):
            rows = [
                {"sentence": text, "label": words[len(text) % 2] if task == "mood" else number % 2}
                for number, text in enumerate(texts)
            ]
            write_rows(data / task / f"{role}.jsonl", rows)
    model = save_model(tmp_path / "model", "t5")
    extract = ("extract", "--model", model, "--data", data, "--template", "neutral",
               "--dtype", dtype, "--cache")  # fmt: skip
    done(*extract, tmp_path / "at_once")
    done(*extract, tmp_path / "later", "--task", "colour")
    files = [item for role in ("train", "validation")
             for item in ("--file", data / "mood" / f"{role}.jsonl")]  # fmt: skip
    done("label", "--cache", tmp_path / "later", "--task", "mood", *files)
    at_once, later = (
        {item for item in FeatureCache.open(tmp_path / each).content() if "colour/" in item[0]}
        for each in ("at_once", "later")
    )
    assert at_once == later
    assert len({key.split("/")[2] for key, _ in later if "/decoder-" in key}) == 2


@pytest.mark.parametrize("cache", ["t5"], indirect=True)
def test_words_of_one_task_do_not_stop_another(cache: Path) -> None:
    same = [{"sentence": text, "label": ["zebra", "zebu"][len(text) % 2]} for text in TRAIN]
    refused(3, "task new: label words 'zebra' and 'zebu' are the same to the tokenizer", "Rename",
            argv=attach(cache, {"train": same}))  # fmt: skip
    assert "new" not in FeatureCache.open(cache).tasks
    # A task without training rows is no reason not to tune the others.
    done(*attach(cache, {"validation": first_word(VALIDATION)}))
    tune = ("tune", "--cache", cache, "--out", cache.parent / "runs", "--epochs", 1)
    done(*tune, "--task", "colour", "--reduction", 1)
    refused(3, "expected a split named train, found ['validation']", argv=(*tune, "--task", "new"))
