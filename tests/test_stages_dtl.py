"""DTL: parity with the paper's program, features known beforehand, live backbones, bad input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden_tools import GRADIENT, OUTPUT, check_module, difference, load, section
from sherl_pipe.cache import InputError
from sherl_pipe.stages.methods.dtl import CompactSide, DtlVit, from_reference
from sherl_pipe.stages.methods.vit import Vit
from sherl_pipe.stages.quantize import turn
from torch import Tensor, nn
from transformers import BertConfig, BertModel

CASES = [f"dtl_vit_beta{beta}_fusion{fusion}" for beta in (100, 1) for fusion in (3, 0)]


def published(name: str, **change: Any) -> DtlVit:
    meta, tensors = load(name)
    known = {
        "heads": meta["num_heads"],
        "lora_before": meta["lora_before_blocks"],
        "add_after": meta["add_after_blocks"],
        "beta": meta["beta"],
        "fusion": meta["fusion_size"],
    }
    return from_reference(section(tensors, "param."), **known | change)


@pytest.mark.parametrize("name", CASES)
def test_parity(name: str) -> None:
    module = published(name)
    assert (module.side.fusion is not None) == name.endswith("3")
    check_module(name, module, lambda m, inputs: m(inputs["image"]))


def test_no_parameter_tells_the_heads() -> None:
    """Two of the golden models differ in nothing else that is stored."""
    first, second = (load(f"dtl_vit_beta{beta}_fusion0") for beta in (100, 1))
    assert first[0]["num_heads"] != second[0]["num_heads"]
    shapes = [
        {name: tensor.shape for name, tensor in section(tensors, "param.").items()}
        for _, tensors in (first, second)
    ]
    assert shapes[0] == shapes[1]


def test_frozen_backbone_needs_no_gradient_below_the_first_add_back() -> None:
    name = "dtl_vit_beta1_fusion3"
    _, tensors = load(name)
    module = published(name).freeze()
    tuned = {key for key, p in module.named_parameters() if p.requires_grad}
    head = {"backbone.head.weight", "backbone.head.bias"}
    assert tuned == {"side.down", "side.up", "side.fusion.weight", *head}
    needs: list[bool] = []
    for block in module.backbone.blocks:
        block.register_forward_pre_hook(lambda _, args: needs.append(args[0].requires_grad))
    module(tensors["input.image"]).square().mean().backward()
    assert needs == [False] * 4 + [True] * 2
    mine = module.reference_parameters(gradients=True)
    for key, gradient in section(tensors, "grad.param.").items():
        if key.startswith(("lora_", "head")):
            assert difference(mine[key], gradient) < GRADIENT, key


def test_a_copy_runs_its_own_side_network() -> None:
    image = load("dtl_vit_beta1_fusion3")[1]["input.image"]
    module = published("dtl_vit_beta1_fusion3")
    out, other = module(image), copy.deepcopy(module)
    with torch.no_grad():
        other.side.up.zero_()
    plain = other(image)
    assert torch.equal(plain, other.backbone(image)) and not torch.allclose(plain, out)
    assert torch.equal(module(image), out)


def side(**change: Any) -> CompactSide:
    torch.manual_seed(0)
    module = CompactSide(12, 2, range(4), (2, 3), **change)
    nn.init.normal_(module.up)
    return module


@pytest.mark.parametrize("group", [0, 8])
def test_reports_that_are_known_beforehand(group: int) -> None:
    module = side()
    taps, blocks = torch.randn(3, 5, 12), (3, 0, 1)
    one_by_one = None
    for block, states in zip(blocks, turn(taps, group), strict=True):
        one_by_one = module.report(block, states, one_by_one)
    assert one_by_one is not None
    together = module.gather(taps, blocks, group)
    assert difference(together, one_by_one) < OUTPUT
    gradients = [
        torch.autograd.grad(out.square().sum(), (module.down, module.up))
        for out in (together, one_by_one)
    ]
    for found, expected in zip(*gradients, strict=True):
        assert difference(found, expected) < GRADIENT
    assert not gradients[0][0][2].any()  # block 2 was not asked


class Pair(nn.Module):
    """A block that hands on more than its states."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *, hidden_states: Tensor) -> tuple[Tensor, str]:
        return self.block(hidden_states), "more"


@pytest.mark.parametrize("tuples", [False, True])
def test_hooked_into_blocks(tuples: bool) -> None:
    module = side(beta=2.0)
    plain = [nn.Linear(12, 12) for _ in range(5)]
    blocks = nn.ModuleList([Pair(block) for block in plain] if tuples else plain)

    def run(states: Tensor) -> Tensor:
        for block in blocks:
            if tuples:
                states, more = block(hidden_states=states)
                assert more == "more"
            else:
                states = block(states)
        return states

    states = torch.randn(2, 3, 12)
    before = run(states)
    expected, total = states, torch.zeros(2, 3, 12)
    for place, block in enumerate(plain):
        if place < 4:
            total = total + expected @ module.down[place].t() @ module.up[place].t()
        expected = block(expected)
        if place in (2, 3):
            expected = expected + total * torch.sigmoid(2.0 * total)
    handles = module.attach(blocks)
    for _ in range(2):
        assert difference(run(states), expected) < OUTPUT
    for handle in handles:
        handle.remove()
    assert torch.equal(run(states), before)


def test_hooked_into_a_hugging_face_model() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=20, intermediate_size=16, **sizes)).eval()
    ids, mask = torch.arange(1, 7).view(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]])
    plain = model(ids, mask).last_hidden_state
    fresh = CompactSide(12, 2, range(4), (2, 3))
    handles = fresh.attach(model.encoder.layer)
    assert torch.equal(model(ids, mask).last_hidden_state, plain)  # B is zero
    for handle in handles:
        handle.remove()
    module = side()
    module.attach(model.requires_grad_(False).encoder.layer)
    out = model(ids, mask).last_hidden_state
    assert not torch.allclose(out, plain, atol=1e-3)
    out.square().mean().backward()
    assert module.down.grad is not None and module.down.grad.abs().amax((1, 2)).min() > 0


def test_fusion_leaves_the_tokens_in_front_alone() -> None:
    module = side(fusion=3, grid=(2, 3))
    assert module.fusion is not None
    with torch.no_grad():
        module.fusion.weight.zero_()
        module.fusion.weight[:, :, 1, 2] = 1  # takes what stands one column to the right
    gathered, states = torch.randn(2, 8, 12), torch.zeros(2, 8, 12)
    out = module.add(2, states, gathered)
    bent = gathered * torch.sigmoid(100 * gathered)
    moved = bent[:, 2:].unflatten(1, (2, 3))
    moved = torch.cat([moved[:, :, 1:], torch.zeros(2, 2, 1, 12)], 2).flatten(1, 2)
    assert difference(out, torch.cat([bent[:, :2], moved], 1)) < OUTPUT
    with pytest.raises(InputError, match="tokens: expected 2 x 3 at least, found 5"):
        module.add(2, states[:, :5], gathered[:, :5])


def test_start() -> None:
    torch.manual_seed(0)
    module = CompactSide(100, 4, range(3), (1, 2), fusion=5, grid=(1, 1))
    assert module.beta == 100 and not module.up.any()
    largest = module.down.abs().amax((1, 2))
    assert largest.min() > 0.095 and largest.max() <= 0.1
    assert module.fusion is not None and 0.18 < module.fusion.weight.abs().max() <= 0.2
    states = torch.randn(1, 1, 100)
    assert torch.equal(module.add(1, states, module.report(1, states)), states)
    head = Vit(published("dtl_vit_beta1_fusion0").backbone.sizes).head
    assert not head.bias.any()
    assert 0.01 < head.weight.std() < 0.03


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"extra": torch.zeros(1)}, r"found unknown \['extra'\]\.$"),
        (lambda p: {k: v for k, v in p.items() if k != "norm.bias"}, r"no \['norm.bias'\]\.$"),
        (lambda p: {k: v for k, v in p.items() if "blocks.5" not in k}, "blocks: expected 6 at"),
        (lambda p: {k: v for k, v in p.items() if "fusion" not in k}, r"no \['lora_fusion.weight'"),
        (lambda p: {}, r"expected patch_embed.proj.weight, found \[\]"),
        (lambda p: p | {"pos_embed": torch.zeros(1, 190, 10)}, "shape of pos_embed: expected"),
    ],
)
def test_parameters_that_do_not_fit(change: Change, message: str) -> None:
    meta, tensors = load("dtl_vit_beta1_fusion3")
    with pytest.raises(InputError, match=message):
        from_reference(
            change(section(tensors, "param.")),
            heads=meta["num_heads"],
            lora_before=range(6),
            add_after=(3, 4, 5),
            beta=1.0,
            fusion=3,
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fusion": 0}, r"unknown \['lora_fusion.weight'\]"),
        ({"fusion": 2}, "fusion: expected 0 or an odd number, found 2"),
        ({"lora_before": [0, 1]}, r"unknown \['lora_dict.2.lora_A'"),
        ({"lora_before": []}, r"needs a block and a rank, found \[\] and 2"),
        ({"add_after": []}, r"blocks to add after: expected some from 0 on.* found \[\]"),
        ({"add_after": [6]}, "blocks: expected 7 at least, found 6"),
        ({"beta": 0.0}, "beta: expected a number above 0, found 0.0"),
        ({"heads": 3}, "heads: expected a divisor of 10, found 3"),
        ({"heads": None}, "heads: expected the number of .* found None. No parameter tells it"),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        published("dtl_vit_beta1_fusion3", **change)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: side(fusion=3), "a fusion needs the grid"),
        (lambda: CompactSide(4, 0, [0], [0]), "needs a block and a rank"),
        (lambda: CompactSide(4, 1, [2], [1, 2]), "blocks to add after: expected some from 2 on"),
        (lambda: side().gather(torch.zeros(1, 2, 12), [4]), r"blocks: .*, found \[4\]"),
        (
            lambda: published("dtl_vit_beta1_fusion3")(torch.zeros(1, 3, 32, 32)),
            r"image: expected \[3, 28, 28\], found \[3, 32, 32\]",
        ),
    ],
)
def test_what_makes_no_side_network(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        act()
