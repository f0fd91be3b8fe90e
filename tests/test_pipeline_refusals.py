"""The clumsy user: every wrong input is one line that says what to do, and the right exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cli_tools import done, refused, sherl, snapshot
from model_tools import save_model, write_data

OFFLINE = """
import sys
from sherl_pipe.pipeline import entry
for line in sys.argv[1:]:
    sys.argv = ["sherl-pipe", *line.split()]
    print(entry.run(), flush=True)
"""


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data, a cache and an adapter, under short names."""
    folder = tmp_path_factory.mktemp("desk")
    save_model(folder / "model", "bert")
    write_data(folder / "data", ("colour", "mood"), train=30, validation=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done("extract", "--model", "model", "--data", "data", "--cache", "cache")
        tune = ("tune", "--cache", "cache", "--task", "colour", "--epochs", 1, "--reduction", 1)
        (result,) = done(*tune, "--json").json
        shutil.move(result["folder"], "adapter")
        for name in ("weightless", "gibberish", "bare"):
            shutil.copytree("adapter", name)
        Path("weightless/adapter.safetensors").unlink()
        Path("gibberish/adapter_config.json").write_text('{"a":')
        Path("bare/adapter_config.json").write_text('{"a": 1}')
        shutil.copytree("adapter", "flipped")
        weights = bytearray(Path("flipped/adapter.safetensors").read_bytes())
        weights[-1] ^= 1
        Path("flipped/adapter.safetensors").write_bytes(weights)
        Path("file").write_text("x")
        Path("empty").mkdir()
    return folder


# Code, words that have to be there, command.
CASES = [
    # Words that no command knows.
    (2, "No such command 'extrct'. Did you mean 'extract'? See `sherl-pipe --help`.", "extrct"),
    (2, "No such option '--dta'. (Did you mean|See `sherl-pipe extract --help`", "extract --dta x"),
    (2, "Got unexpected extra argument (more)|See `sherl-pipe tune --help`", "tune --cache c more"),
    (2, "Missing option '--cache'. See `sherl-pipe tune --help`", "tune"),
    (2, "Option '--cache' requires an argument", "tune --cache"),
    (2, "give --text, --image or --file", "predict --adapter adapter"),
    (2, "give --text, --image or --file", "PREDICT --text a"),
    # Values out of range.
    (2, "'--max-length': 0 is not in the range x>=1", "extract --max-length 0"),
    (2, "'--limit': -3 is not in the range x>=1", "extract --limit -3"),
    (2, "'--codec': 'int2' is not one of 'float32', 'bfloat16', 'int8'", "extract --codec int2"),
    (
        2,
        "--taps: expected paper, all, or numbers such as 0,4,8, found 'some'",
        "extract --taps some",
    ),
    (3, "taps of the|expected 0 to 4, found [99]", "EXTRACT --taps 99"),
    (3, "expected 0 to 4, found [-1, 2]", "EXTRACT --taps=-1,2"),
    (2, "'--residency': 'disk' is not one of 'auto', 'device',", "TUNE --residency disk"),
    (2, "'--readers': 0 is not in the range x>=1", "TUNE --readers 0"),
    (
        3,
        "residency host: expected coded features of at most 7 B (the memory budget), found|"
        "Raise --memory-budget, or use --residency stream",
        "TUNE --residency host --memory-budget 7b",
    ),
    (2, "'--epochs': 0 is not in the range x>=1", "TUNE --epochs 0"),
    (2, "'--seed': -1 is not in the range x>=0", "TUNE --seed -1"),
    (2, "'--lr': 'fast' is not a valid float", "TUNE --lr fast"),
    (3, "tune.lr: expected greater than 0, found 0.0", "TUNE --lr 0"),
    (3, "tune.lr: expected a finite number, found inf", "TUNE --lr inf"),
    (3, "tune.warmup: expected less than 1, found 2.0", "TUNE --warmup 2"),
    (3, "tune.clip: expected greater than 0, found 0.0", "TUNE --clip 0"),
    (3, "reduction: expected 1 to 36, found 100", "TUNE --reduction 100"),
    (3, "late: expected 1 to 3 (4 blocks), found 9", "TUNE --late 9"),
    (3, "method: expected one of|found lora", "TUNE --method lora"),
    (3, "memory budget: expected such as 4GB or 512MiB, found lots", "TUNE --memory-budget lots"),
    (
        3,
        "device: expected auto, cpu, or a CUDA device of this machine, found gpu",
        "TUNE --device gpu",
    ),
    (3, "device: expected|found cuda:99", "EXTRACT --device cuda:99"),
    # Files and folders.
    (2, "'--cache'|'file' is a file", "extract --cache file"),
    (2, "'--cache'|'file' is a file", "tune --cache file"),
    (2, "'--out'|'file' is a file", "TUNE --out file"),
    (2, "'--adapter'|'file' is a file", "predict --adapter file --text a"),
    (
        2,
        "'--file': File 'nowhere.jsonl' does not exist",
        "predict --adapter adapter --file nowhere.jsonl",
    ),
    (2, "'--file': File 'data' is a directory", "predict --adapter adapter --file data"),
    (2, "File 'nowhere.yaml' does not exist", "run nowhere.yaml"),
    (2, "File 'data' is a directory", "run data"),
    (3, "nowhere is not a cache|or run extract first", "tune --cache nowhere"),
    (3, "empty is not a cache|or run extract first", "inspect --cache empty"),
    (3, "data is not a cache|or run extract first", "verify --cache data"),
    (
        3,
        "file: expected a name that ends in .jsonl, .csv,|found 'file'",
        "extract --model model --data file",
    ),
    (
        3,
        "data empty: expected files <task>/<split>|found none",
        "extract --model model --data empty",
    ),
    # Data.
    (3, "task of data: expected one of ['colour', 'mood'], found 'nope'", "EXTRACT --task nope"),
    (3, "task of data: expected|found 'nope'", "EXTRACT --task colour --task nope"),
    (
        3,
        "colour/train.jsonl: columns: expected 'nope', found ['label', 'sentence']",
        "EXTRACT --text-column nope",
    ),
    (3, "columns: expected 'nope'|--label-column", "EXTRACT --label-column nope"),
    (
        3,
        "task: expected one of ['colour', 'mood'], found 'nope'|sherl-pipe label",
        "TUNE --task colour --task nope",
    ),
    (3, "--text-column: expected 1 of them", "PREDICT --text-column sentence --text-column label"),
    (3, "columns: expected 'nope'", "PREDICT --text-column nope"),
    # Adapters.
    (
        3,
        "nowhere is no adapter|adapter_config.json is missing|tune",
        "predict --adapter nowhere --text a",
    ),
    (3, "cache is no adapter|adapter_config.json is missing", "predict --adapter cache --text a"),
    (
        3,
        "weightless is no adapter|adapter.safetensors is missing",
        "predict --adapter weightless --text a",
    ),
    (4, "flipped/adapter.safetensors: sha256: expected", "predict --adapter flipped --text a"),
    (
        8,
        "gibberish/adapter_config.json is no adapter config",
        "predict --adapter gibberish --text a",
    ),
    (8, "bare/adapter_config.json is no adapter config", "predict --adapter bare --text a"),
]
SHORT = {
    "EXTRACT": "extract --model model --data data --cache new",
    "TUNE": "tune --cache cache --out runs2",
    "PREDICT": "predict --adapter adapter --file data/colour/train.jsonl",
}


@pytest.mark.parametrize(("code", "words", "line"), CASES, ids=[line for *_, line in CASES])
def test_wrong_input(
    desk: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str, line: str
) -> None:
    monkeypatch.chdir(desk)
    before = snapshot(desk)
    for name, long in SHORT.items():
        line = line.replace(name, long)
    message = refused(code, *words.split("|"), argv=tuple(line.split()))
    assert len(message) < 600  # a person reads it
    assert snapshot(desk) == before  # and nothing was begun


def test_help_is_what_a_bare_call_gives() -> None:
    answer = sherl()
    assert answer.code == 2 and "Commands:" in answer.err + answer.out
    for command in ("extract", "tune", "run"):
        assert "Usage:" in done(command, "-h").out


def test_a_hub_out_of_reach_is_said_with_the_way_around(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "bert")
    write_data(tmp_path / "data", train=6, validation=3)
    lines = {
        "extract --model google-t5/t5-base --data data": (
            "'google-t5/t5-base'", "--model at a local folder", "config.json, model.safetensors"),
        "extract --model model": (
            "'glue'", "'nyu-mll/glue'", "--data at a folder NAME/<task>/<split>.jsonl"),
        "extract --model model --data glue/sst2": ("'glue/sst2'", "'nyu-mll/glue'", "--data at"),
        "extract --model model --data dta": (
            "'dta'", "no such folder or file here", "--text-column"),
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", OFFLINE, *lines],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["3"] * len(lines)
    messages = run.stderr.splitlines()
    assert len(messages) == len(lines), run.stderr
    for message, parts in zip(messages, lines.values(), strict=True):
        assert message.startswith("error: cannot ")
        assert all(part in message for part in parts), message


def test_no_labels_is_said_with_the_way_to_attach_some(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert")
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": f"cat {n}"}) + "\n" for n in range(5)))
    done("extract", "--model", model, "--data", file, "--cache", tmp_path / "cache")
    tune = ("tune", "--cache", tmp_path / "cache", "--out", tmp_path / "runs")
    refused(3, "has no labels", "sherl-pipe label --cache", argv=tune)
