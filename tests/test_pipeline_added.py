"""Taps that are added to a cache, from the command line."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import done, refused, sherl, snapshot, write_rows
from model_tools import labels_of, save_model, sentences, write_data
from sherl_pipe.cache import CacheWriter, FeatureCache, StreamWriter
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline import space
from sherl_pipe.stages import quantize


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """t5-gated has four decoder blocks and five of the encoder's."""
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(folder / family, family) for family in ("bert", "t5-gated")}


def extract(models: dict[str, str], family: str, data: Path, cache: Path, *more: object) -> Any:
    options = ("--model", models[family], "--data", data, "--cache", cache, *more)
    return done("extract", *options, "--dtype", "float32")


def values(cache: Path, taps: dict[str, Sequence[int]]) -> dict[str, Any]:
    """All values of some taps, read as a batch reads them."""
    found = {}
    opened = FeatureCache.open(cache)
    for split in opened.splits:
        for name, stream in opened.streams(split).items():
            wanted = taps[name.split("-")[0]]
            for shard in range(stream.layout.shards):
                data = stream.read_shard(shard, wanted)
                codes = torch.from_numpy(data.codes)
                scales = None if data.scales is None else torch.from_numpy(data.scales)
                coded = (codes, scales, stream.spec.width, data.picks)
                found[f"{split}/{name}/{shard}"] = quantize.decode(stream.codec, *coded).numpy()
    return found


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["bert", "t5-gated"])
def test_added_taps_are_those_of_one_extraction(
    tmp_path: Path, models: dict[str, str], family: str, codec: str
) -> None:
    """Nothing that was there is touched, and what is read is as if there had been one group."""
    data = write_data(tmp_path / "data", train=9, validation=4)
    some, every = tmp_path / "some", tmp_path / "every"
    extract(models, family, data, every, "--codec", codec, "--taps", "all")
    extract(models, family, data, some, "--codec", codec, "--taps", "0,3")
    first = {"hidden": [0, 3], "encoder": [0, 3, 5], "decoder": [0, 3]}
    before, old = snapshot(some, "colour"), values(some, first)
    extract(models, family, data, some, "--codec", codec, "--taps", "1")
    extract(models, family, data, some, "--codec", codec, "--taps", "all")
    now = snapshot(some, "colour")
    assert {name: now[name] for name in before} == before
    for name, expected in values(some, first).items():
        np.testing.assert_array_equal(expected, old[name])
    wanted = {"hidden": [4, 1, 0, 3, 2], "encoder": [4, 5, 1, 0], "decoder": [1, 2, 0]}
    together, apart = values(every, wanted), values(some, wanted)
    assert together.keys() == apart.keys()
    for name, expected in together.items():
        error = np.abs(apart[name] - expected).max() / np.abs(expected).max()
        # A tap that is coded as it is and not as a difference is rounded otherwise.
        assert error < {"float32": 1e-9, "bfloat16": 1e-9, "int8": 0.03, "int4": 0.4}[codec], name
    assert "files of 2 splits are whole" in done("verify", "--cache", some).out
    streams = done("inspect", "--cache", some, "--json").json["splits"]["colour/train"]["streams"]
    main = streams["hidden" if family == "bert" else "encoder"]
    assert main["taps"] == list(range(5 if family == "bert" else 6))
    assert main["added"][0] == [1]
    # Texts that come later get all taps at once, and label words of theirs too.
    later = tmp_path / "later" / "mood"
    rows = [{"sentence": f"{each} .", "label": labels_of("mood", each)} for each in sentences(6, 9)]
    write_rows(later / "train.jsonl", rows)
    extract(models, family, later.parent, some, "--codec", codec)
    cache = FeatureCache.open(some)
    assert cache.incomplete == {}
    for split in ("mood/train", "colour/validation"):
        for name, stream in cache.streams(split).items():
            assert list(stream.spec.taps) == list(cache.identity.held(name.split("-")[0]).taps)


LACKING = {
    "sherl": ("bert", "0,1", "hidden"),
    "dtl": ("bert", "0,1", "hidden"),
    "unipt": ("bert", "3", "hidden"),
    "weighted": ("bert", "3", "hidden"),
    "lst": ("bert", "2,3", "hidden"),
    "linear": ("t5-gated", "0", "decoder"),
}


@pytest.mark.parametrize("method", LACKING)
def test_a_method_that_lacks_a_tap_names_the_command_that_adds_it(
    tmp_path: Path, models: dict[str, str], method: str
) -> None:
    family, taps, stream = LACKING[method]
    data = write_data(tmp_path / "my data", train=30, validation=10)
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    extract(models, family, data, cache, "--taps", taps, "--max-length", 50, "--codec", "int4")
    late = {"dtl": ("--late", 2), "linear": ("--late", 0)}.get(method, ())
    tune = ("tune", "--cache", cache, "--method", method, "--epochs", 1, "--out", runs, *late)
    message = refused(3, f"taps of the {stream} stream", "Here: ", argv=tune)
    assert not runs.exists() or not [*runs.rglob("*")]
    command = shlex.split(message.split("Here: ")[1])
    assert command[:2] == ["sherl-pipe", "extract"]
    done(*command[1:])
    done(*tune)
    assert FeatureCache.open(cache).verify() == []


def test_finished_tunings_stay_finished(tmp_path: Path, models: dict[str, str]) -> None:
    """An addition of which a tuning reads nothing changes nothing for it."""
    data, cache = write_data(tmp_path / "data", train=30, validation=10), tmp_path / "cache"
    extract(models, "bert", data, cache)
    tune = ("tune", "--cache", cache, "--epochs", 1, "--out", tmp_path / "runs", "--method")
    done(*tune, "sherl")
    done(*tune, "weighted")
    before = snapshot(tmp_path / "runs")
    extract(models, "bert", data, cache, "--taps", "4")
    done(*tune, "sherl")
    assert snapshot(tmp_path / "runs") == before
    done(*tune, "weighted")  # reads all that there is
    assert snapshot(tmp_path / "runs") != before


@pytest.mark.parametrize("family", ["bert", "t5-gated"])
@pytest.mark.slow
def test_an_interrupted_addition(
    tmp_path: Path, models: dict[str, str], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is finished the old taps are read; the same command then does the rest."""
    data, cache = write_data(tmp_path / "data", train=30, validation=10), tmp_path / "cache"
    extract(models, family, data, cache, "--taps", "0,3")
    whole = shutil.copytree(cache, tmp_path / "whole")
    added = ("--taps", "1,2")
    extract(models, family, data, whole, *added)
    real, left = StreamWriter.commit, iter(range(100))
    wanted = {"hidden": [0, 3], "encoder": [0, 3, 5], "decoder": [0, 3]}
    old = values(cache, wanted)
    tune = ("tune", "--cache", cache, "--method", "weighted", "--epochs", 1, "--json", "--out")

    def dying(*args: Any) -> int:
        if next(turns, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    for count in left:
        turns = iter(range(count % 2))
        monkeypatch.setattr(StreamWriter, "commit", dying)
        options = ("--model", models[family], "--data", data, "--cache", cache, *added)
        code = sherl("extract", *options).code
        monkeypatch.setattr(StreamWriter, "commit", real)
        if code == 0:
            break
        assert code == 130
        for name, expected in values(cache, wanted).items():
            np.testing.assert_array_equal(expected, old[name])
        opened = FeatureCache.open(cache)
        assert opened.verify() == []
        assert any(name.endswith(".1") for name in opened.incomplete)
        if count < 2:  # tuning goes on from the old taps, even while somebody writes
            with CacheWriter.open(cache, opened.identity):
                done(*tune, tmp_path / f"runs{count}")
    assert count > 2
    assert FeatureCache.open(cache).content() == FeatureCache.open(whole).content()


def test_taps_of_texts_that_are_not_at_hand(tmp_path: Path, models: dict[str, str]) -> None:
    """A task uses what its own splits hold; others keep what they have."""
    data, cache = write_data(tmp_path / "data", ("colour",), 30, 10), tmp_path / "cache"
    extract(models, "bert", data, cache, "--taps", "0,3")
    other = tmp_path / "other" / "mood"
    texts = [f"{each} ." for each in sentences(40, 5)]
    rows = [{"sentence": each, "label": labels_of("mood", each)} for each in texts]
    write_rows(other / "train.jsonl", rows[:30])
    write_rows(other / "validation.jsonl", rows[30:])
    extract(models, "bert", other.parent, cache, "--taps", "1")
    opened = FeatureCache.open(cache)
    assert opened.specs(["mood/train"])["hidden"].taps == (0, 1, 3)
    assert opened.specs()["hidden"].taps == (0, 3)
    assert opened.incomplete.keys() == {"colour/train/hidden.1", "colour/validation/hidden.1"}
    assert "incomplete: colour/train/hidden.1" in done("verify", "--cache", cache).out
    tune = (
        "tune",
        "--cache",
        cache,
        "--epochs",
        1,
        "--method",
        "unipt",
        "--out",
        tmp_path / "runs",
    )
    done(*tune, "--task", "mood")
    done(*tune, "--task", "colour")


def test_room_for_an_addition(
    tmp_path: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sherl_pipe.pipeline import opening
    from sherl_pipe.pipeline.config import make_config
    from sherl_pipe.stages.amounts import Amount

    data, cache = write_data(tmp_path / "data", train=30, validation=10), tmp_path / "cache"
    extract(models, "bert", data, cache, "--taps", "0,3")
    values = {"model": models["bert"], "data": {"source": str(data)}, "cache": cache}
    wanted = {**values, "extract": {"taps": (0, 1, 2, 3)}}
    begun = space._begun(opening.prepare(make_config(wanted, "test")))
    assert begun is not None
    train = Amount("colour/train", "hidden", 30, 300, 400, 1, 3000)
    assert space._left(begun, train) == 0
    assert space._left(begun, train, 4) == pytest.approx((1 + space.FIRST_TAP) / 4)
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: 10)
    options = ("--model", models["bert"], "--data", data, "--cache", cache)
    refused(7, "the extraction needs about", argv=("extract", *options, "--taps", "1"))
    assert not (cache / "_taps").exists()
    done("extract", *options, "--taps", "0,3")
