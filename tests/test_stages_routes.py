"""What every method has to do beside being right: resume, share a pass, be saved and attached,
generate, load no more than it runs, and be told from the command line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import FAMILIES, save_model, sentences
from sherl_pipe.cache import InputError
from sherl_pipe.stages import group
from sherl_pipe.stages.adapter import TunedModel, load_route
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.methods.route import trainable
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.quantize import turn
from sherl_pipe.stages.settings import TuneResult
from sherl_pipe.stages.tune import losses
from tune_tools import (
    MUCH,
    World,
    goes_on,
    halfway,
    make_world,
    opened_for,
    run,
    same,
    usual,
    weights,
)

# What differs from a method's own settings here, and whether its route draws at random.
CHANGES: dict[str, dict[str, Any]] = {
    "lst": {"reduction": 3},
    "dtl": {"reduction": 12},
    "unipt": {"reduction": 3},
    "weighted": {},
    "linear": {},
}
DRAWS = {"lst"}
Worlds = Callable[[str], World]


@pytest.fixture(scope="module", params=["bert", "t5"])
def worlds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """By method, one cache with what the method needs of the backbone."""
    first = make_world(tmp_path_factory.mktemp(request.param), request.param)
    found: dict[str, World] = {}

    def of(method: str) -> World:
        if method not in found:
            found[method] = opened_for(first, method)
        return found[method]

    return of


@pytest.fixture(params=CHANGES)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


def settings(world: World, method: str, **change: Any) -> dict[str, Any]:
    return usual(world, method, **CHANGES[method], **change)


def mixed(world: World, method: str) -> list[dict[str, Any]]:
    """Tasks, for T5 with other words, seeds, rates and sizes mixed."""
    how = settings(world, method)
    smaller = {"reduction": 2} if how["reduction"] > 1 else {}
    return [how, how | {"seed": 1, "lr": 3e-3}, how | {"task": "size", **smaller}]


@pytest.mark.parametrize("budget", [MUCH, 0], ids=["resident", "streamed"])
def test_a_stopped_tuning_ends_with_the_same_weights(
    worlds: Worlds, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    world = worlds(method)
    how = settings(world, method)
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)
    goes_on(
        world.tuner(tmp_path / "whole", **how),
        lambda name: world.tuner(tmp_path / name, budget=budget, **how),
        halfway,
    )


def test_one_pass_ends_where_separate_runs_end(worlds: Worlds, method: str, tmp_path: Path) -> None:
    world = worlds(method)
    every = mixed(world, method)
    tuners = [world.tuner(tmp_path / str(place), **how) for place, how in enumerate(every)]
    for place, outcome in enumerate(Pack(tuners).run()):
        alone = run(world.tuner(tmp_path / "alone" / str(place), **every[place]))
        assert isinstance(outcome, TuneResult) and same(outcome, alone)
        assert weights(tmp_path / str(place)) == weights(tmp_path / "alone" / str(place))


def test_together_they_compute_what_each_computes_alone(
    worlds: Worlds, method: str, tmp_path: Path
) -> None:
    """Values, gradients and dropout of every tuning are its own, where several are trained at
    once too."""
    world = worlds(method)
    every = mixed(world, method)
    both = Pack([world.tuner(tmp_path / str(place), **how) for place, how in enumerate(every)])
    batches = []
    for place, tuner in enumerate(both.tuners):
        (batch,) = both.train.read([both.train.epoch(tuner.settings.seed, 0, 8 + place)[0]])
        batches.append(both.batch(place, batch))
        with torch.no_grad():
            for parameter in tuner.parameters.values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    start = [tuner.randomness.state for tuner in both.tuners]
    for tuner in both.tuners:
        tuner.route.train()
    found = losses(both.tuners, batches)
    torch.stack(found).sum().backward()
    for tuner, batch, loss, state in zip(both.tuners, batches, found, start, strict=True):
        gradients = [parameter.grad for parameter in tuner.parameters.values()]
        tuner.route.zero_grad()
        tuner.randomness.state = state
        alone = tuner.loss(batch)
        assert torch.allclose(alone, loss, atol=1e-5)
        alone.backward()
        for parameter, gradient in zip(tuner.parameters.values(), gradients, strict=True):
            assert gradient is not None and parameter.grad is not None
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            assert (parameter.grad - gradient).abs().max() / scale < 1e-3
        draws = not torch.equal(tuner.loss(batch), alone)
        assert draws == (method in DRAWS)
        tuner.route.eval()
        assert torch.equal(tuner.loss(batch), tuner.loss(batch))


def test_turned_features_are_fused_as_their_values_are(
    worlds: Worlds, method: str, tmp_path: Path
) -> None:
    """Large batches of a coded cache come as they were coded (see `quantize.decode`)."""
    world = worlds(method)
    tuner = world.tuner(tmp_path, **settings(world, method))
    route = tuner.route.eval()
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (batch,) = tuner.train.read([tuner.train.epoch(0, 0, 8)[0]])

    def as_coded(packed: Packed) -> Packed:
        states = turn(packed.states, 32)  # a group turned twice is 32 times itself
        states[..., : states.shape[-1] // 32 * 32] /= 32
        return Packed(states, packed.lengths, 32)

    turned = {role: as_coded(packed) for role, packed in batch.streams.items()}
    for found, expected in zip(route.fuse(turned), route.fuse(batch.streams), strict=True):
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_half_precision_is_near(worlds: Worlds, method: str, tmp_path: Path) -> None:
    world, found = worlds(method), {}
    for precision in ("float32", "bf16"):
        how = settings(world, method, precision=precision)
        tuner = world.tuner(tmp_path / precision, **how)
        tuner.route.eval()
        (batch,) = tuner.train.read([tuner.train.epoch(0, 0, 8)[0]])
        found[precision] = float(tuner.loss(batch).detach())
    assert found["bf16"] != found["float32"]
    assert found["bf16"] == pytest.approx(found["float32"], rel=0.05)


def test_it_learns(worlds: Worlds, method: str, tmp_path: Path) -> None:
    """What tells two kinds of sentences apart holds for new ones."""
    world = worlds(method)
    how = settings(world, method, task="kind", epochs=6, batch_size=16, lr=3e-2)
    tuner = world.tuner(tmp_path, **how)
    result = run(tuner)
    labels = np.array(tuner.task.held_out.labels)
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    assert result.score > majority + 15, (result.score, majority)


def test_an_adapter_is_attached_again(worlds: Worlds, method: str, tmp_path: Path) -> None:
    world = worlds(method)
    tuner = world.tuner(tmp_path, **settings(world, method, head="probe"))
    run(tuner)
    backbone = load_backbone(world.backbone.name)
    config, route = load_route(tmp_path, backbone)
    assert config.route == tuner.spec
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["route"]
    assert (saved["method"], saved["late"]) == (method, tuner.settings.late)
    for name, parameter in trainable(route).items():
        assert torch.equal(parameter, tuner.parameters[name]), name
    live = TunedModel(backbone, route).eval()
    inputs = world.tokenizer(sentences(5), return_tensors="pt", padding=True)
    if tuner.scoring is None:
        assert live(**inputs).logits.shape == (5, 2)
        with pytest.raises(InputError, match="does not generate"):
            live.generate(**inputs)
    else:
        assert live.word_scores(tuner.scoring, **inputs).shape == (5, 2)


@pytest.mark.parametrize(("family", "beams"), [("t5", 1), ("t5", 3), ("bart", 1), ("bart", 3)])
def test_generation_from_the_kv_cache(method: str, tmp_path: Path, family: str, beams: int) -> None:
    """A step that sees one new position and the KV cache gives what a pass over all positions
    gives, whatever beam search does to the cache."""
    world = make_world(tmp_path / "world", family, method)
    tuner = world.tuner(tmp_path / "run", **settings(world, method))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuner.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    live = TunedModel(load_backbone(world.backbone.name), tuner.route).eval()
    live.model.lm_head = load_backbone(world.backbone.name).model.lm_head
    if family == "bart":
        # A tied head repeats what a random model with scaled embeddings has just read.
        torch.manual_seed(0)
        live.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(live.model.lm_head.weight))
    inputs = world.tokenizer(sentences(6), return_tensors="pt", padding=True)
    wanted = {"max_new_tokens": 7, "min_new_tokens": 7, "num_beams": beams, "do_sample": False}
    found = live.generate(**inputs, **wanted)
    assert torch.equal(found, live.generate(**inputs, **wanted, use_cache=False))
    assert (
        len({tuple(row) for row in found.tolist()}) > 1 and len(set(found.flatten().tolist())) > 2
    )
    if beams == 1:
        logits = live(**inputs, decoder_input_ids=found[:, :-1]).logits[:, :-1]
        logits[..., world.tokenizer.eos_token_id] = -torch.inf  # none may end yet
        assert torch.equal(logits.argmax(-1), found[:, 1:-1])


@pytest.mark.parametrize("late", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_blocks_are_loaded_than_run(
    tmp_path: Path, family: str, method: str, late: int
) -> None:
    asked = find_method(method).late_blocks(late)
    part = load_part(save_model(tmp_path, family), asked)
    kept: dict[str, set[int]] = {}
    for name, weight in part.model.named_parameters():
        for stream, path in part.family.streams.items():
            found = re.match(rf"{re.escape(path)}\.(\d+)\.", name)
            if found and not weight.is_meta and "relative_attention_bias" not in name:
                kept.setdefault(stream, set()).add(int(found[1]))
    depth = {stream: len(part.blocks(stream)) for stream in part.family.streams}
    assert kept == {
        stream: set(range(depth[stream] - count, depth[stream]))
        for stream, count in asked.items()
        if count and stream in depth
    }
