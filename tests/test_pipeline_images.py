"""The commands on images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_tools import done, refused, sherl, snapshot, write_rows
from model_tools import picture, save_model, write_data, write_images
from sherl_pipe.cache import FeatureCache
from sherl_pipe.stages.pictures import Picture


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, images and their cache."""
    folder = tmp_path_factory.mktemp("images")
    save_model(folder / "vit", "vit")
    write_images(folder / "data", ("shade",))
    done("extract", *extract_options(folder))
    return folder


def extract_options(folder: Path, **other: Any) -> tuple[object, ...]:
    named = {"model": folder / "vit", "data": folder / "data", "cache": folder / "cache"} | other
    return "--taps", "all", *(part for key in named for part in (f"--{key}", named[key]))


def test_from_images_to_answers(world: Path, tmp_path: Path) -> None:
    described = done("inspect", "--cache", world / "cache", "--json").json
    streams = described["splits"]["shade/train"]["streams"]
    assert streams["hidden"]["examples"] == 40 and streams["hidden"]["tokens"] == 40 * 7
    assert described["max_length"] == 7
    assert described["tasks"]["shade"]["train"]["classes"] == ["above", "below"]
    tune = ("tune", "--cache", world / "cache", "--lr", "0.01", "--out", tmp_path / "runs")
    (result,) = done(*tune, "--json").json
    assert result["score"] > 90
    files = sorted((world / "data" / "shade" / "validation").rglob("*.png"))
    asked = [part for file in files for part in ("--image", file)]
    answers = done("predict", "--adapter", result["folder"], *asked, "--json").out.splitlines()
    found = [json.loads(line) for line in answers]
    assert [each["text"] for each in found] == [[str(file)] for file in files]
    right = [each["label"] == file.parent.name for each, file in zip(found, files, strict=True)]
    assert 100 * sum(right) / len(right) == pytest.approx(result["score"])
    listed = write_rows(
        world / "data" / "asked.jsonl",
        [{"photo": str(file.relative_to(world / "data"))} for file in files],
    )
    named = ("--file", listed, "--image-column", "photo", "--json")
    assert done("predict", "--adapter", result["folder"], *named).out.splitlines() == answers
    listed.unlink()
    shown = done("predict", "--adapter", result["folder"], "--image", files[0]).out
    assert "image" in shown and "probability" in shown
    adapter = ("--adapter", result["folder"])
    refused(3, "--text: expected --image", argv=("predict", *adapter, "--text", "a cat"))
    wrong = tmp_path / "wrong.png"
    wrong.write_bytes(files[0].read_bytes()[:60])
    refused(3, "wrong.png: expected a whole image", argv=("predict", *adapter, "--image", wrong))


def test_the_same_command_again_does_nothing(world: Path) -> None:
    before = snapshot(world / "cache", "shade")
    done("extract", *extract_options(world))
    assert snapshot(world / "cache", "shade") == before


def test_dtl_plus_needs_images(world: Path, tmp_path: Path) -> None:
    tune = ("tune", "--method", "dtl+", "--epochs", "1", "--out", tmp_path / "runs")
    (result,) = done(*tune, "--cache", world / "cache", "--json").json
    assert result["method"] == "dtl+"
    model = save_model(tmp_path / "bert", "bert")
    texts = {"model": model, "data": write_data(tmp_path / "data"), "cache": tmp_path / "cache"}
    done("extract", *extract_options(tmp_path, **texts))
    refused(3, "dtl+ has a convolution over patches", argv=(*tune, "--cache", tmp_path / "cache"))


def test_another_processor_is_another_model(world: Path, tmp_path: Path) -> None:
    moved = tmp_path / "vit"
    shutil.copytree(world / "vit", moved)
    file = moved / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_std": [0.4, 0.5, 0.5]}))
    tune = ("tune", "--cache", world / "cache", "--model", moved, "--out", tmp_path / "runs")
    refused(5, "image processor: expected", argv=tune)
    refused(5, "another tokenizer", argv=("extract", *extract_options(world, model=moved)))


def test_labels_by_file_and_by_id(world: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world / "cache", cache)
    files = sorted((world / "data" / "shade" / "train").rglob("*.png"))
    label = ("label", "--cache", cache, "--task")
    by_file = world / "data" / "train.csv"
    with by_file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["photo", "label"])
        rows.writerows(
            [str(file.relative_to(world / "data")), number % 3] for number, file in enumerate(files)
        )
    done(*label, "thirds", "--file", by_file, "--image-column", "photo")
    by_file.unlink()
    rows = [
        {"id": Picture(file, "").identity.hex(), "label": number % 3}
        for number, file in enumerate(files)
    ]
    by_id = write_rows(tmp_path / "train.jsonl", rows)
    done(*label, "again", "--file", by_id, "--id-column", "id")
    tables = FeatureCache.open(cache).tasks
    first, second = (tables[name]["train"] for name in ("thirds", "again"))
    assert dict(zip(first.ids, first.labels, strict=True)) == dict(
        zip(second.ids, second.labels, strict=True)
    )
    ids = set(done("inspect", "--cache", cache, "--ids", "shade/train").out.split())
    assert ids == {each.hex() for each in first.ids}
    picture(99).save(tmp_path / "new.png")
    odd = write_rows(tmp_path / "odd.jsonl", [{"image": "new.png", "label": 1}] * 2)
    missing = ("--file", odd, "--role", "train")
    refused(3, "is not in the cache", "new.png", argv=(*label, "odd", *missing))
    texts = (*label, "odd", *missing, "--text-column", "image")
    refused(3, "the cache holds images", argv=texts)


def test_plan_and_the_space_for_it(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = extract_options(world, cache=tmp_path / "cache")
    planned = done("plan", *options, "--json").json
    assert [each["tokens"] for each in planned["splits"].values()] == [40 * 7, 20 * 7]
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("sherl_pipe.cache.store.LocalStore.free_bytes", lambda _: 20_000)
    answer = sherl("extract", *options)
    assert answer.code == 7 and "the extraction needs about" in answer.err
    assert not (tmp_path / "cache").exists()


def test_images_that_cannot_be_read_stop_before_anything_is_written(
    world: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    options = extract_options(world, data=data, cache=tmp_path / "cache")
    broken = next((data / "shade" / "validation" / "above").iterdir())
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    refused(3, str(broken), "damaged", argv=("extract", *options))
    broken.write_bytes(b"")
    refused(3, str(broken), "an image", argv=("extract", *options))
    clear = picture(1).convert("RGBA")
    clear.putalpha(7)
    clear.save(broken)
    refused(3, str(broken), "transparent", argv=("extract", *options))
    assert not (tmp_path / "cache").exists()


def test_images_without_labels(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "loose"
    files = sorted((world / "data" / "shade" / "train").rglob("*.png"))[:5]
    (data / "train").mkdir(parents=True)
    for file in files:
        shutil.copy(file, data / "train")
    (data / "train" / "broken.png").write_bytes(files[0].read_bytes()[:99])
    options = extract_options(world, data=data, cache=tmp_path / "cache")
    refused(3, "broken.png", argv=("extract", *options))
    assert not (tmp_path / "cache").exists()
    (data / "train" / "broken.png").unlink()
    done("extract", *options)
    found = FeatureCache.open(tmp_path / "cache")
    assert found.stream("loose/train", "hidden").examples == 5 and not found.tasks


def test_what_a_model_of_images_does_not_take(world: Path, tmp_path: Path) -> None:
    model = ("extract", "--model", world / "vit", "--cache", tmp_path / "cache")
    refused(3, "data: expected images", argv=model)
    data = ("--data", world / "data")
    refused(3, "--image-column", argv=(*model, *data, "--text-column", "x"))
    refused(3, "template: expected", argv=(*model, *data, "--template", "task"))
    demo = ("extract", "--cache", tmp_path / "cache", "--image-column", "x")
    refused(3, "--text-column", argv=demo)
    (tmp_path / "pipeline.yaml").write_text(
        f"model: {world / 'vit'}\ncache: {tmp_path / 'cache'}\n"
        f"data: {{source: {world / 'data'}, image_columns: x}}\n"
    )
    refused(3, "Did you mean 'image_column'", argv=("run", tmp_path / "pipeline.yaml"))


def test_the_same_picture_is_kept_once(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "two"
    files = sorted((world / "data" / "shade" / "train").rglob("*.png"))[:6]
    for role, members in (("train", files), ("validation", files[:4])):
        for number, file in enumerate(members):
            target = data / role / str(number % 2) / f"{role}-{number}.bmp"
            target.parent.mkdir(parents=True, exist_ok=True)
            Picture(file, "").pixels().save(target)
    done("extract", *extract_options(world, data=data, cache=tmp_path / "cache"))
    found = FeatureCache.open(tmp_path / "cache")
    assert found.stream("two/train", "hidden").examples == 6
    assert found.stream("two/validation", "hidden").examples == 0
    assert found.stream("two/validation", "hidden").notes["reused"] == 4
