"""UniPT: parity with the papers' programs, packed features, start, bad input."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from golden_tools import (
    GRADIENT,
    OUTPUT,
    check_module,
    check_refusals,
    difference,
    listed,
    load,
    section,
)
from sherl_pipe.cache import InputError
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods.interaction import causal_interaction, parallel_interaction
from sherl_pipe.stages.methods.unipt import UniPT, from_reference
from sherl_pipe.stages.methods.unipt_clip import ClipUniPT
from sherl_pipe.stages.methods.unipt_maps import MapUniPT
from sherl_pipe.stages.quantize import turn
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor


def mask_of(inputs: dict[str, Tensor]) -> Tensor:
    """`[B, S]` by a golden's mask, or by its lengths."""
    if "mask" in inputs:
        return inputs["mask"]
    return torch.arange(inputs["features.0"].shape[1]) < inputs["lengths"][:, None]


@pytest.mark.parametrize("variant", ["bert", "clipvil"])
@pytest.mark.parametrize("stacked", [False, True])
def test_over_tokens(variant: str, stacked: bool) -> None:
    _, tensors = load(f"unipt_{variant}")
    module = from_reference(section(tensors, "param."), variant)

    def run(module: UniPT, inputs: dict[str, Tensor]) -> Tensor:
        taps = torch.stack(listed(inputs)) if stacked else listed(inputs)
        return module(taps, mask_of(inputs))

    check_module(f"unipt_{variant}", module, run)


@pytest.mark.parametrize("tower", ["text", "image"])
def test_clip4clip(tower: str) -> None:
    _, tensors = load(f"unipt_clip4clip_{tower}")
    module = UniPT.from_reference(section(tensors, "param."), "clip4clip")

    def run(module: ClipUniPT, inputs: dict[str, Tensor]) -> Tensor:
        extra = {key: inputs.get(key) for key in ("mask", "position")}
        assert (tower == "text") == all(value is not None for value in extra.values())
        return module(listed(inputs), inputs["anchor"], **extra)

    check_module(f"unipt_clip4clip_{tower}", module, run)


def test_resnet() -> None:
    _, tensors = load("unipt_resnet")
    module = UniPT.from_reference(section(tensors, "param."), "resnet")
    check_module("unipt_resnet", module, lambda m, inputs: m(listed(inputs)))


@pytest.mark.parametrize("variant", ["bert", "clipvil"])
def test_packed_features_give_what_padded_ones_do(variant: str) -> None:
    _, tensors = load(f"unipt_{variant}")
    module = UniPT.from_reference(section(tensors, "param."), variant)
    assert isinstance(module, UniPT)
    inputs = section(tensors, "input.")
    mask = mask_of(inputs).bool()
    assert not mask.all()
    states = torch.stack([feature[mask] for feature in listed(inputs)])
    packed = Packed(states, mask.sum(1))
    reduced = module.reduce(packed.states)
    found = module.interact(torch.stack([packed.pad(each) for each in reduced]), packed.mask())
    out = module.expand(reduced[-1], found[packed.mask()])
    assert difference(out, tensors["output.out"][mask]) < OUTPUT


def test_turned_taps_are_reduced_as_their_values_are() -> None:
    module, taps = UniPT(12, 4, 3, 5), torch.randn(3, 6, 12)
    assert difference(module.reduce(taps, 8), module.reduce(turn(taps, 8))) < OUTPUT


@pytest.mark.parametrize("variant", ["bert", "clipvil"])
def test_tokens_do_not_see_the_padding(variant: str) -> None:
    torch.manual_seed(0)
    module = UniPT(6, 3, 3, 5, variant)
    taps = torch.randn(3, 1, 4, 6)
    mask = torch.tensor([[True, True, True, False]])
    moved = taps.clone()
    moved[:, :, 3] += 1
    out, other = module(taps, mask), module(moved, mask)
    assert torch.equal(out[:, :3], other[:, :3])
    assert not torch.allclose(out[:, 3], other[:, 3])
    assert difference(out[:, :3], module(taps[:, :, :3])) < GRADIENT


def one_by_one(
    reduced: Tensor, seen: Tensor, memory: Tensor, inside: Tensor, weight: Tensor, epsilon: float
) -> Tensor:
    """`causal_interaction` of `[K, B, Q, h]`, a position and a target at a time."""
    out = torch.zeros(reduced.shape[1], seen.shape[0], reduced.shape[3])
    for example, place in product(range(out.shape[0]), range(out.shape[1])):
        own = reduced.shape[2] - seen.shape[0] + place
        past = [reduced[k, example][seen[place]] for k in range(len(reduced))]
        anchor, mean = reduced[-1, example, own], past[-1].mean(0)
        targets = [*past[:-1], memory[example][inside[example]]]
        merged, trust = [], []
        for number, target in enumerate(targets):
            scores = (target @ anchor).clamp(min=0)
            found = (scores / (scores.sum() + epsilon)) @ target
            merged.append(found + (reduced[number, example, own] if number < len(past) - 1 else 0))
            trust.append(weight @ (mean * target.mean(0)))
        shares = torch.stack(trust).softmax(0)
        out[example, place] = (shares[:, None] * torch.stack(merged)).sum(0)
    return out


@pytest.mark.parametrize("asked", [5, 2])
def test_positions_look_at_what_they_see_alone(asked: int) -> None:
    """On a tree of label words: nodes see their own path, and the tokens of a memory."""
    torch.manual_seed(0)
    tree = PrefixTree(0, ((4, 5, 1), (4, 6, 1), (7, 1)))
    assert tree.nodes == [(0,), (0, 4), (0, 7), (0, 4, 5), (0, 4, 6)]
    paths = [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 4]]
    assert [row.nonzero().flatten().tolist() for row in tree.ancestry] == paths
    reduced, memory, weight = torch.randn(3, 2, 5, 4), torch.randn(2, 6, 4), torch.randn(4)
    inside = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    seen = tree.ancestry[-asked:]
    found = causal_interaction(
        reduced, seen[None].float(), memory, inside.float(), weight, torch.tensor(0.3), 1e-2
    )
    expected = one_by_one(reduced, seen, memory, inside, weight, 1e-2)
    assert difference(found, expected) < OUTPUT


def test_a_memory_that_nobody_trusts_leaves_the_published_interaction() -> None:
    """What the last of several positions finds is then what it finds in UniPT itself."""
    torch.manual_seed(0)
    reduced, weight = torch.randn(3, 2, 5, 4), torch.randn(4)
    mean = reduced[-1].mean(1, keepdim=True)
    far = -1e4 * weight * mean  # w . (mean z * n) is far below that of any target
    past = torch.ones(5, 5).tril()[None]
    bias = torch.tensor(0.3)
    found = causal_interaction(reduced, past, far, torch.ones(2, 1), weight, bias, 1e-2)
    expected = parallel_interaction(reduced[:-1], reduced[-1], weight, bias, 1e-2)
    assert difference(found[:, -1], expected[:, -1]) < OUTPUT


def test_start() -> None:
    torch.manual_seed(0)
    bert = UniPT(80, 40, 3, 60, "bert").reference_parameters()
    sizes = {"downsample_layers.2.0": 80, "projection_layer.0": 40, "upsample_layer.1": 40}
    for name, inputs in sizes.items():
        for kind in ("weight", "bias"):
            assert 0.8 * inputs**-0.5 < bert[f"{name}.{kind}"].abs().max() <= inputs**-0.5
    vil = UniPT(80, 40, 3, 60, "clipvil").reference_parameters()
    for name in ("side_first_downsample_l.0", "side_downsamples_l.1.0", "side_projection_l.2"):
        assert vil[f"{name}.weight"].std() == pytest.approx(0.02, rel=0.1), name
    assert vil["side_final_upsample_l.0.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert vil["side_gate_layer_l.weight"].std() == pytest.approx(0.02, rel=0.5)
    for name, tensor in vil.items():
        norm = name.endswith(("l.1.weight", "l.1.1.weight", "l.0.1.weight", "l.3.weight"))
        if norm:
            assert torch.equal(tensor, torch.ones(40)), name
        elif name.endswith("bias"):
            assert not tensor.any(), name


def test_start_of_the_others() -> None:
    torch.manual_seed(0)
    clip = ClipUniPT(80, 40, 60, 3).reference_parameters()
    sizes = {"downsample_layers.2.1": 80, "downsample_layer.1": 60, "upsample_layer.1": 40}
    for name, inputs in sizes.items():
        assert 0.8 * inputs**-0.5 < clip[f"{name}.weight"].abs().max() <= inputs**-0.5
    maps = MapUniPT([10, 30], 40, 60).reference_parameters()
    sizes = {"identity_layers.0.0": 30, "downsample_layers.0.0": 10, "projection_layer.0": 40}
    for name, inputs in sizes.items():
        assert 0.8 * inputs**-0.5 < maps[f"{name}.weight"].abs().max() <= inputs**-0.5
    assert torch.equal(maps["projection_layer.1.weight"], torch.ones(40))


@pytest.mark.parametrize(
    ("name", "variant", "first"),
    [
        ("unipt_bert", "bert", "downsample_layers.0.0.weight"),
        ("unipt_clipvil", "clipvil", "side_first_downsample_l.0.weight"),
        ("unipt_clip4clip_text", "clip4clip", "downsample_layers.0.1.weight"),
        ("unipt_resnet", "resnet", "downsample_layers.0.0.weight"),
    ],
)
def test_parameters_that_do_not_fit(name: str, variant: str, first: str) -> None:
    _, tensors = load(name)
    params = section(tensors, "param.")
    last = next(key for key in params if "gate_layer" in key)
    check_refusals(lambda found: from_reference(found, variant), params, first, last)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniPT.from_reference({}, "vgg"), "variant: .*'bert', 'clipvil', 'clip4clip', 're"),
        (lambda: UniPT(4, 2, 2, 4, "resnet"), "variant: .*found resnet"),
        (lambda: UniPT(4, 2, 1, 4), "UniPT needs two taps"),
        (lambda: ClipUniPT(4, 2, 4, 0), "UniPT needs one tap"),
        (lambda: MapUniPT([4], 2, 4), "UniPT needs two levels"),
        (lambda: MapUniPT([4, 4], 2, 4)([torch.zeros(1, 4, 2, 2)]), "levels: expected 2, found 1"),
    ],
)
def test_what_makes_no_module(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
