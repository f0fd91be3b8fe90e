"""The command line from texts to predictions, as a person uses it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from cli_tools import done, refused, sherl, snapshot, write_rows
from model_tools import labels_of, save_model, sentences, write_data
from sherl_pipe.cache import FeatureCache
from sherl_pipe.pipeline import cli, entry
from sherl_pipe.stages.tokens import load_tokenizer, tokenize

TUNE = ("--epochs", 1, "--reduction", 1)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    made = {family: save_model(folder / family, family) for family in ("bert", "t5")}
    return made | {"other": save_model(folder / "other", "bert", seed=1)}


def found(data: Any, key: str, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every place in JSON at which `key` stands, with its value."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key:
                yield path, value
            yield from found(value, key, (*path, name))
    elif isinstance(data, list):
        for number, value in enumerate(data):
            yield from found(value, key, (*path, str(number)))


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_from_texts_to_predictions(tmp_path: Path, models: dict[str, str], family: str) -> None:
    data = write_data(tmp_path / "data", ("colour", "size"))
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    done("extract", "--model", models[family], "--data", data, "--cache", cache)

    description = done("inspect", "--cache", cache, "--json").json
    places = dict(found(description, "values"))
    opened = FeatureCache.open(cache)
    streams = {(s, n): stream for s in opened.splits for n, stream in opened.streams(s).items()}
    assert set(places) == {("splits", s, "streams", n) for s, n in streams}
    for (split, name), stream in streams.items():
        values = len(stream.spec.taps) * int(stream.layout.index[:, 2].sum()) * 36
        assert places["splits", split, "streams", name] == values
    assert sum(places.values()) > 0
    table = done("inspect", "--cache", cache).out
    assert all(split in table for split in opened.splits) and "int8" in table
    ids = done("inspect", "--cache", cache, "--ids", "colour/train").out.split()
    assert [opened.places[bytes.fromhex(each)] for each in ids] == [
        ("colour/train", position) for position in range(len(ids))
    ]
    assert done("inspect", "--cache", cache, "--ids", "colour/train", "--json").json == ids
    refused(3, "split of", "colour/train", "found 'mood'",
            argv=("inspect", "--cache", cache, "--ids", "mood"))  # fmt: skip

    assert "are whole" in done("verify", "--cache", cache).out
    tasks = ("--task", "colour", "--task", "size", "--seed", 0, "--seed", 3)
    results = done("tune", "--cache", cache, "--out", runs, *tasks, *TUNE, "--json").json
    assert [(r["task"], r["seed"]) for r in results] == [
        ("colour", 0), ("colour", 3), ("size", 0), ("size", 3)
    ]  # fmt: skip
    for result in results:
        names = {"colour": ["accuracy"], "size": ["pearson", "spearman"]}[result["task"]]
        assert list(result["metrics"]) == names and result["examples"] == 20
        record = json.loads((Path(result["folder"]) / "run.json").read_text())
        assert record["argv"][:2] == ["sherl-pipe", "tune"]
        assert record["cache"]["identity"] == opened.identity.fingerprint()
        assert record["config"]["tune"]["reduction"] == 1
    again = done("tune", "--cache", cache, "--out", runs, *tasks, *TUNE, "--json").json
    assert again == results  # to the second: nothing was tuned again
    table = done("tune", "--cache", cache, "--out", runs, *tasks, *TUNE).out
    assert "validation 20" in table and table.count("colour") == 2

    folder = results[0]["folder"]
    text = "the red [cat] :bird:"  # no markup of ours
    said = done("predict", "--adapter", folder, "--text", text, "--text", "a dog", "--json").out
    first, second = [json.loads(line) for line in said.splitlines()]
    assert first["text"][0].endswith(text) and second["text"][0].endswith("a dog")
    assert first["label"] in "01" and 0.5 <= first["probability"] <= 1
    assert text in done("predict", "--adapter", folder, "--text", text).out
    file = data / "colour" / "validation.jsonl"
    said = done("predict", "--adapter", folder, "--file", file, "--json").out
    labels = [json.loads(line)["label"] for line in said.splitlines()]
    expected = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    right = sum(label == str(wanted) for label, wanted in zip(labels, expected, strict=True))
    # The live model on the texts agrees with what was measured from the cache.
    assert right == pytest.approx(20 * results[0]["score"] / 100, abs=1)
    graded = done("predict", "--adapter", results[2]["folder"], "--text", text, "--json").json
    assert isinstance(graded["label"], float) and graded["probability"] is None
    refused(
        5,
        folder,
        "backbone fingerprint: expected",
        f"({models[family]}), found",
        argv=("predict", "--adapter", folder, "--model", models["other"], "--text", text),
    )


def test_one_cache_serves_four_labellings(tmp_path: Path, models: dict[str, str]) -> None:
    texts = sentences(60)
    for task in ("colour", "mood", "size", "parity"):
        for role, part in (("train", texts[:40]), ("validation", texts[40:])):
            rows = [
                {"sentence": t, "label": len(t) % 2 if task == "parity" else labels_of(task, t)}
                for t in part
            ]
            write_rows(tmp_path / "data" / task / f"{role}.jsonl", rows)
    model, cache = models["t5"], tmp_path / "cache"
    done("extract", "--model", model, "--data", tmp_path / "data", "--cache", cache,
         "--template", "neutral")  # fmt: skip
    opened = FeatureCache.open(cache)
    encoders = [opened.stream(split, "encoder") for split in opened.splits]
    rendered = [(f"sentence: {text}",) for text in texts]
    once = int(tokenize(load_tokenizer(model), rendered, 128).lengths.sum())
    assert sum(stream.rows for stream in encoders) == once
    assert sum(stream.examples for stream in encoders) == len(texts)
    results = done("tune", "--cache", cache, "--out", tmp_path / "runs", *TUNE, "--json").json
    assert [result["task"] for result in results] == ["colour", "mood", "parity", "size"]
    assert len({result["folder"] for result in results}) == 4


def test_extracting_again_does_nothing_and_new_labels_are_taken(
    tmp_path: Path, models: dict[str, str]
) -> None:
    data, cache = write_data(tmp_path / "data", ("colour", "mood")), tmp_path / "cache"
    argv = ("extract", "--model", models["bert"], "--data", data, "--cache", cache)
    done(*argv)
    before = snapshot(cache)
    assert "0 of 1" in done(*argv).out
    changes = {name for name, what in snapshot(cache).items() if what != before[name]}
    assert changes <= {"_run.json", "_lock"} and len(snapshot(cache)) == len(before)
    file = data / "colour" / "train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[:3]:
        row["label"] = 1 - row["label"]
    write_rows(file, rows)
    done(*argv)
    changes = {name for name, what in snapshot(cache).items() if what != before[name]}
    assert changes <= {"_run.json", "_lock", "_labels/colour/train.json"}
    labels = FeatureCache.open(cache).tasks["colour"]["train"].labels
    assert list(labels) == [row["label"] for row in rows]
    rows[5]["sentence"] += " cat"
    write_rows(file, rows)
    refused(5, "colour/train", "data (texts or their order)", "another --cache", argv=argv)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--codec", "float32"), "codec: expected {'name': 'float32'}"),
        (("--max-length", 9), "max_length: expected 9, found 64"),
        (("--template", "task"), "template: expected task, found neutral"),
        (("--dtype", "bfloat16"), "backbone dtype: expected bfloat16, found float32"),
        (("--model", "OTHER"), "backbone weights: expected"),
    ],
)
def test_a_cache_is_of_one_model_and_one_setting(
    tmp_path: Path, models: dict[str, str], options: tuple[Any, ...], field: str
) -> None:
    data, cache = write_data(tmp_path / "data", train=6, validation=3), tmp_path / "cache"
    argv = ("extract", "--model", models["bert"], "--data", data, "--cache", cache)
    done(*argv)
    options = tuple(models["other"] if each == "OTHER" else each for each in options)
    refused(5, str(cache), field, "another --cache", argv=(*argv, *options))


def test_another_tokenizer_is_another_model(tmp_path: Path, models: dict[str, str]) -> None:
    """Label words and inputs would be cut otherwise, and nothing else would tell."""
    model = shutil.copytree(models["t5"], tmp_path / "model")
    data, cache = write_data(tmp_path / "data", train=12, validation=6), tmp_path / "cache"
    extract = ("extract", "--model", model, "--data", data, "--cache", cache)
    done(*extract)
    tune = ("tune", "--cache", cache, "--out", tmp_path / "runs", *TUNE)
    (result,) = done(*tune, "--json").json
    file = model / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"swap"').replace('"dog"', '"cat"'))
    predict = ("predict", "--adapter", result["folder"], "--text", "a cat")
    label = ("label", "--cache", cache, "--task", "new", "--file", data / "colour/train.jsonl")
    for argv in (extract, tune, label, predict):
        refused(5, "tokenizer: expected", argv=argv)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_one_file_of_pairs(tmp_path: Path, models: dict[str, str], kind: str) -> None:
    rows = [[text, "a dog", str(len(text) % 2)] for text in sentences(30)]
    file, names = tmp_path / f"pairs.{kind}", ["left", "right", "verdict"]
    if kind == "parquet":
        pyarrow.parquet.write_table(
            pyarrow.table(dict(zip(names, zip(*rows, strict=True), strict=True))), file
        )
    else:
        file.write_text("\n".join(("," if kind == "csv" else "\t").join(r) for r in [names, *rows]))
    columns = ("--text-column", "left", "--text-column", "right")
    cache = tmp_path / "cache"
    done("extract", "--model", models["bert"], "--data", file, *columns, "--label-column",
         "verdict", "--cache", cache)  # fmt: skip
    assert FeatureCache.open(cache).splits == ["pairs/train"]
    said = done("tune", "--cache", cache, "--out", tmp_path / "runs", *TUNE).out
    assert "held-out " in said  # nobody may take these rows for a validation split
    (folder,) = (tmp_path / "runs" / "pairs").iterdir()
    one = ("predict", "--adapter", folder, "--text", "a cat", "--text", "a dog")
    assert done(*one, "--json").json["text"] == ["a cat", "a dog"]
    refused(3, "--text: expected 2 for each input", "found 3 texts", argv=(*one, "--text", "x"))
    said = done("predict", "--adapter", folder, "--file", file, "--json").out
    assert len(said.splitlines()) == 30
    swapped = done("predict", "--adapter", folder, "--file", file, *columns[2:], *columns[:2]).out
    assert f"a dog | {rows[0][0]}" in swapped


def test_a_folder_of_one_task_and_a_config_file(tmp_path: Path, models: dict[str, str]) -> None:
    data = write_data(tmp_path / "data", train=12, validation=6)
    config = tmp_path / "mine.yaml"
    text = (
        f"model: {models['bert']}\ncache: {tmp_path / 'cache'}\n"
        f"data:\n  source: {data / 'colour'}\n"
        f"tune:\n  epochs: 1\n  seed: [1, 2]\n  lr: [1e-2]\n  out: {tmp_path / 'runs'}\n"
    )
    config.write_text(text)
    said = done("run", config).out
    assert "colour/train" in said and said.count("accuracy") == 2
    assert len(list((tmp_path / "runs" / "colour").iterdir())) == 2
    config.write_text(text.replace("epochs", "epoch"))
    refused(3, "mine.yaml: unknown key 'tune.epoch'. Did you mean 'epochs'?", argv=("run", config))
    (tmp_path / "file").touch()
    for key, folder in (("cache", "cache"), ("out", "runs")):
        config.write_text(text.replace(str(tmp_path / folder), str(tmp_path / "file")))
        answer = sherl("run", config)
        assert answer.code == 3
        assert answer.err.startswith(f"error: {key}: expected a folder, new or old, found the file")


def test_a_damaged_cache(tmp_path: Path, models: dict[str, str]) -> None:
    data, cache = write_data(tmp_path / "data", train=6, validation=3), tmp_path / "cache"
    done("extract", "--model", models["bert"], "--data", data, "--cache", cache)
    file = max(cache.rglob("colour/train/hidden/values/c/*/*/*"), key=lambda each: each.name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    answer = sherl("verify", "--cache", cache)  # a line for each file that is wrong
    assert answer.code == 4 and answer.err.count("\n") == 2
    assert f"{file}: sha256: expected" in answer.err and "extract again" in answer.err
    out = ("--out", tmp_path / "runs")
    refused(4, str(file), "shard 0", "verify", argv=("tune", "--cache", cache, *out, *TUNE))


def test_interruptions_and_surprises_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(error: BaseException) -> None:
        def main(**_: Any) -> None:
            raise error

        monkeypatch.setattr(cli.cli, "main", main)

    fail(KeyboardInterrupt())
    refused(130, "interrupted; run the same command again to go on", argv=("tune",))
    fail(entry.Terminated())
    refused(143, "terminated; run the same command again to go on", argv=("tune",))
    within_ray = SystemError("returned a result with an exception set")
    within_ray.__cause__ = entry.Terminated()
    fail(within_ray)
    refused(143, "terminated; run the same command again to go on", argv=("tune",))
    fail(ZeroDivisionError("two\nlines"))
    refused(1, "unexpected ZeroDivisionError: two lines. Run with --debug", argv=("tune",))
    with pytest.raises(RuntimeError) as full:
        torch.empty(1 << 50)
    fail(full.value)
    asked = f"you tried to allocate {1 << 52} bytes"
    refused(1, "out of memory (", asked, "Lower --batch-tokens", argv=("tune",))
    fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB."))
    said = "out of memory (CUDA out of memory. Tried to allocate 2.00 GiB). Lower"
    refused(1, said, argv=("tune",))
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(torch.OutOfMemoryError):
        sherl("tune")


def test_a_preset_is_recorded_as_what_it_stands_for(tmp_path: Path, models: dict[str, str]) -> None:
    """And is the same tuning as its settings, one by one."""
    data, cache = write_data(tmp_path / "data", train=20, validation=9), tmp_path / "cache"
    done("extract", "--model", models["bert"], "--data", data, "--cache", cache)
    tune = ("tune", "--cache", cache, "--epochs", 1, "--out", tmp_path / "runs")
    (found,) = done(*tune, "--preset", "paper", "--json").json
    folder = Path(found["folder"])
    recorded = json.loads((folder / "run.json").read_text())["config"]["tune"]
    names = "preset", "late", "init", "head", "loss", "reduction"
    assert [recorded[name] for name in names] == ["paper", 1, "paper", "random", "words", 4]
    before = snapshot(tmp_path / "runs")
    one_by_one = ("--late", 1, "--init", "paper", "--head", "random")
    done(*tune, *one_by_one)
    assert snapshot(tmp_path / "runs") == before
    (other,) = done(*tune, "--preset", "paper", "--late", 2, "--json").json
    assert "late2-paper-" in other["folder"]
