"""`sherl-pipe plan`: its arithmetic, its counts, its sample, and how near it comes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli_tools import done, refused, size_of, snapshot, write_rows
from model_tools import save_model, sentences
from safetensors.torch import load_file, save_file
from sherl_pipe.cache import CODECS
from sherl_pipe.pipeline import planning
from sherl_pipe.pipeline.plan import (
    Measured,
    Wanted,
    break_even,
    cache_bytes,
    extraction_seconds,
    in_words,
    make_plan,
    pipelined,
    stream_bytes,
    task_plan,
)
from sherl_pipe.stages.amounts import Amount, StepSample, StreamBytes, StreamSample, TaskAmount
from sherl_pipe.stages.measure import measure_streams

PLAN = ("--epochs", 1, "--reduction", 1)


# Arithmetic.


def amount(
    stream: str, examples: int, rows: int, split: str = "a/train", shards: int = 1
) -> Amount:
    return Amount(split, stream, examples, rows, 2 * rows, shards, 10 * rows)


MAIN = StreamSample(
    amount("hidden", 10, 100),
    {"int8": StreamBytes(800, 40, 7), "float32": StreamBytes(3000, 40, 5)},
    compute_seconds=4.0,
    commit_seconds=1.0,
    fixed_seconds=0.5,
)
WORDS = StreamSample(
    amount("decoder-1", 10, 20),
    {"int8": StreamBytes(100, 30, 9), "float32": None},
    compute_seconds=0.2,
    commit_seconds=0.1,
    fixed_seconds=1.5,
)


def test_a_stream_is_scaled_from_its_own_sample_or_from_its_kind() -> None:
    whole = amount("hidden", 30, 1000)
    assert stream_bytes(whole, [MAIN, WORDS], "int8") == 7 + 40 * 3 + 800 * 10
    other = replace(MAIN, amount=amount("hidden", 10, 300, "b/train"))
    # `c` was not sampled: it is as the two that were, taken together.
    third = amount("hidden", 5, 40, "c/train")
    assert stream_bytes(third, [MAIN, other, WORDS], "int8") == 7 + 80 * 5 // 20 + 1600 * 40 // 400
    assert stream_bytes(amount("hidden", 0, 0, "d/train"), [MAIN], "int8") == 7
    # The decoder's sample says nothing of float32, which could not hold its values.
    assert stream_bytes(amount("decoder-2", 10, 20), [MAIN, WORDS], "float32") is None
    assert stream_bytes(amount("decoder-2", 10, 40), [MAIN, WORDS], "int8") == 9 + 30 + 200


def measured(**changes: Any) -> Measured:
    base = Measured(
        [amount("hidden", 100, 1000, shards=4), amount("decoder-1", 10, 20)],
        [MAIN, WORDS],
        [TaskAmount("a", 64, 1000, 1000, 2), TaskAmount("b", 64, 500, 2000, 2)],
        [StepSample("a", 100, 0.2, 1.0, 0.9, 400, 4000, 0.1)],
        other_bytes=1000,
        data_seconds=3.0,
    )
    return replace(base, **changes)


def test_a_cache_is_its_streams_and_the_rest() -> None:
    assert cache_bytes(measured(), "int8") == 1000 + (7 + 400 + 8000) + (9 + 30 + 100)
    assert cache_bytes(measured(), "float32") is None


def test_shards_are_committed_while_the_next_ones_are_computed() -> None:
    assert pipelined(8.0, 2.0, 4) == 8.5
    assert pipelined(2.0, 8.0, 4) == 8.5
    assert pipelined(8.0, 2.0, 1) == 10.0
    assert pipelined(0.0, 0.0, 0) == 0.0


def test_extraction_time_is_data_and_streams() -> None:
    # Ten times the main sample, 40 s and 10 s in 4 shards; the decoder's own; 1 s a stream.
    assert extraction_seconds(measured()) == pytest.approx(3 + (1 + 42.5) + (1 + 0.2 + 0.1))


def test_an_epoch_is_scaled_by_tokens_and_streams_what_is_too_big() -> None:
    steps_ = measured().steps
    own = task_plan(measured().tasks[0], steps_, budget=10_000)
    assert (own.cached_seconds, own.live_seconds) == (pytest.approx(2.0), pytest.approx(10.0))
    assert own.forward_seconds == pytest.approx(9.0)
    assert own.read_seconds == pytest.approx(0.25) and own.measured and not own.streamed
    # Task b holds 2,000 tokens, 20,000 bytes: they are read in every epoch, beside the steps.
    other = task_plan(measured().tasks[1], steps_, budget=10_000)
    assert other.streamed and not other.measured
    assert other.read_seconds == pytest.approx(0.5) and other.cached_seconds == pytest.approx(1.0)
    slow = task_plan(measured().tasks[1], [replace(steps_[0], load_seconds=4.0)], budget=10_000)
    assert slow.cached_seconds == slow.read_seconds == pytest.approx(20.0)


def test_a_fit_is_scaled_by_rows_and_what_it_reads_by_tokens() -> None:
    steps_ = [replace(measured().steps[0], start_seconds=0.3, fit_seconds=2.0, rows=64)]
    own, other = (task_plan(each, steps_, budget=10_000) for each in measured().tasks)
    assert own.start_seconds == pytest.approx(0.3 * 10 + 2.0)
    assert other.start_seconds == pytest.approx(0.3 * 5 + 2.0)
    more = replace(measured().tasks[1], rows=640)
    assert task_plan(more, steps_, budget=1).start_seconds == pytest.approx(0.3 * 5 + 20.0)


def test_break_even() -> None:
    assert break_even(30.0, 0.0, cached=2.0, live=12.0, tunings=1) == 3.0
    assert break_even(30.0, 1.0, cached=2.0, live=12.0, tunings=3) == pytest.approx(1.1)
    assert break_even(0.0, 0.0, cached=12.0, live=12.0, tunings=1) is None


def wanted(**changes: Any) -> Wanted:
    return replace(Wanted("int8", 10, 2, budget=1 << 40, free_bytes=1 << 40), **changes)


def test_verdicts() -> None:
    plan = make_plan(measured(), wanted())
    # 1.5 s an epoch from the cache, 7.5 s live; 48 s are paid by two tunings.
    assert plan.break_even == pytest.approx((plan.extraction_seconds / 2 + 0.375) / 6)
    assert plan.verdict == "cache"
    assert plan.sentence.startswith(f"caching pays after {plan.break_even:.1f} epochs (extraction")
    assert plan.cached_total == pytest.approx(plan.extraction_seconds + 2 * (0.375 + 15.0))
    assert plan.live_total == pytest.approx(150.0)
    short = make_plan(measured(), wanted(epochs=2))
    assert short.verdict == "too few epochs"
    assert short.sentence.startswith("do not cache for 2 epochs: caching pays after 4.")
    slow = [StepSample("a", 100, 1.0, 0.8, 0.3, 400, 4000, 0.1)]
    never = make_plan(measured(steps=slow), wanted())
    assert (never.verdict, never.break_even) == ("never", None)
    # The step alone is 0.5 of 0.8; the cache gives in 0.5 what the forward gives in 0.3.
    assert never.sentence == (
        "do not cache: an epoch takes 7.5 s from the cache, 6 s live. Getting the features costs "
        "3.8 s, computing them 2.2 s"
    )
    full = make_plan(measured(), wanted(free_bytes=9000))
    assert (full.verdict, full.fits) == ("no space", False)
    assert full.sentence == "does not fit: about 9,546 bytes with int8, 9,000 are free"
    idle = make_plan(measured(tasks=[], steps=[]), wanted())
    assert (idle.verdict, idle.break_even, idle.cached_total) == ("no tasks", None, None)
    assert list(plan.sizes) == ["int8", "float32"] and plan.values == 10_200


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.123, "0.12 s"),
        (8.14, "8.1 s"),
        (95.2, "95 s"),
        (160, "2.7 min"),
        (720, "12 min"),
        (12240, "3.4 h"),
    ],
)
def test_seconds_in_words(seconds: float, text: str) -> None:
    assert in_words(seconds) == text


# The command.


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_sizes_come_true(world: Path, family: str) -> None:
    """All codecs of one plan, each against its own extraction."""
    extract = ("--model", save_model(world / "model", family), "--data", "data", "--cache", "new")
    before = snapshot(world)
    plan = done("plan", *extract, *PLAN, "--json").json
    assert snapshot(world) == before and sorted(p.name for p in world.iterdir()) == [
        "data",
        "model",
    ]
    assert sorted(plan["codecs"]) == sorted(CODECS) and plan["tokens_counted_on"] == "all inputs"
    for codec in CODECS:
        done("extract", *extract, "--codec", codec)
        assert plan["codecs"][codec]["bytes"] == pytest.approx(size_of(world / "new"), rel=0.1)
        assert plan["codecs"][codec]["fits"]
        shutil.rmtree(world / "new")


@pytest.mark.parametrize("codec", ["int8", "bfloat16"])
def test_sizes_of_a_sample_come_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """The embedded demo, of which less than a third is looked at."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "sample_tokens", lambda *_: 3000)
    argv = ("--limit", 600, "--task", "topic", "--task", "intensity", "--codec", codec)
    plan = done("plan", *argv, "--epochs", 1, "--json").json
    assert plan["sample_tokens"] <= 3000
    assert plan["splits"]["topic/train"]["stored_examples"] == 0
    done("extract", *argv)
    assert plan["codecs"][codec]["bytes"] == pytest.approx(size_of(tmp_path / "cache"), rel=0.1)


def test_plan_says_what_it_found(world: Path) -> None:
    model = save_model(world / "model", "t5")
    argv = ("plan", "--model", model, "--data", "data", "--template", "neutral", *PLAN)
    plan = done(*argv, "--tunings", 3, "--json").json
    split = plan["splits"]["size/train"]
    assert (split["examples"], split["distinct_examples"], split["stored_examples"]) == (70, 70, 0)
    tokens = {name: each["tokens"] for name, each in plan["splits"].items()}
    assert tokens["colour/train"] > 0 == tokens["size/train"]
    words = plan["splits"]["colour/train"]["label_word_rows"]
    assert words == 70 * (3 + 1 + 5)  # `0`, `1` and their start; `0.0` ... in other words
    assert plan["tunings"] == 3 and plan["epochs"] == 1 and set(plan["tasks"]) == {"colour", "size"}
    for task in plan["tasks"].values():
        assert task["training_rows"] == 70 and task["steps_per_epoch"] == 3
        assert 0 < task["forward_seconds_per_epoch"] < task["live_seconds_per_epoch"]
        assert task["cached_seconds_per_epoch"] > 0 and not task["streamed"]
    assert plan["tasks"]["size"]["measured"]  # its words take the most
    assert plan["extraction_seconds"] > 0 and plan["model_loading_seconds"] > 0
    tasks = plan["tasks"].values()
    once = sum(task["reading_seconds"] + task["starting_seconds"] for task in tasks) / len(tasks)
    total = plan["extraction_seconds"] + 3 * (once + plan["cached_seconds_per_epoch"])
    assert plan["total_seconds_cached"] == pytest.approx(total)
    assert plan["total_seconds_live"] == pytest.approx(3 * plan["live_seconds_per_epoch"])
    text = done(*argv).out
    for part in (
        "colour/train",
        "label-word rows",
        "int8 (chosen)",
        "bfloat16",
        "s cached",
        "of 1 epochs, 2 of them",
    ):
        assert part in text
    assert "caching pays after" in text or "do not cache" in text


def test_steps_of_tasks_are_measured_whose_words_were_not(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words: set[str] = set()

    def hasty(*argv: Any, **_: float) -> list[StreamSample]:
        found = measure_streams(*argv, seconds=0.0)
        words.update(each.amount.stream for each in found if not each.amount.main)
        return found

    monkeypatch.setattr(planning, "measure_streams", hasty)
    monkeypatch.setattr(planning, "SECONDS", 30.0)
    model = save_model(world / "model", "t5")
    plan = done("plan", "--model", model, "--data", "data", *PLAN, "--json").json
    assert len(words) == 1 and all(task["measured"] for task in plan["tasks"].values())
    own = [task["cached_seconds_per_epoch"] for task in plan["tasks"].values()]
    assert len(set(own)) == 2


def test_plan_of_texts_without_labels(world: Path) -> None:
    model = save_model(world / "model", "bert")
    write_rows(world / "texts.jsonl", [{"text": text} for text in sentences(40)])
    argv = ("plan", "--model", model, "--data", "texts.jsonl")
    plan = done(*argv, "--json").json
    assert (plan["verdict"], plan["tasks"], plan["break_even_epochs"]) == ("no tasks", {}, None)
    assert plan["codecs"]["int8"]["bytes"] > 0 and plan["extraction_seconds"] > 0
    assert "nothing can be said of epochs" in done(*argv).out


def test_a_codec_that_cannot_hold_the_values_is_said_to(world: Path) -> None:
    model = save_model(world / "model", "bert")
    weights = load_file(world / "model" / "model.safetensors")
    # The largest bfloat16 is a little smaller.
    weights["embeddings.LayerNorm.weight"][3] = 0
    weights["embeddings.LayerNorm.bias"][3] = 3.4e38
    save_file(weights, world / "model" / "model.safetensors", metadata={"format": "pt"})
    write_rows(world / "texts.jsonl", [{"text": text} for text in sentences(40)])
    argv = ("plan", "--model", model, "--data", "texts.jsonl", "--taps", "0")
    plan = done(*argv, "--codec", "float32", "--json").json
    assert plan["codecs"]["float32"]["fits"]
    nothing = {"bytes": None, "bits_per_value": None, "fits": False}
    assert plan["codecs"]["bfloat16"] == nothing
    assert "cannot hold these values" in done(*argv, "--codec", "float32").out
    refused(9, "values that are not finite (or that bfloat16 cannot hold) at tap 0",
            argv=(*argv, "--codec", "bfloat16"))  # fmt: skip


def test_a_sample_that_cannot_be_written_is_said_so(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(planning.tempfile, "TemporaryDirectory", refuse)
    argv = ("plan", "--model", save_model(world / "model", "bert"), "--data", "data")
    refused(7, f"{world}: Permission denied. A plan puts a sample there", "--cache", argv=argv)


def test_features_that_memory_does_not_hold_are_planned_as_streamed(world: Path) -> None:
    model = save_model(world / "model", "bert")
    argv = ("plan", "--model", model, "--data", "data", *PLAN)
    small = ("--memory-budget", "1k")

    def streamed(*options: str) -> set[bool]:
        tasks = done(*argv, *options, "--json").json["tasks"]
        return {task["streamed"] for task in tasks.values()}

    assert streamed(*small) == streamed("--residency", "stream") == {True}
    assert streamed(*small, "--residency", "host") == {False}
    assert "streamed" in done(*argv, *small).out


def test_plan_refuses_what_extract_and_tune_would(world: Path) -> None:
    model = save_model(world / "model", "bert")
    before = snapshot(world)
    argv = ("plan", "--model", model, "--data", "data")
    refused(3, "late: expected 1 to 3 (4 blocks), found 9", argv=(*argv, "--late", 9))
    refused(3, "method: expected one of", argv=(*argv, "--method", "lora"))
    refused(3, "memory budget: expected", argv=(*argv, "--memory-budget", "lots"))
    refused(3, "taps of the", argv=(*argv, "--taps", "99"))
    refused(2, "'--tunings': 0 is not in the range", argv=(*argv, "--tunings", 0))
    assert snapshot(world) == before
