"""An extraction that the disk cannot hold is refused before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_tools import done, refused, sherl, size_of, snapshot
from model_tools import save_model
from sherl_pipe.cache import StreamWriter
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline import opening, planning, space, staff
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.stages.amounts import Amount


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: size)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_extract_refuses_early_what_the_disk_cannot_hold(
    world: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = save_model(world / "model", family)
    argv = ("extract", "--model", model, "--data", "data", "--template", "task", "--cache", "new")
    done(*argv)
    size = size_of(world / "new")
    shutil.rmtree(world / "new")
    before = snapshot(world)
    free(monkeypatch, int(size * 0.85))  # any one split would fit, all of them do not
    message = refused(7, "new: the extraction needs about", f"{int(size * 0.85):,} are free",
                      "--codec", "sherl-pipe plan", argv=argv)  # fmt: skip
    told = int(message.split("about ")[1].split(" bytes")[0].replace(",", ""))
    assert told == pytest.approx(size, rel=0.1)
    assert snapshot(world) == before and not (world / "new").exists()
    plan = done("plan", *argv[1:], "--json").json
    assert plan["verdict"] == "no space" and plan["free_bytes"] == int(size * 0.85)
    # Above the estimate and far below the bound: it is measured, and goes on.
    free(monkeypatch, int(size * 1.12))
    done(*argv)
    # What is there already needs no more room.
    for manifest in list((world / "new" / "size").rglob("manifest.json")):
        shutil.rmtree(manifest.parent)
    free(monkeypatch, int(size * 0.7))
    done(*argv)
    assert size_of(world / "new") == size
    free(monkeypatch, 10)
    done(*argv)


def test_what_is_committed_needs_no_room(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(world / "model", "bert")
    small, commit, turns = staff.Extractor, StreamWriter.commit, iter(range(4))
    monkeypatch.setattr(staff, "Extractor", lambda *a, **k: small(*a, **k | {"shard_bytes": 1}))

    def interrupted(*args: Any) -> int:
        if next(turns, None) is None:
            raise KeyboardInterrupt  # at the fifth shard of many
        return commit(*args)

    monkeypatch.setattr(StreamWriter, "commit", interrupted)
    assert sherl("extract", "--model", model, "--data", "data", "--cache", "new").code == 130
    values = {"model": model, "data": {"source": "data"}, "cache": Path("new")}
    cache = space._begun(opening.prepare(make_config(values, "test")))
    assert cache is not None
    committed, shards = cache.incomplete["colour/train/hidden"]
    assert (committed, shards > 8) == (4, True)
    left = space._left(cache, Amount("colour/train", "hidden", 70, 700, 800, 1, 7000))
    assert left == pytest.approx(1 - 4 / shards)
    assert space._left(cache, Amount("size/train", "hidden", 70, 700, 800, 1, 7000)) == 1


def test_a_cache_of_another_codec_is_named_before_its_room(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("extract", "--model", save_model(world / "model", "bert"), "--data", "data")
    done(*argv)
    free(monkeypatch, 10)
    refused(5, "was made with another codec", argv=(*argv, "--codec", "float32"))


def test_an_extraction_with_room_measures_nothing(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(space, "measure_streams", never)
    for name in ("survey", "tokens_a_second"):
        monkeypatch.setattr(planning, name, never)
    done("extract", "--model", save_model(world / "model", "t5"), "--data", "data")
