"""Consolidations beside the token-wise ones: parity with the papers' programs, start, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_tools import GRADIENT, check_module, check_refusals, difference, listed, load, section
from sherl_pipe.cache import InputError
from sherl_pipe.stages.methods.consolidation import Consolidation
from sherl_pipe.stages.methods.consolidation_clip import ClipConsolidation
from sherl_pipe.stages.methods.consolidation_maps import MapConsolidation
from sherl_pipe.stages.methods.guided import gated_tail, guided_consolidation
from torch import Tensor

CLIP = [
    f"sherl_clip4clip_{data}_{mask}_{position}"
    for data in ("msrvtt", "msvd")
    for mask in ("mask", "nomask")
    for position in ("pos", "nopos")
]


@pytest.mark.parametrize("name", CLIP)
@pytest.mark.parametrize("stacked", [False, True])
def test_clip4clip(name: str, stacked: bool) -> None:
    meta, tensors = load(name)
    module = Consolidation.from_reference(section(tensors, "param."), "clip4clip")
    assert (module.token_gate is not None) == (meta["datatype"] == "msrvtt")

    def run(module: ClipConsolidation, inputs: dict[str, Tensor]) -> Tensor:
        taps = torch.stack(listed(inputs)) if stacked else listed(inputs)
        mask, position = inputs.get("mask"), inputs.get("position")
        return module(taps, inputs["last_feature"], mask=mask, position=position)

    check_module(name, module, run)


def test_resnet() -> None:
    _, tensors = load("sherl_resnet")
    module = Consolidation.from_reference(section(tensors, "param."), "resnet")
    check_module("sherl_resnet", module, lambda m, x: m(listed(x), x["last_feature"]))


def test_maps_of_one_image_have_the_gradient_of_two() -> None:
    """Batch norms of torch have given wrong gradients for a batch of one map."""
    _, tensors = load("sherl_resnet")
    module = Consolidation.from_reference(section(tensors, "param."), "resnet").eval()
    inputs = section(tensors, "input.")
    maps, last = listed(inputs), inputs["last_feature"]
    together = [each.clone().requires_grad_() for each in maps]
    module(together, last)[:1].square().sum().backward()
    alone = [each[:1].clone().requires_grad_() for each in maps]
    module(alone, last[:1]).square().sum().backward()
    for one, two in zip(alone, together, strict=True):
        assert one.grad is not None and two.grad is not None
        assert difference(one.grad, two.grad[:1]) < GRADIENT


def test_guide_that_is_not_added() -> None:
    torch.manual_seed(0)
    shallow, guide = torch.randn(3, 4, 5), torch.randn(4, 5)
    weight, bias = torch.randn(5), torch.randn([])
    inputs = [each.double().requires_grad_() for each in (shallow, guide, weight, bias)]

    def alone(*values: Tensor) -> Tensor:
        return guided_consolidation(*values, 1e-6, added=False)

    assert torch.autograd.gradcheck(alone, inputs)
    both = guided_consolidation(*inputs, 1e-6)
    assert torch.allclose(both - inputs[1], alone(*inputs))


def test_start_of_mdetr_is_xavier() -> None:
    torch.manual_seed(0)
    module = Consolidation(60, 30, 5, "mdetr")
    named = module.reference_parameters()
    shapes = {"hor_block.0.fc": (30, 60), "fc_out": (60, 30), "guide_block.fc_attn": (1, 30)}
    for name, (outputs, inputs) in shapes.items():
        bound = (6 / (inputs + outputs)) ** 0.5
        largest = named[f"{name}.weight"].abs().max()
        assert 0.85 * bound < largest <= bound, name
    bound = (6 / 90) ** 0.5
    assert 0.98 * bound < named["guide_block.mlp.0.weight"].abs().max() <= bound
    assert 0.8 * 60**-0.5 < named["hor_block.3.fc.bias"].abs().max() <= 60**-0.5
    assert torch.equal(named["hor_block.2.norm.weight"], torch.ones(30))
    assert torch.equal(named["norm_out.weight"], torch.ones(60))
    assert named["gate_params"].item() == 0
    assert torch.equal(
        Consolidation(60, 30, 5, "mdetr", "residual").tail_norm.weight, 0 * named["norm_out.weight"]
    )


def test_start_of_clip4clip() -> None:
    torch.manual_seed(0)
    module = ClipConsolidation(40, 20, 30, 3, gated=True)
    named = module.reference_parameters()
    assert torch.equal(named["guide_block.gate_parameters"], torch.ones(3))
    for name, inputs in {"hor_block.2.fc": 40, "hor_block_last.fc": 30, "fc_out": 20}.items():
        for kind in ("weight", "bias"):
            assert 0.75 * inputs**-0.5 < named[f"{name}.{kind}"].abs().max() <= inputs**-0.5
    assert named["guide_block.spatial_attn.1.weight"].abs().max() <= 20**-0.5
    assert ClipConsolidation(40, 20, 30, 3, gated=False).token_gate is None


def test_start_of_maps() -> None:
    torch.manual_seed(0)
    module = MapConsolidation([8, 40], 20)
    named = module.reference_parameters()
    for name, inputs in {
        "hor_block.0.conv.0": 8,
        "hor_block.1.conv.0": 40,
        "conv_out.0": 20,
    }.items():
        assert 0.75 * inputs**-0.5 < named[f"{name}.weight"].abs().max() <= inputs**-0.5
        assert named[f"{name}.bias"].abs().max() <= inputs**-0.5
    assert torch.equal(named["conv_out.1.weight"], torch.ones(40))
    last = torch.randn(2, 40, 3, 3)
    # The gate is closed: nothing of the last feature gets past the rectified tail.
    out = module([torch.randn(2, 8, 6, 6), last], last)
    assert named["gate_params"].item() == 0 and out.shape == last.shape and out.min() >= 0


@pytest.mark.parametrize(
    ("name", "variant", "first"),
    [
        ("sherl_mdetr", "mdetr", "hor_block.0.fc.weight"),
        ("sherl_resnet", "resnet", "hor_block.0.conv.0.weight"),
        ("sherl_clip4clip_msvd_mask_pos", "clip4clip", "hor_block.0.fc.weight"),
        ("sherl_t5_mtsa", "t5", "hor_block.0.fc1.weight"),
    ],
)
def test_parameters_that_do_not_fit(name: str, variant: str, first: str) -> None:
    _, tensors = load(name)
    params = section(tensors, "param.")
    last = sorted(params)[-1]
    check_refusals(lambda found: Consolidation.from_reference(found, variant), params, first, last)


def test_variants_that_do_not_exist() -> None:
    with pytest.raises(InputError, match="variant: expected one of .*'mdetr', 'clip4clip', 'resn"):
        Consolidation.from_reference({}, "vgg")
    with pytest.raises(InputError, match=r"variant: expected one of \['t5', .*found resnet"):
        Consolidation(8, 4, 2, "resnet")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([(6, 4), (3, 3)], "expected a whole multiple of 3 x 3, found 6 x 4"),
        ([(2, 2), (3, 3)], "expected a whole multiple of 3 x 3, found 2 x 2"),
        ([(3, 3)], "levels: expected 2, found 1"),
    ],
)
def test_maps_that_do_not_fit(sizes: list[tuple[int, int]], message: str) -> None:
    module = MapConsolidation([4, 6], 3)
    maps = [torch.zeros(1, c, *size) for c, size in zip((4, 6), sizes, strict=False)]
    with pytest.raises(InputError, match=message):
        module(maps, torch.zeros(1, 6, 3, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MapConsolidation([4], 3),
        lambda: MapConsolidation([4, 4], 0),
        lambda: ClipConsolidation(4, 0, 4, 2, gated=True),
        lambda: ClipConsolidation(4, 2, 4, 0, gated=True),
    ],
)
def test_sizes_that_make_no_consolidation(make: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match="consolidation needs"):
        make()


def test_guide_that_is_the_last_tap() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in ((4, 3, 5), 5, ())]
    inputs = [each.requires_grad_() for each in inputs]

    def whole(reduced: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return guided_consolidation(reduced, None, weight, bias, 1e-6)

    assert torch.autograd.gradcheck(whole, inputs)
    reduced, weight, bias = inputs
    apart = guided_consolidation(reduced[:-1], reduced[-1], weight, bias, 1e-6)
    assert torch.equal(whole(*inputs), apart)


def test_gradient_of_the_gated_tail() -> None:
    torch.manual_seed(0)
    shapes = ((3, 5), (7, 5), (7,), (1,), (3, 7))
    inputs = [torch.randn(shape, dtype=torch.float64) / 4 for shape in shapes]
    assert torch.autograd.gradcheck(gated_tail, [each.requires_grad_() for each in inputs])
    fused, weight, bias, gate, last = inputs
    expected = fused.relu() @ weight.T + bias + torch.tanh(gate / 0.1) * last
    assert torch.allclose(gated_tail(*inputs), expected)
    half = gated_tail(*(each.float() for each in inputs[:4]), last.bfloat16())
    assert half.dtype == torch.float32 and torch.allclose(half.double(), expected, atol=0.02)
