"""Causal models that keep their own head: free text behind a prompt, and label words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import done, refused, write_rows
from model_tools import labels_of, sentences
from sherl_pipe.cache import InputError
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.predict import Predictor, _padded_before
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages import features
from sherl_pipe.stages.adapter import TunedModel
from sherl_pipe.stages.first_tokens import FirstTokens
from sherl_pipe.stages.methods.route import trainable
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.texts import IGNORED
from sherl_pipe.stages.tokens import tokenize
from sherl_pipe.stages.tune import Tuner
from test_stages_texts import make_tuner, write_texts
from transformers import AutoConfig, AutoModelForCausalLM

QUIET = Bars(None)
CAUSAL = ("gpt2", "llama", "mistral")


def save_speaker(folder: Path, family: str) -> str:
    """A tiny causal model with its head, and its tokenizer."""
    from model_tools import save_model

    path = save_model(folder, family)
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def prepare(tmp_path: Path, family: str, **data: Any) -> dict[str, Any]:
    config = make_config(
        {
            "model": save_speaker(tmp_path / "model", family),
            "cache": tmp_path / "cache",
            "data": {"source": str(tmp_path / "data"), **data},
            "extract": {"codec": "float32", "batch_tokens": 64, "taps": "all"},
            "tune": {"head": "words"},
        },
        "test",
    )
    run_extract(config, QUIET)
    cache, backbone, tokenizer = open_for_tuning(config, QUIET)
    return {"cache": cache, "backbone": backbone, "tokenizer": tokenizer, "data": tmp_path / "data"}


def live_batch(setting: dict[str, Any], role: str, side: str) -> dict[str, torch.Tensor]:
    """Prompt and target of every row in one sequence, the loss on the target's tokens alone."""
    rows = [json.loads(line) for line in (setting["data"] / f"say/{role}.jsonl").open()]
    tokenizer, ids, labels = setting["tokenizer"], [], []
    for row in rows:
        prompt = tokenizer("sentence: " + row["sentence"]).input_ids
        target = [*tokenizer(row["answer"]).input_ids, tokenizer.eos_token_id]
        ids.append(prompt + target)
        labels.append([IGNORED] * len(prompt) + target)
    size = max(map(len, ids))
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, wanted in zip(ids, labels, strict=True):
        rest = size - len(tokens)
        for name, row, fill in (("input_ids", tokens, 0), ("labels", wanted, IGNORED),
                                ("attention_mask", [1] * len(tokens), 0)):  # fmt: skip
            pad = [fill] * rest
            found[name].append(row + pad if side == "right" else pad + row)
    return {name: torch.tensor(values) for name, values in found.items()}


@pytest.mark.parametrize("late", [1, 2])
@pytest.mark.parametrize("family", CAUSAL)
def test_loss_gradients_and_metrics_are_the_live_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, late: int
) -> None:
    write_texts(tmp_path / "data")
    setting = prepare(tmp_path, family, target_column="answer")
    tuner = make_tuner(setting, tmp_path, late=late)
    tuner.route.eval()
    (batch,) = tuner.train.read([np.arange(len(tuner.task.train.ids))])
    loss = tuner.loss(batch)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in tuner.parameters.items() if p.grad is not None}
    tuner.route.zero_grad()
    live = TunedModel(setting["backbone"], tuner.route).eval()
    expected = live(**live_batch(setting, "train", "right")).loss
    assert (loss - expected).abs() < 1e-5
    expected.backward()
    found = trainable(tuner.route)
    assert len(mine) == len(found)
    for name, gradient in mine.items():
        scale = found[name].grad.abs().max().clamp(min=1e-4)
        assert (gradient - found[name].grad).abs().max() / scale < 1e-3, name
    monkeypatch.setattr(features, "MANY_ROWS", 30)  # prompts are left turned, and targets are not
    cached = tuner.outputs(tuner.held_out, 4)
    for side in ("right", "left"):
        inputs = live_batch(setting, "validation", side)
        with torch.no_grad():
            logits = live(**inputs).logits[:, :-1]
        labels = inputs["labels"][:, 1:]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED
        ).sum(1)
        right = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum(1)
        assert (cached[:, 0] - losses).abs().max() < 1e-4
        assert torch.equal(cached[:, 1], right.float())


@pytest.mark.parametrize("family", CAUSAL)
def test_generation_from_the_kv_cache(tmp_path: Path, family: str) -> None:
    write_texts(tmp_path / "data")
    setting = prepare(tmp_path, family, target_column="answer")
    tuner = make_tuner(setting, tmp_path)
    live = TunedModel(setting["backbone"], tuner.route).eval()
    tokens = tokenize(setting["tokenizer"], [(text,) for text in sentences(6)], 128)
    inputs = _padded_before(tokens.batch(range(6), 0))
    wanted = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = live.generate(**inputs, **wanted)
    assert torch.equal(found, live.generate(**inputs, **wanted, use_cache=False))
    assert len({tuple(row) for row in found[:, -6:].tolist()}) > 1


def write_labels(folder: Path, words: tuple[str, ...] = ("bad", "good")) -> None:
    rows = [{"sentence": t, "label": words[int(labels_of("colour", t))]} for t in sentences(30)]
    write_rows(folder / "say" / "train.jsonl", rows[:20])
    write_rows(folder / "say" / "validation.jsonl", rows[20:])


@pytest.mark.parametrize("family", CAUSAL)
def test_label_words_are_scored_by_their_first_tokens(tmp_path: Path, family: str) -> None:
    write_labels(tmp_path / "data")
    setting = prepare(tmp_path, family)
    task = Task(setting["cache"], "say", setting["backbone"], setting["tokenizer"])
    settings = TuneSettings(reduction=3, epochs=1, batch_size=8, head="words", pool="last")
    tuner = Tuner(task, settings, tmp_path / "run", budget=1 << 30)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    tuner.route.eval()
    live = TunedModel(setting["backbone"], tuner.route).eval()
    rows = [json.loads(line) for line in (tmp_path / "data/say/validation.jsonl").open()]
    texts = [(f"sentence: {row['sentence']}",) for row in rows]
    tokens = tokenize(setting["tokenizer"], texts, 128)
    assert tuner.scoring is not None and tuner.route.spec.outputs == 0
    cached = tuner.outputs(tuner.held_out, 4)
    ids = setting["tokenizer"](["bad", "good"]).input_ids
    right = tokens.batch(range(len(rows)), 0)
    for inputs in (right, _padded_before(right)):
        with torch.no_grad():
            assert (live.word_scores(tuner.scoring, **inputs) - cached).abs().max() < 1e-4
            logits = live(**_padded_before(inputs) if inputs is right else inputs).logits[:, -1]
        plain = logits[:, [row[0] for row in ids]].log_softmax(-1)
        assert (cached - plain).abs().max() < 1e-4
    (batch,) = tuner.train.read([np.arange(20)])
    loss = tuner.loss(batch)
    scores = tuner.route.logits(
        tuner.route.hidden([tuner.route], [tuner.route.fuse(batch.streams)], [batch.streams])[0]
    )[:, 0, [row[0] for row in ids]]
    wanted = torch.tensor([task.train.labels[row] for row in batch.rows.tolist()])
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(scores, wanted), atol=1e-5)


def test_from_texts_to_words_and_answers(tmp_path: Path) -> None:
    """All commands, for label words and for free text; what cannot be is refused."""
    model = save_speaker(tmp_path / "model", "gpt2")  # which has 64 positions
    for name, targets in (("words", ()), ("texts", ("--target-column", "label"))):
        write_labels(tmp_path / "data")
        cache = tmp_path / name
        done("extract", "--model", model, "--data", tmp_path / "data", "--cache", cache, *targets)
        head = ("--head", "words") if not targets else ()
        how = ("tune", "--cache", cache, "--out", tmp_path / "runs" / name, "--reduction", 1,
               "--epochs", 2)  # fmt: skip
        (result,) = done(*how, *head, "--json").json
        file = tmp_path / "data" / "say" / "validation.jsonl"
        lines = done("predict", "--adapter", result["folder"], "--file", file, "--json",
                     "--max-new-tokens", 500).out  # fmt: skip
        answers = [json.loads(line)["label"] for line in lines.splitlines() if line]
        wanted = [json.loads(line)["label"] for line in file.open()]
        right = 100 * sum(map(str.__eq__, answers, wanted)) / len(wanted)
        key = "exact_match" if targets else "accuracy"
        assert right == pytest.approx(result["metrics"][key], abs=11)
        refused(3, "sherl", "head", argv=(*how, "--method", "lst", "--head", "words"))
    files = ("--file", tmp_path / "data" / "say" / "train.jsonl", "--target-column", "label")
    cache = ("--cache", tmp_path / "texts", "--task", "say")
    refused(3, "extract", "--target-column", argv=("label", *cache, *files))
    predictor = Predictor(Path(result["folder"]), device="cpu")
    with pytest.raises(InputError, match="fewer than 64 tokens"):
        predictor._most({"input_ids": torch.zeros(1, 64)})


def test_words_that_begin_alike_are_refused(tmp_path: Path) -> None:
    write_labels(tmp_path / "data", ("not good", "not bad"))
    setting = prepare(tmp_path, "gpt2")
    with pytest.raises(InputError, match="begin with different tokens.*'not bad' and 'not good'"):
        FirstTokens.of_words(["not bad", "not good"], setting["tokenizer"])
    argv = ("tune", "--cache", tmp_path / "cache", "--head", "words", "--out", tmp_path / "runs")
    refused(3, "begin with different tokens", argv=argv)
