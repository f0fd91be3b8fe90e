"""Parity with the papers' own programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from golden_tools import (
    LOGITS,
    OUTPUT,
    backbone,
    check_generation,
    check_gradients,
    difference,
    load,
    section,
)
from sherl_pipe.cache import InputError
from sherl_pipe.stages.adapter import TunedModel, load_reference
from sherl_pipe.stages.methods.consolidation import Consolidation
from torch import Tensor

MODULES = [
    ("sherl_t5_mtsa", "t5"),
    ("sherl_t5_mtsa_eps", "t5"),
    ("sherl_t5_mtsa_minlayers", "t5"),
    ("sherl_clipvil", "clipvil"),
    ("sherl_bert", "bert"),
    ("sherl_bert_eps", "bert"),
    ("sherl_mdetr", "mdetr"),
]


@pytest.mark.parametrize(("name", "variant"), MODULES)
@pytest.mark.parametrize("packed", [False, True])
def test_consolidation(name: str, variant: str, packed: bool) -> None:
    meta, tensors = load(name)
    module = Consolidation.from_reference(section(tensors, "param."), variant).eval()
    inputs = section(tensors, "input.")
    features = [inputs[f"features.{k}"].requires_grad_() for k in range(meta["num_layer"])]
    last = inputs["last_feature"].requires_grad_()
    if packed:
        flat = torch.stack([feature.flatten(0, 1) for feature in features])
        out = module(flat, last.flatten(0, 1)).view_as(last)
    else:
        out = module(features, last)
    assert difference(out, tensors["output.out"]) < OUTPUT
    out.square().mean().backward()
    zero = meta.get("analytically_zero_grads", [])
    found = {f"features.{k}": f.grad for k, f in enumerate(features)} | {"last_feature": last.grad}
    check_gradients(found, section(tensors, "grad.input."), zero)
    mine = module.reference_parameters(gradients=True)
    check_gradients(mine, section(tensors, "grad.param."), zero)


T5_CASES = ["t5_sherl_main", "t5_sherl_sparse", "t5_sherl_gated_untied"]


def _live(name: str) -> tuple[TunedModel, dict[str, Any], dict[str, Tensor]]:
    meta, tensors = load(name)
    model = load_reference(
        backbone(meta["backbone_file"]),
        section(tensors, "param."),
        method="sherl",
        encoder_side_layers=meta["encoder_side_layers"],
        decoder_side_layers=meta["decoder_side_layers"],
        reduction=meta["task_reduction_factor"],
    )
    return model, meta, tensors


@pytest.mark.parametrize("name", T5_CASES)
def test_t5_forward_and_gradients(name: str) -> None:
    model, meta, tensors = _live(name)
    inputs = section(tensors, "input.")
    out = model(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    assert difference(out.logits, tensors["output.logits"]) < LOGITS
    assert difference(out.loss, tensors["output.loss"]) < OUTPUT
    expected = tensors["output.encoder_last_hidden_state"]
    assert difference(out.encoder_last_hidden_state, expected) < OUTPUT
    out.loss.backward()
    route = model.route
    mine: dict[str, Tensor] = {}
    for stream, module in (("encoder", route.encoder), ("decoder", route.decoder)):
        for key, gradient in module.reference_parameters(gradients=True).items():
            mine[f"{stream}.side_mtsa_block.{key}"] = gradient
    mine["encoder.final_side_layer_norm.weight"] = route.encoder_norm.weight.grad
    mine["decoder.final_side_layer_norm.weight"] = route.decoder_norm.weight.grad
    check_gradients(mine, section(tensors, "grad.param."), meta.get("analytically_zero_grads", []))


@pytest.mark.parametrize("name", T5_CASES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_t5_generation(name: str, use_cache: bool) -> None:
    check_generation(*_live(name), use_cache)


def test_two_adapters_share_one_backbone() -> None:
    meta, tensors = load("t5_sherl_main")
    shared = backbone(meta["backbone_file"])
    inputs = section(tensors, "input.")
    start = inputs["decoder_input_ids"]
    before = shared(input_ids=inputs["input_ids"], decoder_input_ids=start).logits
    first, _, _ = _live("t5_sherl_main")
    for _ in range(2):
        model = load_reference(
            shared,
            section(tensors, "param."),
            method="sherl",
            encoder_side_layers=meta["encoder_side_layers"],
            decoder_side_layers=meta["decoder_side_layers"],
            reduction=meta["task_reduction_factor"],
        )
        out = model(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        assert difference(out.logits, tensors["output.logits"]) < LOGITS
    after = shared(input_ids=inputs["input_ids"], decoder_input_ids=start).logits
    # Not bit for bit: frozen weights take another matmul path than trainable ones.
    assert difference(after, before) < OUTPUT
    assert first.route is not model.route


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"decoder.extra": torch.zeros(1)}, r"found \['decoder.extra'\]"),
        (lambda p: {k: v for k, v in p.items() if "gate_params" not in k}, "gate_params"),
        (lambda p: {k: v for k, v in p.items() if "final_side" not in k}, "parameters: .*weight"),
        (lambda p: p | {"encoder.final_side_layer_norm.weight": torch.zeros(3)}, "parameters: "),
    ],
)
def test_parameters_that_do_not_fit(change: Any, message: str) -> None:
    meta, tensors = load("t5_sherl_main")
    with pytest.raises(InputError, match=message):
        load_reference(
            backbone(meta["backbone_file"]),
            change(section(tensors, "param.")),
            method="sherl",
            encoder_side_layers=meta["encoder_side_layers"],
            decoder_side_layers=meta["decoder_side_layers"],
            reduction=meta["task_reduction_factor"],
        )
