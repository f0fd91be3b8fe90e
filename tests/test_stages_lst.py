"""LST from a cache: what it starts from, reads and loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_tools import FAMILIES, save_model
from sherl_pipe.cache import InputError
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.methods import Lst
from sherl_pipe.stages.methods.ladder import Ladder
from sherl_pipe.stages.methods.route import RouteSpec, trainable
from sherl_pipe.stages.part import load_part
from transformers import T5Config, T5ForConditionalGeneration
from tune_tools import World, make_world

HOW: dict[str, Any] = {"method": "lst", "late": 0, "init": "random", "reduction": 3}


@pytest.fixture(scope="module", params=["bert", "t5"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp(request.param), request.param, "lst")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


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
        "bart": {"model.shared.weight"},  # whose head it is
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
    with pytest.raises(InputError, match=r"taps of the hidden .*--taps "):
        Lst.choose_taps(backbone, 0, {"hidden": held})
