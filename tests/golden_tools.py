"""The papers' own figures (tests/golden), and how they are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from sherl_pipe.cache import InputError
from sherl_pipe.stages.methods.published import Published
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

GOLDEN = Path(__file__).parent / "golden"
OUTPUT, LOGITS, GRADIENT = 1e-5, 2e-5, 2e-4


def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one golden file."""
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
    return meta, load_file(path)


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def difference(found: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|, SPEC section 0."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def check_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], zero: list[str]) -> None:
    """Compare gradients per tensor; those that are zero on paper only have to be tiny."""
    assert expected
    for name, gradient in expected.items():
        if any(name in entry for entry in zero):
            assert found[name].abs().max() < 1e-6, name
        else:
            assert difference(found[name], gradient) < GRADIENT, name


def listed(inputs: dict[str, Tensor]) -> list[Tensor]:
    """The feature maps among a golden's inputs, in order."""
    return [inputs[f"features.{k}"] for k in range(len(section(inputs, "features.")))]


def check_module(
    name: str, module: Published, run: Callable[[Any, dict[str, Tensor]], Tensor]
) -> None:
    """Compare a module, already holding a golden's parameters, with the golden.

    Args:
        run: the module's output for the golden's inputs, which require gradients.
    """
    meta, tensors = load(name)
    module.eval()
    wanted = section(tensors, "grad.input.")
    inputs = section(tensors, "input.")
    for key in wanted:
        inputs[key].requires_grad_()
    out = run(module, inputs)
    assert difference(out, tensors["output.out"]) < OUTPUT
    loss = out.square().mean()
    assert difference(loss, tensors["output.loss"]) < OUTPUT
    loss.backward()
    found = {key: gradient for key in wanted if (gradient := inputs[key].grad) is not None}
    check_gradients(found, wanted, [])
    zero = meta.get("analytically_zero_grads", [])
    mine = module.reference_parameters(gradients=True)
    check_gradients(mine, section(tensors, "grad.param."), zero)
    assert mine.keys() - section(tensors, "grad.param.").keys() == set(meta["params_without_grad"])


def backbone(file: str) -> T5ForConditionalGeneration:
    """A golden backbone in Hugging Face's T5."""
    meta, tensors = load(file.removesuffix(".safetensors"))
    model = T5ForConditionalGeneration(T5Config(**meta["config"]))
    if "lm_head.weight" in tensors:
        # transformers 5 ties the head whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(tensors["lm_head.weight"]))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and all("embed_tokens" in name or "lm_head" in name for name in missing)
    return model.eval()


def check_generation(
    model: Any, meta: dict[str, Any], tensors: dict[str, Tensor], use_cache: bool
) -> None:
    """Greedy ids are those of the papers' programs, and so are the logits behind them."""
    inputs = section(tensors, "input.")
    ids = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_length=meta["generation"]["max_length"],
        num_beams=1,
        do_sample=False,
        use_cache=use_cache,
    )
    assert torch.equal(ids, tensors["output.generated_ids"])
    out = model(inputs["input_ids"], inputs["attention_mask"], decoder_input_ids=ids[:, :-1])
    assert difference(out.logits, tensors["output.generated_logits"]) < LOGITS


def check_refusals(
    read: Callable[[dict[str, Tensor]], Any], params: Mapping[str, Tensor], first: str, last: str
) -> None:
    """Published parameters that do not fit are refused, each naming what is wrong.

    Args:
        read: makes a module of them.
        params: all of them, as they should be.
        first: the one that sizes are read from.
        last: another.
    """
    whole = dict(params)
    bad = [
        (whole | {"extra": torch.zeros(1)}, r"found unknown \['extra'\]\.$"),
        ({k: v for k, v in whole.items() if k != last}, rf"found no \['{last}'\]\.$"),
        ({k: v for k, v in whole.items() if k != first}, f"expected {first}, found "),
        (whole | {first: torch.zeros(3)}, rf"axes of {first}: expected [24], found \[3\]"),
        (whole | {last: torch.zeros(1, 1, 7)}, f"shape of {last}: expected .* found "),
        ({}, r"parameters: expected .*, found \[\]"),
    ]
    for changed, message in bad:
        with pytest.raises(InputError, match=message):
            read(changed)
