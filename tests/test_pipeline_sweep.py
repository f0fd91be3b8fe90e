"""Sweeps: which tunings there are, that they are those of `tune`, early stopping, and workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import yaml
from cli_tools import done, refused, snapshot
from model_tools import save_model, write_data
from sherl_pipe.cache import InputError
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.sweep import variants
from sherl_pipe.pipeline.tuning import Work
from sherl_pipe.stages.halving import Halving
from sherl_pipe.stages.settings import TuneSettings

TUNE = {"epochs": 2, "batch_size": 16, "reduction": 1, "seed": [0], "tasks": ["colour"]}
GRID = {"space": {"method": ["sherl", "linear"], "lr": [0.003, 0.01]}}


def config_file(**parts: Any) -> Path:
    file = Path("sweep.yaml")
    file.write_text(yaml.safe_dump({"cache": "cache", "tune": TUNE, "sweep": GRID} | parts))
    return file


def tune_with(**change: Any) -> dict[str, Any]:
    return {"tune": TUNE | change}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_data(folder / "data", ("colour", "size"), train=70, validation=30)
    model = save_model(folder / "model", "bert")
    done("extract", "--model", model, "--data", folder / "data", "--cache", folder / "cache")
    return folder


@pytest.fixture(autouse=True)
def _there(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)


def adapters(out: str) -> dict[str, bytes]:
    return {k: data for k, (_, data) in snapshot(Path(out), "adapter.safetensors").items()}


def test_a_grid_has_all_combinations_and_draws_are_the_seeds() -> None:
    grid = variants(make_config({"sweep": GRID | {"space": [GRID["space"], {"late": [1]}]}}, "t"))
    assert [(each.method, each.lr) for each in grid[:4]] == [
        ("sherl", (0.003,)),
        ("sherl", (0.01,)),
        ("linear", (0.003,)),
        ("linear", (0.01,)),
    ]
    assert len(grid) == 5 and grid[4].late == 1
    space = {"lr": {"low": 1e-4, "high": 1e-2, "scale": "log"}, "method": ["sherl", "lst"]}

    def drawn(seed: int) -> list[tuple[str, tuple[float, ...]]]:
        sweep = {"search": "random", "samples": 40, "seed": seed, "space": space}
        return [(each.method, each.lr) for each in variants(make_config({"sweep": sweep}, "t"))]

    assert drawn(0) == drawn(0) != drawn(1)
    rates = [lr for _, (lr,) in drawn(0)]
    assert 1e-4 <= min(rates) < 5e-4 and 2e-3 < max(rates) <= 1e-2
    assert {method for method, _ in drawn(0)} == {"sherl", "lst"}


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"space": {"lrr": [1.0]}}, "Did you mean 'lr'"),
        ({"space": {"lr": []}}, "sweep.space.lr"),
        ({"space": {"lr": {"low": 1.0, "high": 0.1}}}, "sweep.space.lr"),
        ({"space": {"lr": {"low": 0.1, "high": 1.0}}}, "sweep.space.lr"),
        ({}, "sweep.space"),
        ({"stop": {"factor": 1}, "space": {"lr": [1.0]}}, "sweep.stop.factor"),
    ],
)
def test_what_is_no_sweep_is_refused(sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        variants(make_config({"sweep": sweep}, "test"))


@pytest.mark.slow
def test_a_sweep_ends_where_tune_ends_and_is_not_done_again() -> None:
    rows = done("sweep", config_file(**tune_with(out="swept")), "--json").json
    assert len(rows) == 2 * 2 and {row["status"] for row in rows} == {"finished"}
    for method in ("sherl", "linear"):
        options = ["--method", method, "--reduction", 1, "--epochs", 2, "--batch-size", 16]
        rates = ["--lr", 0.003, "--lr", 0.01, "--task", "colour"]
        done("tune", "--cache", "cache", *options, *rates, "--out", "tuned")
    assert adapters("swept") == adapters("tuned")
    assert len(adapters("swept")) == len(rows)
    table = pyarrow.parquet.read_table("swept/sweep.parquet").to_pylist()
    assert [row["score"] for row in table] == [row["score"] for row in rows]
    assert {"metric_accuracy", "seconds", "seed"} <= table[0].keys()
    before = snapshot(Path("swept"), "adapter")
    assert done("sweep", "sweep.yaml", "--json").json == rows
    assert snapshot(Path("swept"), "adapter") == before


@pytest.mark.slow
def test_early_stopping_changes_no_tuning_that_goes_on() -> None:
    halved = {"sweep": GRID | {"stop": {"grace": 1, "factor": 2}}}
    longer = TUNE | {"epochs": 4}
    rows = done("sweep", config_file(tune=longer | {"out": "halved"}, **halved), "--json").json
    done("sweep", config_file(tune=longer | {"out": "whole"}))
    whole, kept = adapters("whole"), adapters("halved")
    assert 0 < len(kept) < len(whole)
    assert kept == {name: whole[name] for name in kept}
    stopped = [row for row in rows if row["status"] == "stopped"]
    assert {row["epochs_done"] for row in stopped} <= {1, 2}
    assert len(stopped) + len(kept) == len(rows)
    # None is trained again, and none that was stopped has a checkpoint left.
    config_file(tune=longer | {"out": "halved"}, **halved)
    before = snapshot(Path("halved"), ".rungs")
    again = done("sweep", "sweep.yaml", "--json").json
    assert [row["score"] for row in again] == [row["score"] for row in rows]
    assert snapshot(Path("halved"), ".rungs") == before
    assert not list(Path("halved").rglob("checkpoint.bin"))


def test_a_tuning_that_fails_is_a_row() -> None:
    space = {"space": {"lr": [0.003, 1e30]}}
    rows = done("sweep", config_file(**tune_with(out="failing"), sweep=space), "--json").json
    assert {row["status"] for row in rows} == {"finished", "failed"}
    assert all("not finite" in row["error"] for row in rows if row["status"] == "failed")
    config_file(**tune_with(out="worse"), sweep={"space": {"lr": [1e30]}})
    refused(9, "not finite", argv=("sweep", "sweep.yaml"))


def test_settings_that_do_not_fit_are_refused_before_any_training() -> None:
    config_file(**tune_with(out="wrong"), sweep={"space": {"init": ["residual", "fisher"]}})
    refused(3, "init", "fisher", argv=("sweep", "sweep.yaml"))
    assert not list(Path("wrong").rglob("adapter*"))


def command(*argv: object) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", "from sherl_pipe.pipeline.entry import main; main()"]
    return subprocess.Popen(
        [*line, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Ray's processes that train, below a command."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:
            continue
        if "ray::" in line and ("ImplicitFunc" in line or "RayTrainWorker" in line):
            found.append(child)
    return found


def killing(process: subprocess.Popen[str], when: Callable[[], bool]) -> int:
    """Kill one worker as soon as `when`; how many were killed."""
    until = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < until:
        if when() and (found := workers_of(process)):
            os.kill(found[0].pid, signal.SIGKILL)
            return 1
        time.sleep(0.02)
    return 0


def ends(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=500)
    assert (process.returncode, err) == (0, "")
    return json.loads(out)


def alive(process: subprocess.Popen[str]) -> bool:
    return any("ray" in child.name() for child in psutil.Process().children(recursive=True))


MANY = TUNE | {"epochs": 40}


@pytest.fixture(scope="module")
def calm(made: Path) -> dict[str, bytes]:
    """What a sweep of so many epochs ends with in one process."""
    file = made / "calm.yaml"
    tune = MANY | {"out": str(made / "one")}
    file.write_text(yaml.safe_dump({"cache": str(made / "cache"), "tune": tune, "sweep": GRID}))
    done("sweep", file)
    return adapters(str(made / "one"))


@pytest.mark.slow
def test_workers_end_where_one_process_ends_though_one_is_killed(calm: dict[str, bytes]) -> None:
    file = config_file(tune=MANY | {"out": "two", "workers": 2})
    process = command("sweep", file, "--json")
    assert killing(process, lambda: Path("two").exists()) == 1
    rows = ends(process)
    assert {row["status"] for row in rows} == {"finished"}
    assert adapters("two") == calm
    assert not Path("two/.ray-tune").exists() and not alive(process)


def test_a_worker_need_not_have_the_folder_that_a_command_is_typed_in(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sherl_pipe.pipeline.workers import Share
    from sherl_pipe.pipeline.workers_tune import describe, job_of, opened, settle

    config = make_config(
        {
            "cache": "cache",
            "data": {"source": "data"},
            "tune": {**TUNE, "out": "far", "local_copies": "copies"},
        },
        "here",
    )
    settings = TuneSettings(method="linear", reduction=1, late=0, init="random", epochs=1)
    halving = Halving(Path("far/.rungs"), 1, 2)
    work = Work(config, "model", [[("colour", settings)]], halving, 1 << 30)
    described = json.loads(describe(work, Share(2, 1, 0)))
    settle(described)
    assert Path.cwd() == made
    described["folder"] = str(tmp_path / "not-here")
    monkeypatch.chdir(tmp_path)
    settle(described)
    (result,) = opened(described).run(job_of(described, 0))
    assert Path.cwd() == tmp_path and not any(tmp_path.iterdir())
    assert Path(result.folder) == made / "far" / "colour" / settings.name
    assert described["config"]["data"]["source"] == str(made / "data")
    assert described["config"]["tune"]["local_copies"] == str(made / "copies")
    assert described["halving"][0] == str(made / "far" / ".rungs")


@pytest.mark.slow
def test_a_worker_trains_one_pass_after_another() -> None:
    methods = ["sherl", "linear", "weighted", "dtl", "unipt"]
    space = {"space": {"method": methods}}
    alone = done("sweep", config_file(**tune_with(out="alone"), sweep=space), "--json").json
    file = config_file(**tune_with(out="worker", workers=2), sweep=space)
    rows = done("sweep", file, "--json").json
    assert [row["score"] for row in rows] == [row["score"] for row in alone]
    assert adapters("worker") == adapters("alone") and len(rows) == len(methods)


@pytest.mark.slow
def test_a_sweep_goes_on_though_a_machine_is_lost(calm: dict[str, bytes]) -> None:
    """Two Ray nodes on this machine, a folder that both see."""
    from ray.cluster_utils import Cluster

    size = {"object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **size})
    try:
        second = nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
        file = config_file(tune=MANY | {"out": "lost", "workers": 2})
        process = command("sweep", file, "--ray-address", nodes.address, "--json")
        until = time.monotonic() + 400
        # A folder is made when its pass begins: both machines are at work.
        while len(list(Path("lost").glob("colour/*"))) < 2:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)
        rows = ends(process)
    finally:
        nodes.shutdown()
    assert {row["status"] for row in rows} == {"finished"} and len(rows) == len(calm)
    assert adapters("lost") == calm


@pytest.mark.slow
def test_one_tuning_on_workers_goes_on_though_one_is_killed() -> None:
    options = ["--cache", "cache", "--task", "colour", "--reduction", 1, "--epochs", 60]
    options += ["--batch-size", 16, "--lr", 0.003, "--head", "random", "--workers", 2, "--json"]
    whole = ends(command("tune", *options, "--out", "calm"))
    process = command("tune", *options, "--out", "shaken")
    assert killing(process, lambda: bool(workers_of(process))) == 1
    found = ends(process)
    assert [each["score"] for each in found] == [each["score"] for each in whole]
    assert adapters("shaken") == adapters("calm")
    assert not alive(process)


@pytest.mark.slow
def test_workers_that_always_die_end_the_command() -> None:
    config_file(tune=TUNE | {"out": "dying", "workers": 2, "retries": 1, "epochs": 500})
    process = command("sweep", "sweep.yaml")
    stop = threading.Event()

    def kill_all() -> None:
        while not stop.is_set():
            with suppress(psutil.Error):
                for worker in workers_of(process):
                    worker.kill()
            # Most die before they have answered anything.
            time.sleep(0.01)

    killer = threading.Thread(target=kill_all)
    killer.start()
    try:
        _, err = process.communicate(timeout=500)
    finally:
        stop.set()
        killer.join()
    assert process.returncode == 10, err
    assert err.startswith("error: the worker died 2 times") and err.count("\n") == 1
    rows = pyarrow.parquet.read_table("dying/sweep.parquet").to_pylist()
    assert {row["status"] for row in rows} == {"lost"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
@pytest.mark.parametrize("together", [False, True])
def test_what_a_worker_raises_unexpectedly_is_raised_and_called_no_death(together: bool) -> None:
    from sherl_pipe.pipeline.workers_train import train_together
    from sherl_pipe.pipeline.workers_tune import train_apart

    tune = TUNE | {"out": "odd", "workers": 1 + together, "retries": 0}
    config = make_config({"cache": "cache", "tune": tune}, "here")
    # No command gets as far as this with such settings.
    settings = TuneSettings(method="linear", reduction=1, late=0, init="random", batch_size=0)
    work = Work(config, None, [[("colour", settings)]], None, 1 << 30)
    with pytest.raises((ValueError, ZeroDivisionError)):
        if together:
            train_together(work, Bars(None))
        else:
            train_apart(work, Bars(None), lambda *_: None)
