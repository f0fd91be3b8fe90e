"""LST from a cache: what it reads and loads, resume, packs, and the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import done, refused
from model_tools import FAMILIES, save_model, sentences, write_data
from sherl_pipe.cache import InputError
from sherl_pipe.stages import pack
from sherl_pipe.stages.adapter import TunedModel, load_route, read_adapter
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.methods import Lst
from sherl_pipe.stages.methods.base import RouteSpec, trainable
from sherl_pipe.stages.methods.ladder import Ladder
from sherl_pipe.stages.pack import Pack
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.settings import TuneResult
from sherl_pipe.stages.tune import losses
from transformers import T5Config, T5ForConditionalGeneration
from tune_tools import MUCH, Stopped, World, make_world, recorder, run, same, weights

HOW: dict[str, Any] = {"method": "lst", "late": 0, "init": "random", "reduction": 3}
MIXED: list[dict[str, Any]] = [
    HOW,
    HOW | {"seed": 1, "lr": 3e-3},
    HOW | {"task": "size", "reduction": 2},
]


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param, "lst")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.parametrize("budget", [MUCH, 0], ids=["resident", "streamed"])
def test_a_stopped_tuning_ends_with_the_same_weights(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    monkeypatch.setattr(pack, "CHECKPOINT_SECONDS", 0)
    seen: list[int] = []
    whole = run(world.tuner(tmp_path / "whole", **HOW), recorder(seen))
    for stop in (1, len(seen) // 2 + 1):
        folder = tmp_path / str(stop)
        with pytest.raises(Stopped):
            run(world.tuner(folder, budget=budget, **HOW), recorder([], stop))
        resumed: list[int] = []
        result = run(world.tuner(folder, budget=budget, **HOW), recorder(resumed))
        assert resumed == list(range(stop, len(seen) + 1))
        assert weights(folder) == weights(tmp_path / "whole") and same(result, whole)


def test_one_pass_ends_where_separate_runs_end(world: World, tmp_path: Path) -> None:
    tuners = [world.tuner(tmp_path / str(place), **how) for place, how in enumerate(MIXED)]
    for place, outcome in enumerate(Pack(tuners).run()):
        alone = run(world.tuner(tmp_path / "alone" / str(place), **MIXED[place]))
        assert isinstance(outcome, TuneResult) and same(outcome, alone)
        assert weights(tmp_path / str(place)) == weights(tmp_path / "alone" / str(place))


def test_together_they_draw_what_each_draws_alone(world: World, tmp_path: Path) -> None:
    """Dropout of every tuning is its own, where several are trained at once too."""
    both = Pack([world.tuner(tmp_path / str(place), **how) for place, how in enumerate(MIXED)])
    batches = []
    for place, tuner in enumerate(both.tuners):
        (batch,) = both.train.read([both.train.epoch(tuner.settings.seed, 0, 8 + place)[0]])
        batches.append(both.batch(place, batch))
    start = [tuner.randomness.state for tuner in both.tuners]
    for tuner in both.tuners:
        tuner.route.train()
    found = losses(both.tuners, batches)
    for tuner, state in zip(both.tuners, start, strict=True):
        tuner.randomness.state = state
    for tuner, batch, loss in zip(both.tuners, batches, found, strict=True):
        assert torch.equal(tuner.loss(batch), loss)
        assert not torch.equal(tuner.loss(batch), loss)  # the next draw
        tuner.route.eval()
        assert torch.equal(tuner.loss(batch), tuner.loss(batch))


def test_it_learns(world: World, tmp_path: Path) -> None:
    """What tells two kinds of sentences apart holds for new ones."""
    tuner = world.tuner(tmp_path, **HOW, task="kind", epochs=6, batch_size=16)
    result = run(tuner)
    labels = np.array(tuner.task.held_out.labels)
    majority = 100 * max(labels.mean(), 1 - labels.mean())
    assert result.score > majority + 15, (result.score, majority)


def test_an_adapter_is_attached_again(world: World, tmp_path: Path) -> None:
    tuner = world.tuner(tmp_path, **HOW)
    run(tuner)
    backbone = load_backbone(world.backbone.name)
    config, route = load_route(tmp_path, backbone)
    assert config.route == tuner.spec and (config.route.late, config.route.variant) == (0, None)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["route"]
    assert (saved["method"], saved["init"], saved["last"]) == ("lst", "random", {})
    for name, parameter in trainable(route).items():
        assert torch.equal(parameter, tuner.parameters[name]), name
    live = TunedModel(backbone, route).eval()
    inputs = world.tokenizer(sentences(5), return_tensors="pt", padding=True)
    if tuner.scoring is None:
        assert live(**inputs).logits.shape == (5, 2)
    else:
        assert live.word_scores(tuner.scoring, **inputs).shape == (5, 2)
        assert live.generate(**inputs, max_new_tokens=3).shape[0] == 5


@pytest.mark.parametrize("family", FAMILIES)
def test_no_block_is_loaded(tmp_path: Path, family: str) -> None:
    part = load_part(save_model(tmp_path, family), Lst.late_blocks(0))
    kept = {name for name, weight in part.model.named_parameters() if not weight.is_meta}
    tables = {
        f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for stack in ("encoder", "decoder")
    }
    norms = {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    head = {"t5": {"shared.weight"}, "t5-gated": {"lm_head.weight"}}
    others = {
        "mpnet": {"encoder.relative_attention_bias.weight"},
        "deberta-v2": {
            f"encoder.{name}"
            for name in ("rel_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
        },
        "modernbert": {"final_norm.weight"},
        "gpt2": {"ln_f.weight", "ln_f.bias"},
    } | {name: {"norm.weight"} for name in ("llama", "mistral", "qwen2", "qwen3")}
    expected = tables | norms | head[family] if family in head else others.get(family, set())
    assert kept == expected
    assert part.device == torch.device("cpu") and not part.whole


def test_side_blocks_start_as_published(world: World, tmp_path: Path) -> None:
    tuner = world.tuner(tmp_path, **HOW)
    model: Any = world.backbone.model
    ladders = {n: m for n, m in tuner.route.named_modules() if isinstance(m, Ladder)}
    assert ladders
    for name, ladder in ladders.items():
        assert not ladder.gates.any() and not ladder.first.bias.any() and not ladder.down.bias.any()
        for weight in (ladder.first.weight, ladder.down.weight):
            assert float(weight.detach().std()) == pytest.approx(0.01, rel=0.2)
        if world.backbone.family.seq2seq:
            side: Any = ladder.stack
            frozen = getattr(model, name).block[0].layer[0].SelfAttention.relative_attention_bias
            owners = [key for key, _ in side.named_parameters() if "relative" in key]
            assert owners == ["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
            table = side.block[0].layer[0].SelfAttention.relative_attention_bias.weight
            assert (
                torch.equal(table, frozen.weight) and table.data_ptr() != frozen.weight.data_ptr()
            )


def test_published_t5_base_setting() -> None:
    """3,878,712 side parameters, of which the gates of skipped blocks are not built (SPEC 4)."""
    with torch.device("meta"):
        shape = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
        backbone = Backbone(T5ForConditionalGeneration(T5Config(**shape)))
        held = {stream: tuple(range(13)) for stream in ("encoder", "decoder")}
        taps, last = Lst.choose_taps(backbone, 0, held)
        spec = RouteSpec("lst", taps, last, 0, 8, None, "random", 0, "mean")
        route = Lst.build(backbone, spec)
    layers = [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert taps == dict.fromkeys(held, (0, *(layer + 1 for layer in layers)))
    gates_left_out = 2 * (12 - len(layers))
    assert sum(p.numel() for p in trainable(route).values()) == 3_878_712 - gates_left_out


@pytest.mark.parametrize(
    ("family", "held", "chosen"),
    [
        # The published layers; without the last block's output where the cache lacks it.
        ("t5", range(6), (0, 2, 3, 4)),
        ("bert", range(5), (0, 1, 2, 3, 4)),
        ("bert", range(4), (0, 1, 2, 3)),
        # Another selection is read as it is.
        ("t5", (0, 1, 5), (0, 1, 5)),
        ("bert", (0, 3), (0, 3)),
    ],
)
def test_taps_that_are_read(
    tmp_path: Path, family: str, held: range | tuple[int, ...], chosen: tuple[int, ...]
) -> None:
    backbone = load_backbone(save_model(tmp_path, family))
    cached = dict.fromkeys(backbone.family.streams, tuple(held))
    assert Lst.choose_taps(backbone, 0, cached) == (dict.fromkeys(cached, chosen), {})


@pytest.mark.parametrize("held", [(1, 2, 3), (0,)])
def test_taps_that_lst_cannot_do_without(tmp_path: Path, held: tuple[int, ...]) -> None:
    backbone = load_backbone(save_model(tmp_path, "bert"))
    with pytest.raises(InputError, match=r"taps of the hidden .*--taps 0,1,2,3,4 or --taps all"):
        Lst.choose_taps(backbone, 0, {"hidden": held})


def test_from_the_command_line(tmp_path: Path) -> None:
    for family in ("t5", "bert"):
        where = tmp_path / family
        model, data = save_model(where / "model", family), write_data(where / "data")
        source = ("--model", model, "--data", data)
        done("extract", *source, "--cache", where / "cache")
        tune = ("tune", "--cache", where / "cache", "--method", "lst", "--out", where / "runs")
        short = ("--epochs", 1)
        results = done(*tune, *short, "--reduction", 3, "--json").json
        assert [result["method"] for result in results] == ["lst"]
        (folder,) = (where / "runs" / "colour").iterdir()
        assert folder.name.startswith("lst-r3-late0-random-")
        assert read_adapter(folder)[0].route.late == 0
        answers = done("predict", "--adapter", folder, "--text", "the red cat", "--json").json
        assert answers["label"] in ("0", "1")
        # Eight is the published reduction, and no head of this model is wider.
        assert done(*tune, *short, "--json").json[0]["trainable"] < results[0]["trainable"]
        refused(3, "late: expected 0 (lst has no late blocks), found 1", argv=(*tune, "--late", 1))
        refused(3, "init: expected one of", "found residual", argv=(*tune, "--init", "residual"))
        refused(3, "reduction: expected 1 to", "found 10", argv=(*tune, "--reduction", 10))
        plan = ("plan", *source, "--cache", where / "new", "--method", "lst", "--reduction", 3)
        assert done(*plan, "--json").json
