"""LST's pruned start: importances, what is kept of which weight, and where it comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import done, refused, snapshot
from model_tools import save_model, write_data
from safetensors.torch import load_file
from sherl_pipe.cache import InputError
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.methods import Lst
from sherl_pipe.stages.methods.fisher import importances, prune
from sherl_pipe.stages.methods.lst_seq2seq import LstSeq2Seq
from sherl_pipe.stages.methods.route import RouteSpec
from sherl_pipe.stages.tokens import Tokens
from torch import Tensor
from tune_tools import make_world

TAPS = {"encoder": (0, 2, 3, 5), "decoder": (0, 1, 4)}


def route_of(backbone: Backbone, reduction: int) -> LstSeq2Seq:
    spec = RouteSpec("lst", TAPS, {}, 0, reduction, None, "fisher", 0, "mean")
    route = Lst.build(backbone, spec)
    assert isinstance(route, LstSeq2Seq)
    return route


def words(backbone: Backbone, count: int = 3) -> tuple[Tokens, list[list[int]]]:
    rng = np.random.default_rng(0)
    inputs = [{"input_ids": rng.integers(4, 20, size)} for size in (5, 3, 9)[:count]]
    return Tokens(inputs, 0), [[5, 1], [7, 8, 1], [9, 1]][:count]


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_importance_is_the_sum_of_squared_gradients(tmp_path: Path, family: str) -> None:
    backbone = load_backbone(save_model(tmp_path, family))
    tokens, answers = words(backbone)
    found = importances(backbone, tokens, answers)
    model: Any = backbone.model
    assert not any(p.requires_grad for p in model.parameters())
    matrices = {n for n, p in model.named_parameters() if p.dim() == 2 and "relative" not in n}
    assert found.keys() == matrices - {"lm_head.weight"}
    model.requires_grad_(True)
    expected = dict.fromkeys(found, torch.zeros(()))
    for inputs, answer in zip(tokens.inputs, answers, strict=True):
        model.zero_grad()
        ids = torch.from_numpy(inputs["input_ids"])[None]
        logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).logits
        torch.nn.functional.cross_entropy(logits[0], torch.tensor(answer)).backward()
        expected = {n: v + model.get_parameter(n).grad.square() for n, v in expected.items()}
    for name, values in found.items():
        largest = expected[name].max()
        assert largest > 0 and (values - expected[name]).abs().max() < 1e-4 * largest, name


@pytest.mark.parametrize("family", ["t5", "t5-gated"])
def test_nothing_is_lost_at_the_full_width(tmp_path: Path, family: str) -> None:
    """Every channel is kept in its order, so the side blocks are the frozen ones."""
    backbone = load_backbone(save_model(tmp_path, family))
    route = route_of(backbone, 1)
    found = prune(backbone, route, importances(backbone, *words(backbone)))
    left_out = {"first", "down", "gates", "relative_attention_bias"}
    mine = {
        name
        for name, _ in route.named_parameters()
        if name.startswith(("encoder.", "decoder.")) and not left_out & {*name.split(".")}
    }
    assert found.keys() == mine
    model: Any = backbone.model
    for stream, taps in TAPS.items():
        for place, tap in enumerate(taps[1:]):
            block = f"{stream}.block.{tap - 1}."
            prefix = f"{stream}.stack.block.{place}."
            own = {n: v for n, v in found.items() if n.startswith(prefix)}
            assert len(own) >= 8
            for name, values in own.items():
                frozen = model.get_parameter(block + name.removeprefix(prefix))
                assert torch.equal(values, frozen), name
        norm = f"{stream}.stack.final_layer_norm.weight"
        assert torch.equal(found[norm], model.get_parameter(norm.replace(".stack", "")))


def test_inputs_that_one_layer_keeps_are_the_outputs_that_the_one_before_kept(
    tmp_path: Path,
) -> None:
    """Checked by hand-made importances: each weight keeps rows and columns that are known."""
    backbone = load_backbone(save_model(tmp_path, "t5-gated"))
    model, route = backbone.model, route_of(backbone, 2)
    generator = torch.Generator().manual_seed(0)

    def some(count: int, size: int) -> Tensor:
        return torch.randperm(size, generator=generator)[:count].sort().values

    width, inner, wide = 36, 32, 48
    start = some(width // 2, width)
    importance = {"shared.weight": torch.ones(model.get_parameter("shared.weight").shape)}
    importance["shared.weight"][:, start] = 3.0
    kept, expected = start, {}
    for stream in ("encoder", "decoder"):
        parts = ["SelfAttention", *["EncDecAttention"] * (stream == "decoder"), "DenseReluDense"]
        for number in range(len(backbone.blocks(stream))):
            for at, part in enumerate(parts):
                path = f"{stream}.block.{number}.layer.{at}."
                expected[path + "layer_norm.weight"] = (kept, None)
                dense = part == "DenseReluDense"
                first = ("wi_0", "wi_1") if dense else ("q", "k", "v")
                for group, size in (
                    (first, wide if dense else inner),
                    (("wo" if dense else "o",), width),
                ):
                    rows = some(size // 2, size)
                    for leaf in group:
                        name = f"{path}{part}.{leaf}.weight"
                        values = torch.full(model.get_parameter(name).shape, 2.0)
                        # Columns that were lost do not count, however important.
                        values[:, kept] = 1e-12
                        values[rows[:, None], kept] = 1e-11
                        # One of a group alone decides nothing.
                        lost = next(r for r in range(size) if r not in rows)
                        values[lost, kept] *= 5 if leaf in ("wi_0", "q") else 1
                        importance[name] = values
                        expected[name] = (rows, kept)
                    kept = rows
        expected[f"{stream}.final_layer_norm.weight"] = (kept, None)
    found = prune(backbone, route, importance)
    assert len(found) == 3 * 9 + 1 + 2 * 14 + 1
    for name, values in found.items():
        stream, _, rest = name.partition(".stack.")
        if rest.startswith("block."):
            _, place, rest = rest.split(".", 2)
            rest = f"block.{TAPS[stream][int(place) + 1] - 1}.{rest}"
        weight = model.get_parameter(f"{stream}.{rest}")
        rows, columns = expected[f"{stream}.{rest}"]
        wanted = weight[rows] if columns is None else weight[rows][:, columns]
        assert torch.equal(values, wanted), name


def test_weights_have_to_be_given_and_to_fit(tmp_path: Path) -> None:
    world = make_world(tmp_path, "t5", "lst")
    how = {"method": "lst", "late": 0, "init": "fisher"}
    tuner = world.tuner(tmp_path / "run", reduction=3, **how)
    with pytest.raises(InputError, match="init fisher: give its weights to `start_from` first"):
        tuner.optimizer()
    name = "encoder.stack.final_layer_norm.weight"
    with pytest.raises(InputError, match=rf"starts from: shape of {name}: expected \(12,\)"):
        tuner.start_from({name: torch.ones(3)})
    with pytest.raises(InputError, match="shape of nothing: expected no such weight"):
        tuner.start_from({"nothing": torch.ones(3)})
    tuner.start_from({name: torch.full((12,), 2.0)})
    assert tuner.parameters[name].eq(2).all()
    assert tuner.optimizer().param_groups


def test_seeds_of_a_task_share_one_pruning(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "t5-gated")
    data = write_data(tmp_path / "data", ("colour", "size"))
    cache, out = tmp_path / "cache", tmp_path / "runs"
    done("extract", "--model", model, "--data", data, "--cache", cache, "--codec", "float32")
    tune = ("tune", "--cache", cache, "--method", "lst", "--init", "fisher", "--reduction", 3)
    tune = (*tune, "--epochs", 1, "--out", out, "--json")
    refused(3, "data: expected the texts", "found none", argv=tune)
    other = write_data(tmp_path / "other" / "data", ("colour", "size"), train=9)
    refused(3, "all training texts of colour", " of 40 in ", argv=(*tune, "--data", other))
    seeds = ("--seed", 0, "--seed", 1)
    # A rate of next to nothing leaves what it started from.
    still = (*tune, *seeds, "--data", data, "--lr", 1e-30)
    assert len(done(*still).json) == 4
    kept = snapshot(out, "/fisher-")
    assert len(kept) == 2
    for task in ("colour", "size"):
        (file,) = (out / task).glob("fisher-*.safetensors")
        pruned = load_file(file)
        backbone = load_backbone(model)
        assert pruned["encoder.stack.block.0.layer.0.SelfAttention.q.weight"].shape == (8, 12)
        for folder in (out / task).glob("lst-r3-late0-fisher-*"):
            config = json.loads((folder / "adapter_config.json").read_text())
            assert config["route"]["init"] == "fisher"
            weights = load_file(folder / "adapter.safetensors")
            for name, values in pruned.items():
                assert torch.allclose(weights[name], values, atol=1e-12), name
        assert backbone.width == 36
    # What is there is used again, without the texts; what is finished is not begun.
    done(*tune, *seeds, "--lr", 1e-3)
    assert snapshot(out, "/fisher-") == kept
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(4, file.name, "is damaged. Delete it", argv=(*tune, "--seed", 7))
    file.unlink()
    done(*tune, *seeds, "--lr", 1e-3)
    assert not file.exists()


def test_an_encoder_is_not_pruned(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model", "bert"), write_data(tmp_path / "data")
    done("extract", "--model", model, "--data", data, "--cache", tmp_path / "cache")
    tune = ("tune", "--cache", tmp_path / "cache", "--method", "lst", "--init", "fisher")
    argv = (*tune, "--reduction", 3, "--data", data, "--out", tmp_path / "runs")
    refused(3, "init: expected random (fisher prunes T5's blocks only), found fisher", argv=argv)
