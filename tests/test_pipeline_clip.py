"""The commands on a dual encoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import done, refused, sherl, snapshot, write_rows
from clip_tools import save_clip, write_pairs
from sherl_pipe.cache.store import LocalStore

CHANCE = 100 / 12  # that one of twelve held-out images is the right one


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs and their cache."""
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder / "clip")
    write_pairs(folder / "data")
    done("extract", *extract_options(folder))
    return folder


def extract_options(folder: Path, **other: Any) -> tuple[object, ...]:
    named = {
        "model": folder / "clip",
        "data": folder / "data" / "shapes",
        "cache": folder / "cache",
        "codec": "float32",
    } | other
    return tuple(part for key in named for part in (f"--{key}", named[key]))


def tune_options(folder: Path, out: Path) -> tuple[object, ...]:
    return "tune", "--cache", folder / "cache", "--lr", 0.01, "--epochs", 32, "--out", out


@pytest.mark.slow
def test_from_pairs_to_ranked_images(world: Path, tmp_path: Path) -> None:
    streams = done("inspect", "--cache", world / "cache", "--json").json["splits"]["shapes/train"]
    assert streams["streams"]["image"]["examples"] == 72  # each once, of 144 pairs
    assert streams["streams"]["text"]["examples"] == 24
    tune = tune_options(world, tmp_path)
    results = done(*tune, "--seed", 0, "--seed", 1, "--json").json
    assert [result["examples"] for result in results] == [12, 12]
    for result in results:
        assert result["metrics"]["t2i_r1"] > 4 * CHANCE and result["metrics"]["i2t_r1"] > 4 * CHANCE
    folder = results[0]["folder"]
    # Alone it is the same to the byte, and what is finished stays.
    (alone,) = done(*tune_options(world, tmp_path / "alone"), "--json").json
    files = [Path(each["folder"]) / "adapter.safetensors" for each in (alone, results[0])]
    assert files[0].read_bytes() == files[1].read_bytes()
    before = snapshot(Path(folder))
    assert done(*tune, "--json").json[0]["metrics"] == results[0]["metrics"]
    assert snapshot(Path(folder)) == before
    # Live, the held-out images are found as they were in the cache.
    rows = [
        json.loads(line)
        for line in (world / "data" / "shapes" / "validation.jsonl").read_text().splitlines()
    ]
    images = [world / "data" / "shapes" / row["image"] for row in rows]
    asked = [part for row in rows for part in ("--text", row["caption"])]
    asked += [part for image in images for part in ("--image", image)]
    predict = ("predict", "--adapter", folder)
    lines = done(*predict, *asked, "--top", 1, "--json").out.splitlines()
    found = [json.loads(line) for line in lines]
    assert [each["text"] for each in found] == [row["caption"] for row in rows]
    right = [
        each["images"][0]["image"] == str(image) for each, image in zip(found, images, strict=True)
    ]
    assert 100 * sum(right) / len(right) == pytest.approx(results[0]["metrics"]["t2i_r1"])
    shown = done(*predict, "--text", "a red circle", "--image", world / "data" / "images").out
    assert shown.count(".png") == 5 and "cosine" in shown
    only = ("--text", "a red circle")
    refused(3, "--text and --image", argv=(*predict, *only))
    (tmp_path / "none").mkdir()
    refused(3, "a folder of images", argv=(*predict, *only, "--image", tmp_path / "none"))
    refused(3, "--text 1", "an empty one", argv=(*predict, "--text", " ", "--image", images[0]))


def test_new_pairs_need_no_new_features(world: Path, tmp_path: Path) -> None:
    before = snapshot(world / "cache", "shapes/")
    rows = [
        json.loads(line)
        for line in (world / "data" / "shapes" / "train.jsonl").read_text().splitlines()
    ]
    for row in rows:
        row["image"] = str((world / "data" / "shapes" / row["image"]).resolve())
    file = write_rows(tmp_path / "train.jsonl", rows[1::2])
    label = ("label", "--cache", world / "cache", "--task", "long", "--file")
    assert "long/train: 72 rows" in done(*label, file).out
    assert "long/train: 0 rows" in done(*label, file).out
    after = snapshot(world / "cache", "shapes/")
    assert {name: each for name, each in after.items() if name in before} == before
    tune = ("tune", "--cache", world / "cache", "--task", "long", "--epochs", 1, "--out", tmp_path)
    (result,) = done(*tune, "--method", "unipt", "--json").json
    assert result["role"] == "held-out" and result["method"] == "unipt"
    odd = write_rows(tmp_path / "odd.jsonl", [{**rows[0], "caption": "a small cat"}])
    refused(3, "'a small cat'", "in the cache", argv=(*label, odd, "--role", "train"))
    refused(3, "label column: expected none", argv=(*label, file, "--label-column", "caption"))
    refused(3, "id column: expected none", argv=(*label, file, "--id-column", "caption"))
    (world / "cache" / "_labels" / "long" / "train.json").unlink()


def test_what_does_not_fit_is_refused(world: Path, tmp_path: Path) -> None:
    tune = (*tune_options(world, tmp_path), "--task", "shapes")
    known = "expected one of ['sherl', 'unipt']"
    refused(3, "method on a dual encoder", known, argv=(*tune, "--method", "lst"))
    refused(3, "head: expected", "probe", argv=(*tune, "--head", "probe"))
    refused(3, "late: expected 0", argv=(*tune, "--late", 1))
    refused(3, "batch size: expected 2 or more", argv=(*tune, "--batch-size", 1))
    refused(3, "reduction: expected 1 to 20", argv=(*tune, "--reduction", 21))
    new = {"cache": tmp_path / "new"}
    extract = ("extract", *extract_options(world, **new))
    refused(3, "label column: expected none", argv=(*extract, "--label-column", "caption"))
    refused(3, "template: expected", argv=(*extract, "--template", "task"))
    refused(3, "columns: expected", argv=(*extract, "--text-column", "title"))
    refused(3, "plan: expected", argv=("plan", *extract_options(world, **new)))
    refused(3, "data: expected images", argv=("extract", "--model", world / "clip"))
    refused(3, "taps of the text", "expected 0 to 3", argv=(*extract, "--taps", "0,4"))
    assert not (tmp_path / "new").exists()
    images = {**new, "data": world / "data" / "images"}
    assert sherl("extract", *extract_options(world, **images)).code == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "gone.png", "caption": "a red circle"}], "gone.png"),
        ([{"image": "here.png", "caption": ""}], "an empty text"),
        ([{"image": "here.png"}], "found nothing"),
        ([{"caption": "a red circle"}], "image column"),
        ([{"image": "torn.png", "caption": "a red circle"}], "torn.png"),
    ],
)
def test_odd_pairs_are_refused_before_anything_is_written(
    world: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    whole = next((world / "data" / "images").iterdir()).read_bytes()
    (tmp_path / "here.png").write_bytes(whole)
    (tmp_path / "torn.png").write_bytes(whole[:50])
    good = {"image": "here.png", "caption": "a red circle"}
    file = write_rows(tmp_path / "train.jsonl", [{**good}, *rows] if "image" in rows[0] else rows)
    other = {"data": file, "cache": tmp_path / "cache"}
    refused(3, message, argv=("extract", *extract_options(world, **other)))
    assert not (tmp_path / "cache").exists()


def test_one_image_is_nothing_to_tell_apart(world: Path, tmp_path: Path) -> None:
    image = next((world / "data" / "images").iterdir())
    rows = [{"image": str(image), "caption": text} for text in ("a red bar", "one big bar")]
    file = write_rows(tmp_path / "one.jsonl", rows)
    done("extract", *extract_options(world, data=file, cache=tmp_path / "cache"))
    tune = ("tune", "--cache", tmp_path / "cache", "--out", tmp_path)
    refused(3, "too few to hold some out", argv=tune)


def test_a_full_disk_is_foreseen(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"bytes": 10_000}
    monkeypatch.setattr(LocalStore, "free_bytes", lambda _: free["bytes"])
    extract = ("extract", *extract_options(world, cache=tmp_path / "cache"))
    refused(7, "the extraction needs about", argv=extract)
    # Between what is needed without compression and the bound that is tried first.
    free["bytes"] = 1_200_000
    done(*extract)
