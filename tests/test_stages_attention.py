"""Cross-attention of few queries, and T5's norm, give what the model's own give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sherl_pipe.stages.attention import FewQueries
from sherl_pipe.stages.norm import RootMeanSquare, by_hand
from torch import Tensor
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerNorm


def attention() -> Any:
    torch.manual_seed(0)
    config = T5Config(
        d_model=24, d_kv=8, num_heads=4, dropout_rate=0.0, is_decoder=True, d_ff=8, num_layers=1
    )
    config._attn_implementation = "eager"
    return T5Attention(config, layer_idx=0).eval().requires_grad_(False)


def masks(size: int, length: int) -> dict[str, Tensor | None]:
    lengths = torch.randint(1, length + 1, (size,))
    there = (torch.arange(length) < lengths[:, None])[:, None, None]
    lowest = torch.finfo(torch.float32).min
    return {"none": None, "bool": there, "added": torch.where(there, 0.0, lowest)}


@pytest.mark.parametrize("kind", ["none", "bool", "added"])
@pytest.mark.parametrize(("positions", "length"), [(1, 9), (2, 17), (5, 40)])
def test_values_and_gradients(kind: str, positions: int, length: int) -> None:
    own = attention()
    few = FewQueries(own)
    queries, memory = torch.randn(3, positions, 24), torch.randn(3, length, 24)
    mask = masks(3, length)[kind]
    # The eager attention of the model itself adds its mask.
    theirs = mask
    if mask is not None and kind == "bool":
        theirs = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert few._pays(queries, memory)
    found = []
    for module, given in ((own, theirs), (few, mask)):
        inputs = [each.clone().requires_grad_() for each in (queries, memory)]
        out, _, _ = module(inputs[0], mask=given, key_value_states=inputs[1])
        out.square().sum().backward()
        found.append([out, *(each.grad for each in inputs)])
    for mine, expected in zip(found[1], found[0], strict=True):
        assert (mine - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_models_own_runs_where_it_is_cheaper() -> None:
    own = attention()
    few = FewQueries(own)
    queries, memory = torch.randn(2, 12, 24), torch.randn(2, 6, 24)
    expected = own(queries, key_value_states=memory)[0]
    assert not few._pays(queries, memory)
    assert torch.equal(few(queries, key_value_states=memory)[0], expected)


@pytest.mark.parametrize("shape", [(7, 24), (3, 5, 24)])
@pytest.mark.parametrize("trained", [True, False])
def test_norm(shape: tuple[int, ...], trained: bool) -> None:
    """T5's norm by hand, also of a vector of zeros."""
    torch.manual_seed(0)
    own = T5LayerNorm(24).requires_grad_(trained)
    own.weight.data.normal_()
    values = torch.randn(shape)
    values[0] = 0
    wanted = torch.randn(shape)
    found = []
    for module in (own, by_hand(own)):
        states = values.clone().requires_grad_()
        out = module(states)
        (out * wanted).sum().backward()
        found.append([out, states.grad, own.weight.grad] if trained else [out, states.grad])
        own.weight.grad = None
    for mine, expected in zip(found[1], found[0], strict=True):
        assert (mine - expected).abs().max() < 1e-5 * expected.abs().max()
    half = values.bfloat16()
    assert torch.equal(by_hand(own)(half), own(half))
    other = torch.nn.LayerNorm(24)
    assert by_hand(other) is other


def test_gradient_of_the_norm() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 6), 6)]
    assert torch.autograd.gradcheck(lambda x, w: RootMeanSquare.apply(x, w, 1e-6), inputs)
