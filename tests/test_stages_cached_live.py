"""The property that everything rests on: what is computed from the cache is what the live model
computes, for every family, on ragged batches, in values and in gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import (
    CAUSAL,
    ENCODERS,
    FAMILIES,
    SEQ2SEQ,
    VISION,
    save_model,
    write_data,
    write_images,
)
from sherl_pipe.cache import FeatureCache
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages import features
from sherl_pipe.stages.adapter import TunedModel
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.inputs import pad_id, read_inputs
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.route import trainable
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.templates import Template
from sherl_pipe.stages.tokens import tokenize
from sherl_pipe.stages.tune import Tuner
from torch import Tensor
from torch.nn import functional as F

QUIET = Bars(None)
LST = {"method": "lst", "late": 0, "init": "random"}
READOUT = {"reduction": 1, "init": "random"}
LINEAR, WEIGHTED = (READOUT | {"method": name} for name in ("linear", "weighted"))
# By method, a setting of it; without `late` it is what a cache makes of it.
UNIPT = {"method": "unipt", "init": "paper"}
DTL = {"method": "dtl", "init": "paper"}
EACH = [{}, LST, LINEAR, WEIGHTED, UNIPT, DTL]
PLUS = DTL | {"method": "dtl+"}
# DINOv2 has no side blocks.
IMAGE_WAYS = [
    (family, how)
    for family in VISION
    for how in ({"late": 1}, {"late": 2}, *EACH[1:], PLUS, PLUS | {"late": 1})
    if (family, how) != ("dinov2", LST)
]


def prepare(tmp_path: Path, family: str, task: str = "colour", **extract: Any) -> dict[str, Any]:
    """A cache of a tiny model, with everything needed to tune on it."""
    model = save_model(tmp_path / "model", family)
    write = write_images if family in VISION else write_data
    data = write(tmp_path / "data", (task,))
    config = make_config(
        {
            "model": model,
            "cache": tmp_path / "cache",
            "data": {"source": str(data)},
            "extract": {"codec": "float32", "batch_tokens": 64, **extract},
        },
        "test",
    )
    run_extract(config, QUIET)
    cache, backbone, tokenizer = open_for_tuning(config, QUIET, whole=True)
    return {
        "cache": cache,
        "backbone": backbone,
        "tokenizer": tokenizer,
        "data": data,
        "config": config,
        "task": Task(cache, task, backbone, tokenizer),
    }


def make_tuner(setting: dict[str, Any], tmp_path: Path, **change: Any) -> Tuner:
    """A tuner whose every parameter is random, so that nothing is gated off."""
    method = find_method(change.get("method", "sherl"))
    usual = method.usual_for(setting["cache"].identity.streams)
    family = setting["backbone"].family
    settings = TuneSettings(
        **{
            "reduction": 3,
            "late": usual["late"],
            "epochs": 1,
            "batch_size": 8,
            "pool": family.pool,
            **change,
        }
    )
    tuner = Tuner(setting["task"], settings, tmp_path / "run", budget=1 << 30)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return tuner


def live_inputs(
    setting: dict[str, Any], task: str, role: str, padding: str = "right"
) -> dict[str, Tensor]:
    """The texts of a split as one ragged batch, in the data's order, or its images."""
    stream = "encoder" if setting["backbone"].family.seq2seq else "hidden"
    notes = setting["cache"].stream(f"{task}/{role}", stream).notes
    template = Template.from_json(notes["template"])
    images = setting["backbone"].family.images
    (source,) = [s for s in load_sources(str(setting["data"]), images=images) if s.role == role]
    if images:
        tokens = read_inputs(setting["tokenizer"], source.inputs(template), 0)
        return tokens.batch(range(len(source.rows)), 0)
    tokens = tokenize(setting["tokenizer"], source.texts(template), 128)
    assert len(set(tokens.lengths.tolist())) > 3
    inputs = tokens.batch(range(len(source.rows)), pad_id(setting["tokenizer"]))
    if padding == "left":
        away = inputs["attention_mask"].shape[1] - torch.from_numpy(tokens.lengths)
        places = torch.arange(inputs["attention_mask"].shape[1]) - away[:, None]
        places = places % len(places[0])
        inputs = {name: values.gather(1, places) for name, values in inputs.items()}
        assert inputs["attention_mask"][:, -1].all() and not inputs["attention_mask"][:, 0].all()
    return inputs


ONES = [{"late": 1}, {"late": 2}, *EACH[1:]]
WAYS = [(family, {**how}) for family in (*SEQ2SEQ, *ENCODERS, *CAUSAL) for how in ONES]
WAYS += [(family, how | {"loss": "vocabulary"}) for family in SEQ2SEQ for how in EACH]
WAYS += [(family, {"pool": "mean"}) for family in CAUSAL]
WAYS += [(family, {"pool": "last", "late": 2}) for family in ENCODERS]
WAYS += [("bert", how | {"pool": "first"}) for how in ({}, LST)]
WAYS += IMAGE_WAYS
WAYS += [("vit", how | {"pool": "first"}) for how in ({}, WEIGHTED)]


@pytest.mark.parametrize(("family", "how"), WAYS, ids=str)
def test_evaluation_equals_live(tmp_path: Path, family: str, how: dict[str, Any]) -> None:
    check_evaluation(prepare(tmp_path, family, taps="all"), tmp_path, how)


@pytest.mark.parametrize(
    ("family", "taps", "how", "late"),
    [
        # What leaves the decoder's last block is cached.
        ("t5", (0, 3, 5), LINEAR, 0),
        ("t5", (0, 3, 5), WEIGHTED, 0),
        ("t5", (0, 3, 5), UNIPT, 0),
        # The middle is not cached.
        ("t5", (0, 4), DTL, 1),
        ("bert", (0, 1, 3), DTL, 1),
        ("t5", "all", LINEAR | {"late": 2}, 2),
        ("t5", "all", WEIGHTED | {"late": 2}, 2),
        ("t5", "all", DTL | {"late": 4, "loss": "vocabulary"}, 4),
        ("bert", "all", DTL | {"late": 3, "pool": "first"}, 3),
        ("bert", "all", LINEAR | {"pool": "first"}, 0),
        ("bert", (1, 2), UNIPT | {"pool": "first"}, 0),
    ],
)
def test_other_taps_and_late_routes(
    tmp_path: Path, family: str, taps: Any, how: dict[str, Any], late: int
) -> None:
    tuner = check_evaluation(prepare(tmp_path, family, taps=taps), tmp_path, how)
    assert tuner.spec.late == late


def check_evaluation(setting: dict[str, Any], folder: Path, how: dict[str, Any]) -> Tuner:
    """Compare what a tuning gives for the held-out rows with what the live model gives."""
    tuner = make_tuner(setting, folder, **how)
    cached = tuner.outputs(tuner.held_out, 6)
    live = TunedModel(setting["backbone"], tuner.route).eval()
    assert cached.std() > 0.02
    for padding in ("right",) if setting["backbone"].family.images else ("right", "left"):
        inputs = live_inputs(setting, "colour", "validation", padding)
        with torch.no_grad():
            if tuner.scoring is not None:
                expected = live.word_scores(tuner.scoring, **inputs)
            else:
                expected = live(**inputs).logits
        assert (cached - expected).abs().max() < 1e-4, padding
    return tuner


@pytest.mark.parametrize(
    ("family", "how"), [(family, how) for family in FAMILIES for how in EACH] + IMAGE_WAYS, ids=str
)
def test_gradients_equal_live(tmp_path: Path, family: str, how: dict[str, Any]) -> None:
    setting = prepare(tmp_path, family)
    tuner = make_tuner(setting, tmp_path, loss="vocabulary", **how)
    task = setting["task"]
    tuner.route.eval()
    order = np.arange(len(task.train.ids))
    (batch,) = list(tuner.train.read([order]))
    loss = tuner.loss(batch)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in tuner.parameters.items() if p.grad is not None}
    tuner.route.zero_grad()
    live = TunedModel(setting["backbone"], tuner.route).eval()
    inputs: dict[str, Any] = live_inputs(setting, "colour", "train")
    if task.tree is not None:
        words = [torch.tensor(task.tree.words[label]) for label in task.train.labels]
        labels = torch.nn.utils.rnn.pad_sequence(words, True, -100)
    else:
        labels = torch.tensor(task.train.labels)
    expected = live(**inputs, labels=labels).loss
    assert (loss - expected).abs() < 1e-5
    expected.backward()
    found = trainable(tuner.route)
    assert len(mine) == len(found)
    for name, gradient in mine.items():
        scale = found[name].grad.abs().max().clamp(min=1e-4)
        assert (gradient - found[name].grad).abs().max() / scale < 1e-3, name


@pytest.mark.parametrize(("codec", "bound"), [("bfloat16", 0.05), ("int8", 0.1), ("int4", 0.5)])
@pytest.mark.parametrize("family", ["t5", "bert"])
@pytest.mark.parametrize("how", EACH, ids=str)
def test_lossy_codecs_stay_close(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    codec: str,
    bound: float,
    how: dict[str, Any],
) -> None:
    monkeypatch.setattr(features, "MANY_ROWS", 1)  # groups stay turned, as in large batches
    setting = prepare(tmp_path, family, codec=codec)
    tuner = make_tuner(setting, tmp_path, **how)
    cached = tuner.outputs(tuner.held_out, 6)
    live = TunedModel(setting["backbone"], tuner.route).eval()
    inputs = live_inputs(setting, "colour", "validation")
    with torch.no_grad():
        scoring = tuner.scoring
        expected = live.word_scores(scoring, **inputs) if scoring else live(**inputs).logits
    assert (cached - expected).abs().max() < bound * expected.abs().max()


def test_word_scores_are_the_models_likelihoods(tmp_path: Path) -> None:
    """Tree scoring equals plain teacher forcing of each word, graded labels included."""
    setting = prepare(tmp_path, "t5", task="size")
    tuner = make_tuner(setting, tmp_path, loss="vocabulary")
    task = setting["task"]
    live = TunedModel(setting["backbone"], tuner.route).eval()
    inputs = live_inputs(setting, "size", "validation")
    cached = tuner.outputs(tuner.held_out, 6)
    for number, word in enumerate(task.tree.words):
        labels = torch.tensor(word).repeat(len(inputs["input_ids"]), 1)
        with torch.no_grad():
            logits = live(inputs["input_ids"], inputs["attention_mask"], labels).logits
        plain = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        assert (cached[:, number] - plain).abs().max() < 1e-4


def test_words_compete_with_one_another(tmp_path: Path) -> None:
    """The `words` loss and scores are those of a softmax over what tells the words apart, and its
    gradients those of the live model with that loss."""
    setting = prepare(tmp_path, "t5", task="size")
    tuner = make_tuner(setting, tmp_path)
    task = setting["task"]
    live = TunedModel(setting["backbone"], tuner.route).eval()
    tuner.route.eval()
    (batch,) = list(tuner.train.read([np.arange(len(task.train.ids))]))
    loss = tuner.loss(batch)
    loss.backward()
    mine = {name: p.grad.clone() for name, p in tuner.parameters.items() if p.grad is not None}
    tuner.route.zero_grad()
    inputs = live_inputs(setting, "size", "train")
    # "0" to "5", each one token and the end token: they part at the first one.
    first = [word[0] for word in task.tree.words]
    start = torch.zeros(len(inputs["input_ids"]), 1, dtype=torch.long)
    logits = live(**inputs, decoder_input_ids=start).logits[:, 0, first]
    expected = F.cross_entropy(logits, torch.from_numpy(task.words_of(task.train.labels)))
    assert (loss - expected).abs() < 1e-5
    expected.backward()
    found = trainable(tuner.route)
    assert len(mine) == len(found)
    for name, gradient in mine.items():
        scale = found[name].grad.abs().max().clamp(min=1e-4)
        assert (gradient - found[name].grad).abs().max() / scale < 1e-3, name
    scores = tuner.outputs(tuner.held_out, 6)
    assert torch.allclose(scores.exp().sum(-1), torch.ones(len(scores)), atol=1e-5)


@pytest.mark.parametrize("family", ["bert", *VISION])
def test_cached_taps_are_the_backbones_hidden_states(tmp_path: Path, family: str) -> None:
    setting = prepare(tmp_path, family, taps="all")
    inputs = live_inputs(setting, "colour", "train")
    with torch.no_grad():
        out = setting["backbone"].model(**inputs, output_hidden_states=True)
    stream = FeatureCache.open(tmp_path / "cache").stream("colour/train", "hidden")
    for example in range(stream.examples):
        found = torch.from_numpy(stream.read_example(example))
        for tap, states in enumerate(out.hidden_states):
            assert (found[tap] - states[example, : found.shape[1]]).abs().max() < 1e-5
