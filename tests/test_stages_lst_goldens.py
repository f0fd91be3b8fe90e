"""LST's parity with the paper's own program."""

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
from sherl_pipe.stages.methods.ladder import t5_ladder
from sherl_pipe.stages.surgery import TapRecorder
from torch import Tensor
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

CASES = ["t5_lst_main", "t5_lst_gated_untied"]


def _live(name: str, **change: Any) -> tuple[TunedModel, dict[str, Any], dict[str, Tensor]]:
    meta, tensors = load(name)
    arguments = {
        "params": section(tensors, "param."),
        "method": "lst",
        "encoder_side_layers": meta["encoder_side_layers"],
        "decoder_side_layers": meta["decoder_side_layers"],
        "reduction": meta["task_reduction_factor"],
    }
    model = load_reference(backbone(meta["backbone_file"]), **arguments | change)
    return model, meta, tensors


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str) -> None:
    model, meta, tensors = _live(name)
    inputs = section(tensors, "input.")
    out = model(inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
    assert difference(out.logits, tensors["output.logits"]) < LOGITS
    assert difference(out.loss, tensors["output.loss"]) < OUTPUT
    memory = tensors["output.encoder_last_hidden_state"]
    assert difference(out.encoder_last_hidden_state, memory) < OUTPUT
    out.loss.backward()
    route: Any = model.route
    expected = section(tensors, "grad.param.")
    mine = route.reference_parameters(gradients=True)
    assert mine.keys() == expected.keys()
    check_gradients(mine, expected, meta.get("analytically_zero_grads", []))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation(name: str, use_cache: bool) -> None:
    check_generation(*_live(name), use_cache)


@pytest.mark.parametrize("name", CASES)
def test_beams_take_the_side_cache_with_them(name: str) -> None:
    """Beams change places from step to step; without a cache there is nothing to change."""
    model, _, tensors = _live(name)
    inputs = section(tensors, "input.")
    found = [
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_length=12,
            num_beams=4,
            num_return_sequences=4,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0].tolist()}) > 4


@pytest.mark.parametrize("name", ["lst_t5_stack_encoder", "lst_t5_stack_decoder"])
def test_one_stack(name: str) -> None:
    """A ladder beside a stack of its own, with gradients of the frozen weights too."""
    meta, tensors = load(name)
    inputs, params = section(tensors, "input."), section(tensors, "param.")
    keys = "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "layer_norm_epsilon", "is_decoder"
    config = T5Config(**{key: meta[key] for key in keys}, use_cache=False)
    stack: Any = T5Stack(config).eval()
    frozen = {k: v for k, v in params.items() if k.startswith(("block.", "final_layer_norm."))}
    missing, unexpected = stack.load_state_dict(frozen, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected
    layers = meta["side_layers"]
    ladder = t5_ladder(stack, layers, meta["task_reduction_factor"]).eval()
    mine = ladder.reference_parameters()
    unused = {f"side_gate_params.{layer}" for layer in range(len(stack.block))} - {*mine}
    assert frozen.keys() | mine.keys() | unused == params.keys()
    ladder.load_published({key: params[key] for key in mine})
    taps = [0, *(layer + 1 for layer in layers)]
    recorder = TapRecorder(stack.block, taps)
    embeds = inputs["inputs_embeds"].requires_grad_()
    masks: dict[str, Any] = {"attention_mask": inputs["mask"]}
    if meta["is_decoder"]:
        masks = {"attention_mask": None, "encoder_attention_mask": inputs["mask"]}
    memories: list[dict[str, Tensor]] = [{}, {}]
    if meta["is_decoder"]:
        for prefix, memory in zip(("", "side_"), memories, strict=True):
            values = inputs[f"{prefix}encoder_hidden_states"].requires_grad_()
            memory["encoder_hidden_states"] = values
    last = stack(inputs_embeds=embeds, **masks, **memories[0]).last_hidden_state
    assert difference(last, tensors["output.backbone_last_hidden_state"]) < OUTPUT
    reduced = ladder.reduce_live(recorder.stacked(taps))
    out = ladder(reduced, **masks, **memories[1])
    assert difference(out, tensors["output.out"]) < OUTPUT
    loss = out.square().mean()
    assert difference(loss, tensors["output.loss"]) < OUTPUT
    loss.backward()
    expected = section(tensors, "grad.param.")
    found = ladder.reference_parameters(gradients=True)
    found |= {key: p.grad for key, p in stack.named_parameters() if p.grad is not None}
    assert expected.keys() == found.keys()
    check_gradients(found, expected, meta.get("analytically_zero_grads", []))
    given = {"inputs_embeds": embeds.grad}
    for prefix, memory in zip(("", "side_"), memories, strict=True):
        for key, values in memory.items():
            given[prefix + key] = values.grad
    check_gradients(given, section(tensors, "grad.input."), [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"decoder.extra": torch.zeros(1)}, r"found unknown \['decoder.extra'\]"),
        (
            lambda p: {k: v for k, v in p.items() if k != "encoder.side_gate_params.2"},
            r"found no \['encoder.side_gate_params.2'\]",
        ),
        (lambda p: p | {"side_final_upsample.bias": torch.zeros(1)}, "shape of side_final.*32.*1"),
    ],
)
def test_parameters_that_do_not_fit(change: Any, message: str) -> None:
    _, tensors = load("t5_lst_main")
    with pytest.raises(InputError, match=message):
        _live("t5_lst_main", params=change(section(tensors, "param.")))


def test_another_depth_or_width_does_not_fit() -> None:
    with pytest.raises(InputError, match="parameters: expected the published names"):
        _live("t5_lst_main", encoder_side_layers=[1, 2, 3])
    with pytest.raises(InputError, match="parameters: shape of"):
        _live("t5_lst_main", reduction=2)
    with pytest.raises(InputError, match="reduction: expected 1 to 8, found 9"):
        _live("t5_lst_main", reduction=9)
