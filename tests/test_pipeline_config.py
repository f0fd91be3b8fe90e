"""One strict model for a whole run: what it takes, what it refuses, and in which words."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from cli_tools import done
from pydantic import ValidationError
from sherl_pipe.cache import InputError, StreamSpec
from sherl_pipe.pipeline import cli_stages
from sherl_pipe.pipeline.config import (
    DataConfig,
    ExtractConfig,
    RunConfig,
    TuneConfig,
    make_config,
    read_config,
)
from sherl_pipe.pipeline.machine import check_folder, parse_bytes, pick_device
from sherl_pipe.pipeline.opening import tunings
from sherl_pipe.stages.families import FAMILIES
from sherl_pipe.stages.settings import TuneSettings


def read(tmp_path: Path, text: str) -> RunConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return read_config(file)


@pytest.mark.parametrize(
    ("text", "key", "near"),
    [
        ("modell: bert", "modell", "model"),
        ("chache: x", "chache", "cache"),
        ("data:\n  sorce: x", "data.sorce", "source"),
        ("extract:\n  codecs: int8", "extract.codecs", "codec"),
        ("extract:\n  maxlength: 3", "extract.maxlength", "max_length"),
        ("tune:\n  epoch: 3", "tune.epoch", "epochs"),
        ("tune:\n  learning_rate: 3", "tune.learning_rate", "late"),
        ("model: bert\ntune:\n  lr: [0.1]\n  seeds: [1]", "tune.seeds", "seed"),
    ],
)
def test_unknown_keys_name_the_nearest_known_one(
    tmp_path: Path, text: str, key: str, near: str
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'run.yaml'}: unknown key {key!r}.")
    assert f"Did you mean {near!r}?" in message
    assert f"{near}," in message or f", {near}." in message  # among all the known ones


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune:\n  epochs: three", "tune.epochs: expected a whole number, found 'three'"),
        ("tune:\n  epochs: true", "tune.epochs: expected a whole number, found True"),
        ("tune:\n  epochs: 0", "tune.epochs: expected greater than 0, found 0"),
        ("tune:\n  epochs: 1.5", "tune.epochs: expected a whole number, found 1.5"),
        ("tune:\n  lr: [0]", "tune.lr: expected greater than 0, found 0"),
        ("tune:\n  lr: [.inf]", "tune.lr: expected a finite number, found inf"),
        ("tune:\n  lr: 3e-3", "tune.lr: expected a list, found '3e-3'"),
        ("tune:\n  seed: 0", "tune.seed: expected a list, found 0"),
        ("tune:\n  seed: [-1]", "tune.seed: expected greater than or equal to 0, found -1"),
        ("tune:\n  warmup: 1", "tune.warmup: expected less than 1, found 1"),
        ("tune:\n", "tune: expected a section with keys, found None"),
        ("tune: fast", "tune: expected a section with keys, found 'fast'"),
        ("model: 5", "model: expected text, found 5"),
        ("data:\n  tasks: sst2", "data.tasks: expected a list, found 'sst2'"),
        (
            "extract:\n  codec: zip",
            "extract.codec: expected 'float32', 'bfloat16', 'int8' or 'int4', found",
        ),
        (
            "extract:\n  taps: some",
            "extract.taps: expected 'paper' or 'all' or a list, found 'some",
        ),
        ("extract:\n  taps: [a]", "extract.taps: expected 'paper' or 'all' or a whole number, f"),
        ("1: x", "a key: expected text, found 1"),
    ],
)
def test_wrong_values_name_key_and_expectation(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert f"{tmp_path / 'run.yaml'}: {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tune: [1\nmodel: x", "line 2, is no YAML"),
        ("model: a\n\tdata: b", "line 2, is no YAML"),
        ("tune:\n  lr: [1]\ntune:\n  lr: [2]", "line 3, is no YAML: the key 'tune' stands twice"),
        ("tune:\n  lr: [1]\n  lr: [2]", "line 3, is no YAML: the key 'lr' stands twice"),
        ("model: !!python/object:os.system x", "line 1, is no YAML"),
        ("- model", "expected a mapping of keys, found list"),
        ("model", "expected a mapping of keys, found str"),
    ],
)
def test_broken_yaml_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xfc")
    for name in ("latin.yaml", "missing.yaml", "."):
        with pytest.raises(InputError, match="cannot be read"):
            read_config(tmp_path / name)


@pytest.mark.parametrize("text", ["", "# nothing but a remark\n", "---\n", "{}"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == RunConfig()


def test_what_is_written_reads_back_the_same(tmp_path: Path) -> None:
    config = make_config(
        {
            "model": "m",
            "cache": "c",
            "data": {"source": "d", "tasks": ["a"]},
            "extract": {"taps": [0, 2]},
            "tune": {"lr": ["3e-3"], "seed": [1, 2], "out": "o"},
        },
        "test",
    )
    assert config.tune.lr == (0.003,) and config.extract.taps == (0, 2)
    assert read(tmp_path, yaml.safe_dump(config.model_dump(mode="json"))) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.model = "another"


@pytest.mark.parametrize(
    ("model", "source", "data", "cache"),
    [
        ("demo", None, "demo", "cache/demo"),
        ("t5-base", None, "glue", "cache/glue"),
        ("t5-base", "glue/sst2", "glue/sst2", "cache/glue"),
        ("t5-base", "owner/reviews", "owner/reviews", "cache/reviews"),
        ("t5-base", "corpus.v2", "corpus.v2", "cache/corpus.v2"),
        ("t5-base", "reviews.csv", "reviews.csv", "cache/reviews"),
    ],
)
def test_cache_and_data_follow_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    source: str | None,
    data: str,
    cache: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("corpus.v2").mkdir()
    Path("reviews.csv").write_text("text\n")
    config = RunConfig(model=model, data=DataConfig(source=source))
    assert (config.data_source, config.cache_path) == (data, Path(cache))
    assert RunConfig(cache=Path("mine")).cache_path == Path("mine")


def configs(monkeypatch: pytest.MonkeyPatch, *argv: object) -> RunConfig:
    """The config that a command line makes."""
    seen: list[RunConfig] = []
    for name in ("_extract", "_plan", "_tune"):
        monkeypatch.setattr(cli_stages, name, lambda config, **_: seen.append(config))
    done(*argv)
    (config,) = seen
    return config


def test_command_line_and_config_have_the_same_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    assert configs(monkeypatch, "extract") == configs(monkeypatch, "plan") == RunConfig()
    assert configs(monkeypatch, "tune", "--cache", "c") == RunConfig(cache=Path("c"))


EXTRACT = """--model m --revision r --device cpu --cache c --data d --task t --text-column a
    --image-column i --label-column l --target-column w --limit 3 --codec float32 --taps 0,2
    --template task --max-length 9 --batch-tokens 10 --shard-mib 2 --dtype bfloat16"""
TUNE = """--cache c --device cpu --task t --method lst --preset paper --reduction 2 --late 2
    --lr 0.1 --lr 0.2 --epochs 3 --batch-size 5 --seed 4 --warmup 0.5 --weight-decay 0.1
    --clip 2 --init paper --pool first --head probe --loss vocabulary --precision bf16
    --together 3 --residency host --memory-budget 1GB --readers 3 --local-copies l
    --local-copies-size 2GB --out o"""


def test_every_option_reaches_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = "--workers", 2, "--ray-address", "h:1"
    config = configs(monkeypatch, "extract", *EXTRACT.split(), *workers)
    expected = {"model": "m", "revision": "r", "device": "cpu", "cache": Path("c")}
    expected["ray_address"] = "h:1"
    for name, value in expected.items():
        assert getattr(config, name) == value
    for given, default in ((config.data, DataConfig()), (config.extract, ExtractConfig())):
        for field in type(given).model_fields:
            assert getattr(given, field) != getattr(default, field), field
    costs = """--method lst --preset paper --reduction 2 --late 2 --epochs 3 --batch-size 5
        --residency host --memory-budget 1GB"""
    planned = configs(monkeypatch, "plan", *EXTRACT.split(), *costs.split(), "--tunings", 9)
    alone = config.extract.model_copy(update={"workers": None})
    assert (planned.data, planned.extract, planned.model) == (config.data, alone, "m")
    config = configs(monkeypatch, "tune", *TUNE.split(), *workers, "--retries", 1)
    assert config.ray_address == "h:1"
    for field in TuneConfig.model_fields:
        assert getattr(config.tune, field) != getattr(TuneConfig(), field), field
    assert config.tune.lr == (0.1, 0.2)
    shared = (
        "method",
        "preset",
        "reduction",
        "late",
        "epochs",
        "batch_size",
        "residency",
        "memory_budget",
    )
    for field in shared:
        assert getattr(planned.tune, field) == getattr(config.tune, field), field


def test_tunings_are_rates_times_seeds_and_have_folders_of_their_own() -> None:
    config = make_config({"tune": {"lr": [0.1, 0.2], "seed": [0, 1, 2]}}, "test")
    settings = tunings(config, FAMILIES["bert"], {"hidden": StreamSpec((0, 1, 2), 3, 8)})
    assert [(each.lr, each.seed) for each in settings] == [
        (lr, seed) for lr in (0.1, 0.2) for seed in (0, 1, 2)
    ]
    assert len({each.name for each in settings}) == 6


def test_defaults_follow_the_method_and_the_backbone() -> None:
    def usual(method: str, streams: dict[str, StreamSpec]) -> tuple[int, str, float]:
        family = FAMILIES["t5" if "encoder" in streams else "bert"]
        (found,) = tunings(make_config({"tune": {"method": method}}, "test"), family, streams)
        return found.late, found.head, found.lr

    blocks = StreamSpec((0, 1, 2), 3, 8)
    t5 = {"encoder": blocks, "decoder": blocks}
    assert usual("sherl", t5) == (1, "random", 3e-3)
    assert usual("sherl", {"hidden": blocks}) == (2, "probe", 6e-3)
    assert usual("sherl", {"hidden": StreamSpec((0, 1), 2, 8)}) == (1, "probe", 6e-3)
    assert usual("lst", {"hidden": blocks})[:2] == (0, "random")
    config = make_config({"tune": {"late": 1, "head": "random"}}, "test")
    (asked,) = tunings(config, FAMILIES["bert"], {"hidden": blocks})
    assert (asked.late, asked.head) == (1, "random")


def test_presets_are_what_was_published() -> None:
    blocks = StreamSpec((0, 1, 2), 3, 8)
    t5 = {"encoder": blocks, "decoder": blocks}

    def found(streams: dict[str, StreamSpec], **tune: object) -> tuple[object, ...]:
        family = FAMILIES["t5" if "encoder" in streams else "bert"]
        config = make_config({"tune": {"preset": "paper", **tune}}, "test")
        (each,) = tunings(config, family, streams)
        return each.late, each.init, each.head, each.loss

    assert found({"hidden": blocks}) == (1, "paper", "random", "words")
    assert found(t5) == (1, "paper", "random", "vocabulary")
    assert found(t5, method="lst") == (0, "fisher", "random", "vocabulary")
    assert found({"hidden": blocks}, method="lst") == (0, "random", "random", "words")
    # The middle, which this cache lacks.
    wide = StreamSpec((0, 3), 4, 8)
    assert found({"hidden": wide}, method="dtl") == (2, "paper", "random", "words")
    # What is given wins.
    asked = {"late": 2, "init": "residual", "head": "probe", "loss": "words"}
    assert found({"hidden": blocks}, **asked) == tuple(asked.values())
    with pytest.raises(InputError, match="preset: expected 'paper', found 'papers'"):
        make_config({"tune": {"preset": "papers"}}, "test")


def test_any_other_setting_is_another_folder() -> None:
    usual = TuneSettings()
    others = [
        replace(usual, **{field.name: "else" if isinstance(field.default, str) else 7})
        for field in fields(usual)
    ]
    assert len({usual.name, *(each.name for each in others)}) == 1 + len(others)
    assert usual.name == "sherl-r4-late1-residual-lr0.003-e10-b32-seed0"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("7b", 7),
        ("4GB", 4_000_000_000),
        ("4 GiB", 4 << 30),
        ("512MiB", 512 << 20),
        ("512m", 512_000_000),
        (" 1.5k ", 1500),
        ("2TiB", 2 << 40),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-4GB", "4XB", "GB", "1e3", "5ib", "4 G B", "0x10"])
def test_no_bytes(text: str) -> None:
    with pytest.raises(InputError, match="such as 4GB or 512MiB, found"):
        parse_bytes(text)


def test_no_budget_is_half_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1001))
    assert parse_bytes(None) == 500


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:99", "mps", ""])
def test_devices_that_are_not_there(name: str) -> None:
    with pytest.raises(InputError, match=f"found {name}"):
        pick_device(name)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_folders_may_be_new_but_no_files(tmp_path: Path) -> None:
    assert check_folder(tmp_path, "out") == tmp_path
    assert check_folder(tmp_path / "new", "out") == tmp_path / "new"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="out: expected a folder.*found the file"):
        check_folder(tmp_path / "file", "out")
