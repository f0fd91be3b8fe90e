"""Commands on a cache in an object store, as a person types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import done, refused, sherl, write_rows
from model_tools import save_model, write_data
from s3_tools import SECRET, Wire, every
from sherl_pipe.cache import FeatureCache, remote
from sherl_pipe.stages.adapter_files import WEIGHTS_NAME

TUNE = ("--epochs", 2, "--reduction", 1, "--json")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {family: save_model(folder / family, family) for family in ("bert", "t5")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "SHORTEST", 0.005)
    monkeypatch.setattr(remote, "LONGEST", 0.02)


def weights(results: Any) -> list[bytes]:
    return [(Path(each["folder"]) / WEIGHTS_NAME).read_bytes() for each in results]


@pytest.mark.parametrize(
    ("family", "residency", "fault"), [("t5", "stream", "lost"), ("bert", "host", "503")]
)
def test_a_tuning_from_a_bucket_is_that_from_a_folder(
    tmp_path: Path, models: dict[str, str], wire: Wire, url: str,
    family: str, residency: str, fault: str,
) -> None:  # fmt: skip
    data, near = write_data(tmp_path / "data", ("colour",)), tmp_path / "near"
    extract = ("extract", "--model", models[family], "--data", data, "--cache")
    done(*extract, near)
    wire.fault = every(7, fault)
    assert f"cache {url}" in done(*extract, url).out
    assert FeatureCache.open(url).content() == FeatureCache.open(near).content()
    assert f"{url}: " in done("verify", "--cache", url).out
    described = [done("inspect", "--cache", each, "--json").json for each in (near, url)]
    assert described[0]["splits"] == described[1]["splits"]
    assert "0 of 1" in done(*extract, url).out  # nothing is left to do

    tune = ("tune", "--residency", residency, *TUNE)
    home = done(*tune, "--cache", near, "--out", tmp_path / "a").json
    wire.seen.clear()
    far = done(*tune, "--cache", url, "--out", tmp_path / "b").json
    assert weights(home) == weights(far)
    assert [each["metrics"] for each in home] == [each["metrics"] for each in far]
    kept = list((tmp_path / "home-cache").rglob("??/*"))
    gets = [e.key for e in wire.seen if e.method == "GET" and "/values/c/" in e.key and e.status]
    if residency == "stream":
        assert kept and len(set(gets)) <= len(kept)
    else:
        assert not kept and gets
    record = json.loads((Path(far[0]["folder"]) / "run.json").read_text())
    assert record["cache"]["path"] == record["config"]["cache"] == url
    assert SECRET not in json.dumps(record)
    answer = done("predict", "--adapter", far[0]["folder"], "--text", "a red cat", "--json")
    assert answer.json["label"] in "01"


@pytest.mark.slow
def test_workers_write_to_a_bucket_and_read_from_it(
    tmp_path: Path, models: dict[str, str], wire: Wire, url: str
) -> None:
    """What one process writes into a folder, and trains from it."""
    data, near = write_data(tmp_path / "data", ("colour",), train=400), tmp_path / "near"
    extract = ["extract", "--model", models["bert"], "--data", data, "--codec", "float32"]
    extract += ["--shard-mib", 1, "--batch-tokens", 256, "--device", "cpu", "--cache"]
    done(*extract, near)
    wire.fault = every(9, "503")
    done(*extract, url, "--workers", 2)
    assert FeatureCache.open(url).content() == FeatureCache.open(near).content()
    tune = ("tune", *TUNE, "--lr", 0.003, "--lr", 0.01, "--residency", "stream")
    home = done(*tune, "--cache", near, "--out", tmp_path / "a").json
    far = done(*tune, "--cache", url, "--out", tmp_path / "b", "--workers", 2).json
    assert weights(home) == weights(far)
    assert [each["metrics"] for each in home] == [each["metrics"] for each in far]


def test_from_a_file_with_new_labels(
    tmp_path: Path, models: dict[str, str], wire: Wire, url: str
) -> None:
    data = write_data(tmp_path / "data", ("colour",))
    copies = tmp_path / "copies"
    settings = {
        "model": models["bert"],
        "cache": url,
        "data": {"source": str(data)},
        "tune": {
            "epochs": 1, "reduction": 1, "residency": "stream", "out": str(tmp_path / "runs"),
            "local_copies": str(copies), "local_copies_size": "1MB",
        },
    }  # fmt: skip
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(settings))
    assert "colour" in done("run", file).out
    assert list(copies.glob("??/*")) and not (tmp_path / "home-cache").exists()
    texts = [json.loads(line) for line in (data / "colour/train.jsonl").read_text().splitlines()]
    rows = [{"sentence": each["sentence"], "label": n % 2} for n, each in enumerate(texts)]
    labels = write_rows(tmp_path / "train.jsonl", rows)
    said = done("label", "--cache", url, "--task", "parity", "--file", labels).out
    assert f"parity/train: {len(rows)} rows" in said
    assert sorted(FeatureCache.open(url).tasks) == ["colour", "parity"]
    plan = done("plan", "--model", models["bert"], "--data", data, "--cache", url, "--json").json
    assert plan["free_bytes"] is None and plan["codecs"]["int8"]["fits"] is True


def test_errors_have_their_codes(
    tmp_path: Path, models: dict[str, str], wire: Wire, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", ("colour",))
    extract = ("extract", "--model", models["bert"], "--data", data, "--cache", url)
    refused(3, f"{url} is not a cache", argv=("inspect", "--cache", url))
    done(*extract)
    store = remote.RemoteStore(FeatureCache.open(url).path)
    key = "colour/train/hidden/values/c/0/0/0"
    before = store.read(key)
    store.replace(key, before[:-1])
    answer = sherl("verify", "--cache", url)
    assert answer.code == 4 and f"{url}/{key}: bytes" in answer.err
    refused(4, key, argv=("tune", "--cache", url, "--out", tmp_path / "runs", *TUNE))
    store.replace(key, before)
    store.replace("_lock", json.dumps({"pid": 77, "host": "far"}).encode())
    refused(6, "process 77 on far", argv=extract)
    monkeypatch.setattr(remote, "PATIENCE", 0.1)
    wire.fault = lambda _, __: "503"
    refused(7, f"{url}/zarr.json", "503 SlowDown", argv=("inspect", "--cache", url))
    refused(7, url, "the server answers 503", argv=extract)
    secret = f"s3://me:{SECRET}@bucket/x"
    for argv in (("inspect", "--cache", secret), ("extract", "--cache", secret)):
        assert SECRET not in refused(8, "password", argv=argv)
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({"cache": secret}))
    assert SECRET not in refused(8, "pipeline.yaml", "password", argv=("run", file))
    file.write_text("cache: 5\n")
    refused(3, "cache: expected a folder or a URL, found 5", argv=("run", file))
    refused(3, "s3://bucket/prefix", "found http:", argv=("inspect", "--cache", "http://x/y"))
    monkeypatch.setitem(sys.modules, "obstore", None)
    refused(3, "pip install 'sherl-pipe[cloud]'", argv=("inspect", "--cache", url))


@pytest.mark.slow
def test_killed_anywhere_and_run_again(
    tmp_path: Path, models: dict[str, str], wire: Wire, url: str
) -> None:
    """kill -9 after any request: the next run takes the lock over and does the rest."""
    data, near = write_data(tmp_path / "data", ("colour",)), tmp_path / "near"
    extract = ("extract", "--model", models["bert"], "--data", str(data), "--cache")
    done(*extract, near)
    code = "import sys; from sherl_pipe.pipeline import entry; sys.exit(entry.run())"
    script = [sys.executable, "-c", code, *extract, url]
    for number in (9, 25, 40):
        wire.seen.clear()
        child = subprocess.Popen(script, env=dict(os.environ), stderr=subprocess.PIPE)
        while child.poll() is None and len(wire.seen) < number:
            time.sleep(0.002)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.communicate()
    done(*extract, url)
    cache = FeatureCache.open(url)
    assert cache.content() == FeatureCache.open(near).content() and cache.verify() == []
