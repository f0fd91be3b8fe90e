"""Free-text targets: what is tuned from the cache is what the live model computes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import done, refused, snapshot, write_rows
from model_tools import WORDS, save_model, sentences
from sherl_pipe.cache import FeatureCache
from sherl_pipe.pipeline import machine
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.predict import Predictor
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages.adapter import TunedModel
from sherl_pipe.stages.demo.grammar import corpus
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.route import trainable
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.texts import IGNORED, padded, text_metrics
from sherl_pipe.stages.tune import Tuner

QUIET = Bars(None)
METHODS = ("sherl", "lst", "dtl", "unipt", "weighted", "linear")


def write_texts(folder: Path, count: int = 24) -> Path:
    """Sentences with ragged targets of 1 to 6 words; some stand in two rows with other targets."""
    rng, texts = random.Random(1), sentences(count)

    def target() -> str:
        return " ".join(rng.choice(WORDS[:17]) for _ in range(rng.randint(1, 6)))

    rows = [{"sentence": text, "answer": target()} for text in [*texts, *texts[:3], texts[-1]]]
    write_rows(folder / "say" / "train.jsonl", rows[:16] + rows[count : count + 3])
    write_rows(folder / "say" / "validation.jsonl", [*rows[16:count], rows[-1]])
    return folder


def prepare(tmp_path: Path, family: str, **extract: Any) -> dict[str, Any]:
    data = write_texts(tmp_path / "data")
    config = make_config(
        {
            "model": save_model(tmp_path / "model", family),
            "cache": tmp_path / "cache",
            "data": {"source": str(data), "target_column": "answer"},
            "extract": {"codec": "float32", "batch_tokens": 64, "taps": "all", **extract},
        },
        "test",
    )
    run_extract(config, QUIET)
    cache, backbone, tokenizer = open_for_tuning(config, QUIET, whole=True)
    return {"cache": cache, "backbone": backbone, "tokenizer": tokenizer, "data": data}


def make_tuner(setting: dict[str, Any], folder: Path, **change: Any) -> Tuner:
    method = change.get("method", "sherl")
    usual = dict(find_method(method).usual_for(setting["cache"].identity.streams))
    usual |= {"reduction": 3} if usual["reduction"] > 1 else {}
    family = setting["backbone"].family
    usual.pop("head", None)
    settings = TuneSettings(
        **{**usual, "method": method, "epochs": 1, "batch_size": 8, "pool": family.pool, **change}
    )
    task = Task(setting["cache"], "say", setting["backbone"], setting["tokenizer"])
    tuner = Tuner(task, settings, folder / "run", budget=1 << 30)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return tuner


def live_batch(setting: dict[str, Any], role: str, side: str = "right") -> dict[str, Any]:
    """The rows of a split as Hugging Face's own models take them."""
    rows = [json.loads(line) for line in (setting["data"] / f"say/{role}.jsonl").open()]
    tokenizer = setting["tokenizer"]
    tokenizer.padding_side = side
    lead = "say sentence: "
    inputs = tokenizer([lead + row["sentence"] for row in rows], padding=True, return_tensors="pt")
    targets = tokenizer(text_target=[row["answer"] for row in rows]).input_ids
    tokenizer.padding_side = "right"
    assert len({len(each) for each in targets}) > 2
    return {**inputs, "labels": padded([tuple(each) for each in targets])}


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2"])
def test_targets_that_are_computed_side_by_side_are_those_of_one_thread(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "TINY", 0)  # a small model gets one thread
    found = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        try:
            torch.set_num_threads(threads)
            content = prepare(tmp_path / str(threads), family)["cache"].content()
            found.append({name: each for name, each in content if name != "zarr.json"})  # has paths
        finally:
            torch.set_num_threads(before)
    one, many = found
    assert one == many
    streams = {name.split("/")[2] for name in one if name.startswith("say/train/")}
    assert len(streams - {"zarr.json"}) == 2  # inputs and targets


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_gradients_and_metrics_are_the_live_models(
    tmp_path: Path, family: str, method: str
) -> None:
    setting = prepare(tmp_path, family)
    for late in (1, 2) if method in ("sherl", "dtl") else (None,):
        change = {} if late is None else {"late": late}
        tuner = make_tuner(setting, tmp_path, method=method, **change)
        tuner.route.eval()
        (batch,) = tuner.train.read([np.arange(len(tuner.task.train.ids))])
        loss = tuner.loss(batch)
        loss.backward()
        mine = {name: p.grad.clone() for name, p in tuner.parameters.items() if p.grad is not None}
        tuner.route.zero_grad()
        live = TunedModel(setting["backbone"], tuner.route).eval()
        expected = live(**live_batch(setting, "train")).loss
        assert (loss - expected).abs() < 1e-5
        expected.backward()
        found = trainable(tuner.route)
        assert len(mine) == len(found)
        for name, gradient in mine.items():
            scale = found[name].grad.abs().max().clamp(min=1e-4)
            assert (gradient - found[name].grad).abs().max() / scale < 1e-3, name
        cached = tuner.outputs(tuner.held_out, 4)
        for side in ("right", "left"):
            inputs = live_batch(setting, "validation", side)
            with torch.no_grad():
                logits = live(**inputs).logits
            labels = inputs["labels"]
            losses = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
            ).sum(1)
            right = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum(1)
            assert (cached[:, 0] - losses).abs().max() < 1e-4
            assert torch.equal(cached[:, 1], right.float())
            assert torch.equal(cached[:, 2], (labels != IGNORED).sum(1).float())


def test_an_exact_match_is_what_greedy_decoding_says(tmp_path: Path) -> None:
    setting = prepare(tmp_path, "t5")
    tuner = make_tuner(setting, tmp_path)
    live = TunedModel(setting["backbone"], tuner.route).eval()
    inputs = live_batch(setting, "validation")
    texts = {k: v for k, v in inputs.items() if k != "labels"}
    said = live.generate(**texts, max_new_tokens=5, do_sample=False)
    # The first token of what it says, and another one.
    for right in (True, False):
        labels = said[:, 1:3].clone()
        labels[:, 1] = labels[:, 1] if right else (labels[:, 1] + 1) % 7
        with torch.no_grad():
            answers = live(**texts, labels=labels).logits.argmax(-1)
        assert ((answers == labels).all(1) == right).all()
    outputs = torch.tensor([[1.0, 2, 2], [3.0, 1, 2]])
    found = text_metrics(outputs)
    assert found["exact_match"] == 50 and found["token_accuracy"] == 75
    assert found["perplexity"] == pytest.approx(np.exp(1))


def rule(folder: Path, train: int = 600, validation: int = 100) -> Path:
    """Sentences of the demo, with what they are about and how they judge it as text."""
    topics = ("food", "travel", "music", "sport")
    rows = []
    for each in corpus(train + validation, 11):
        good = "good" if each.sentiment else "bad"
        answer = f"{good} {topics[each.topic]}"
        rows.append({"sentence": each.sentence, "answer": answer, "other": topics[each.topic]})
    write_rows(folder / "say" / "train.jsonl", rows[:train])
    write_rows(folder / "say" / "validation.jsonl", rows[train:])
    return folder


@pytest.mark.slow
def test_a_rule_is_learned_from_the_command_line(tmp_path: Path) -> None:
    """Extract, tune, predict; new targets for the same texts leave the encoder's features alone."""
    data, cache = rule(tmp_path / "data"), tmp_path / "cache"
    done("extract", "--data", data, "--cache", cache, "--target-column", "answer",
         "--taps", "all")  # fmt: skip
    how = ("tune", "--cache", cache, "--epochs", 3, "--batch-size", 8, "--lr", 1e-2,
           "--json")  # fmt: skip
    (result,) = done(*how, "--out", tmp_path / "runs").json
    assert set(result["metrics"]) == {"exact_match", "token_accuracy", "perplexity"}
    # Eight answers.
    assert result["score"] == result["metrics"]["exact_match"] > 60
    file = data / "say" / "validation.jsonl"
    lines = done("predict", "--adapter", result["folder"], "--file", file, "--json").out
    answers = [json.loads(line) for line in lines.splitlines() if line]
    wanted = [json.loads(line)["answer"] for line in file.open()]
    right = sum(each["label"] == want for each, want in zip(answers, wanted, strict=True))
    assert 100 * right / len(wanted) == pytest.approx(result["metrics"]["exact_match"], abs=4)
    short = done(
        "predict", "--adapter", result["folder"], "--text", "cat likes dog a a",
        "--max-new-tokens", 1, "--json",
    ).json  # fmt: skip
    assert len(short["label"].split()) <= 1
    before = snapshot(cache, "/encoder/")
    files = [part for role in ("train", "validation")
             for part in ("--file", data / "say" / f"{role}.jsonl")]  # fmt: skip
    done("label", "--cache", cache, "--task", "say", *files, "--target-column", "other")
    assert snapshot(cache, "/encoder/") == before
    streams = FeatureCache.open(cache).streams("say/train")
    assert len([name for name in streams if name.startswith("decoder-")]) == 2
    (again,) = done(*how, "--out", tmp_path / "more").json
    assert again["metrics"]["exact_match"] > 50  # of four
    Predictor(Path(again["folder"]), device="cpu")


def test_long_targets_are_cut_and_counted(tmp_path: Path) -> None:
    rows = [{"sentence": text, "answer": "a cat " * (number + 1)}
            for number, text in enumerate(sentences(8))]  # fmt: skip
    file = write_rows(tmp_path / "data" / "say" / "train.jsonl", rows)
    model = save_model(tmp_path / "model", "t5")
    out = done("extract", "--model", model, "--data", file, "--cache", tmp_path / "cache",
               "--target-column", "answer", "--max-length", 9).out  # fmt: skip
    (stream,) = (
        each
        for name, each in FeatureCache.open(tmp_path / "cache").streams("train/train").items()
        if name.startswith("decoder-")
    )
    # 2, 4, 6, 8 words and the end token fit.
    assert stream.notes["truncated"] == 4
    assert stream.layout.index[:, 2].tolist() == [3, 5, 7, 9, 9, 9, 9, 9]
    assert stream.notes["targets"] in "".join(out.split()) or "decoder-" in out


@pytest.mark.parametrize("bad", ["", "  ", None, 3])
def test_a_row_without_a_target_is_named(tmp_path: Path, bad: Any) -> None:
    rows = [{"sentence": text, "answer": "a cat"} for text in sentences(4)]
    rows[2]["answer"] = bad
    file = write_rows(tmp_path / "data" / "train.jsonl", rows)
    argv = ("extract", "--data", file, "--cache", tmp_path / "cache", "--target-column", "answer")
    refused(3, "row 3", "answer", argv=argv)


def test_a_target_column_is_never_guessed(tmp_path: Path) -> None:
    rows = [{"sentence": text, "answer": "a cat", "label": "no"} for text in sentences(4)]
    file = write_rows(tmp_path / "data" / "train.jsonl", rows)
    cache = ("--cache", tmp_path / "cache")
    both = ("--target-column", "answer", "--label-column", "label")
    refused(3, "target column", "label column", argv=("extract", "--data", file, *cache, *both))
    missing = ("extract", "--data", file, *cache, "--target-column", "nothing")
    refused(3, "nothing", "--target-column", argv=missing)
    bert = save_model(tmp_path / "bert", "bert")
    encoder = ("extract", "--model", bert, "--data", file, *cache, "--target-column", "answer")
    refused(3, "generates text", "encoder", argv=encoder)
