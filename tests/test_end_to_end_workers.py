"""Stage one on Ray: the same cache whoever writes it, and whatever dies meanwhile."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from cli_tools import done, refused
from model_tools import save_model, write_data
from ray_tools import deadly, hired, refusing
from safetensors.torch import load_file, save_file
from sherl_pipe.cache import FeatureCache, InputError, StaleCacheError
from sherl_pipe.cache.manifest import METADATA, read_root
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.actor import Setup, ShardActor
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.tokens import load_tokenizer

# Shards of about 1200 tokens.
LINE = "--codec float32 --taps all --shard-mib 1 --batch-tokens 256 --device cpu"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that all runs of this file use: connecting takes most of a run's time."""
    from sherl_pipe.pipeline.workers import connect

    with connect(None, cpus=4):
        yield


def prepared(folder: Path, family: str, tasks: tuple[str, ...], rows: int) -> list[Any]:
    model = save_model(folder / "model", family)
    data = write_data(folder / "data", tasks, train=rows, validation=60)
    return ["--model", model, "--data", data, "--template", "neutral", *LINE.split()]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Options, and the cache that one process writes: 5 shards of the encoder, 3 of words."""
    folder = tmp_path_factory.mktemp("t5")
    options = prepared(folder, "t5", ("colour",), 400)
    done("extract", *options, "--cache", folder / "cache")
    return options, folder / "cache"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """Options, and the cache that one process writes: about 12 shards."""
    folder = tmp_path_factory.mktemp("bert")
    options = prepared(folder, "bert", ("colour",), 2000)
    done("extract", *options, "--cache", folder / "cache")
    return options, folder / "cache"


def busy() -> float:
    """How many times longer things take because others use the machine too."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def example_in(cache: Path, shard: int) -> bytes:
    """The id of an example in a shard of the training rows."""
    stream = next(iter(FeatureCache.open(cache).streams("colour/train").values()))
    row: bytes = stream.ids[stream.layout.members(shard)[1]].tobytes()
    return row


def assert_same(path: Path, reference: Path) -> None:
    cache = FeatureCache.open(path)
    assert cache.content() == FeatureCache.open(reference).content()
    assert cache.verify() == [] and cache.incomplete == {}


@pytest.mark.slow
def test_two_workers_one_of_which_dies_in_a_commit(
    tmp_path: Path, t5: tuple[list[Any], Path], cluster: None
) -> None:
    options, reference = t5
    assert len(FeatureCache.open(reference).streams("colour/train")) == 2  # words as well
    path, once = tmp_path / "cache", tmp_path / "killed"
    with hired(deadly(example_in(reference, 1), once, in_commit=True)):
        done("extract", *options, "--cache", path, "--workers", 2)
    assert once.exists()
    assert_same(path, reference)
    done("extract", *options, "--cache", path)  # nothing to do, and nothing to complain of


@pytest.mark.slow
def test_a_poison_example_and_another_number_of_workers(
    tmp_path: Path, bert: tuple[list[Any], Path], cluster: None
) -> None:
    options, reference = bert
    path, poison = tmp_path / "cache", example_in(reference, 3)
    begun = time.monotonic()
    argv = ("extract", *options, "--cache", path, "--workers", 2)
    with hired(deadly(poison)):
        refused(10, "colour/train hidden, shard 3", poison.hex(), "3 workers", argv=argv)
    assert time.monotonic() - begun < 120 * busy()  # three times a worker's start
    cache = FeatureCache.open(path)
    shards = FeatureCache.open(reference).stream("colour/train", "hidden").layout.shards
    assert cache.incomplete == {"colour/train/hidden": (shards - 1, shards)}
    assert cache.splits == ["colour/validation"] and list(cache.tasks["colour"])
    answer = done("extract", *options, "--cache", path, "--workers", 4)
    assert f"1 of {shards}" in answer.out
    assert_same(path, reference)


@pytest.mark.slow
def test_a_poison_example_of_the_encoder_leaves_the_words_of_other_splits(
    tmp_path: Path, t5: tuple[list[Any], Path], cluster: None
) -> None:
    options, reference = t5
    path, poison = tmp_path / "cache", example_in(reference, 0)
    argv = ("extract", *options, "--cache", path, "--workers", 2)
    with hired(deadly(poison)):
        refused(10, "colour/train encoder, shard 0", poison.hex(), argv=argv)
    cache = FeatureCache.open(path)
    assert cache.splits == ["colour/validation"] and len(cache.streams("colour/validation")) == 2
    done("extract", *options, "--cache", path)
    assert_same(path, reference)


@pytest.mark.slow
def test_errors_are_those_of_one_process(tmp_path: Path, cluster: None) -> None:
    options = prepared(tmp_path, "bert", ("colour",), 100)
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    token = load_tokenizer(str(tmp_path / "model")).convert_tokens_to_ids("hates")
    weights["embeddings.word_embeddings.weight"][token, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    argv = ["extract", *options, "--cache"]
    alone = refused(9, "tap 0, 1, 2, 3, 4", argv=(*argv, tmp_path / "a"))
    shared = refused(9, argv=(*argv, tmp_path / "b", "--workers", 2))
    # Of two shards with such values either may be the first to be computed.
    changing = r"shard \d+|of \d+ examples: [0-9a-f, ]+"
    assert re.sub(changing, "", shared) == re.sub(changing, "", alone)
    with hired(refusing()):
        text = refused(7, argv=(*argv, tmp_path / "c", "--workers", 2))
    assert text == "error: colour/train: No space left on device (5 bytes needed).\n"


def test_a_worker_with_another_model_or_package(
    tmp_path: Path, bert: tuple[list[Any], Path]
) -> None:
    """What a machine of a cluster may have under the same name. No Ray: it is the worker's own."""
    options, reference = bert
    identity, _ = read_root(LocalStore(reference))
    setup = Setup(
        options[1], None, "float32", "cpu", 1, reference, identity, "", pad_id=0, batch_tokens=64
    )
    ShardActor().load(setup)
    other = save_model(tmp_path / "other", "bert", seed=1)
    with pytest.raises(StaleCacheError, match="worker on .*backbone fingerprint"):
        ShardActor().load(replace(setup, model=other))
    with pytest.raises(InputError, match="worker on .*nowhere"):
        ShardActor().load(replace(setup, model="./nowhere"))
    torch_of = {**identity.versions, "torch": "1.0"}
    with pytest.raises(InputError, match=r"worker on .*version of torch: expected 1\.0"):
        ShardActor().load(replace(setup, identity=replace(identity, versions=torch_of)))
    assert load_backbone(options[1]).fingerprint == identity.backbone["fingerprint"]
    assert torch.get_num_threads() == 1 and (reference / METADATA).is_file()


def start(options: list[Any], path: Path, seconds: float) -> subprocess.Popen[str]:
    """The command with slow workers and a Ray of its own."""
    code = "import ray_tools; ray_tools.slow_main()"
    argv = [str(seconds), "extract", *map(str, options), "--cache", str(path), "--workers", "2"]
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True, env=env
    )


def wait_for_receipts(path: Path, process: subprocess.Popen[str], count: int) -> None:
    end = time.monotonic() + 400
    while len([*path.glob("colour/train/hidden/receipts/[0-9]*.json")]) < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.02)


def assert_gone(processes: list[psutil.Process]) -> None:
    """No process of a run is left, but for dead ones that nobody has waited for.

    An agent of Ray whose cluster was killed reports that for 60 s before it ends.
    """
    _, left = psutil.wait_procs(processes, timeout=120)
    for process in left:
        if process.is_running():
            assert process.status() == psutil.STATUS_ZOMBIE, process.cmdline()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_leaves_nothing_running_and_is_gone_on_with(
    tmp_path: Path, bert: tuple[list[Any], Path], number: signal.Signals, code: int
) -> None:
    """Killed, its workers live on; a run that takes over at once does not mind them."""
    options, reference = bert
    path = tmp_path / "cache"
    process = start(options, path, 1.0)
    wait_for_receipts(path, process, 2)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) > 4
    begun = time.monotonic()
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.wait(60)  # the system lets go of a lock when the process is gone for good
        done("extract", *options, "--cache", path)
    _, message = process.communicate(timeout=300)
    took = time.monotonic() - begun
    assert process.returncode == code, message
    if number != signal.SIGKILL:
        assert took < 5 * busy()
        assert message.strip().count("\n") == 0 and "run the same command again" in message
    assert_gone(family)
    if number != signal.SIGKILL:
        done("extract", *options, "--cache", path)
    assert_same(path, reference)


@pytest.mark.slow
def test_two_runs_into_one_cache(tmp_path: Path, bert: tuple[list[Any], Path]) -> None:
    options, reference = bert
    path = tmp_path / "cache"
    process = start(options, path, 0.5)
    wait_for_receipts(path, process, 1)
    refused(6, f"process {process.pid}", argv=("extract", *options, "--cache", path))
    assert process.wait(400) == 0
    assert_same(path, reference)


@pytest.mark.slow
def test_a_machine_is_lost(tmp_path: Path, bert: tuple[list[Any], Path]) -> None:
    """Two Ray nodes on this machine, a folder that both see."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()  # that of the tests before
    options, reference = bert
    path = tmp_path / "cache"
    size = {"object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **size})
    try:
        second = nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
        argv = ["--ray-address", nodes.address]
        process = start([*options, *argv], path, 0.5)
        wait_for_receipts(path, process, 3)
        nodes.remove_node(second, allow_graceful=False)
        _, message = process.communicate(timeout=400)
        assert process.returncode == 0, message
    finally:
        nodes.shutdown()
    assert_same(path, reference)
