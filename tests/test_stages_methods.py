"""Every method from the command line, and one that is registered from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from cli_tools import done, refused
from model_tools import save_model, write_data
from sherl_pipe.stages.adapter_files import read_adapter
from sherl_pipe.stages.backbone import Backbone
from sherl_pipe.stages.features import Packed
from sherl_pipe.stages.methods import METHODS
from sherl_pipe.stages.methods.base import Method
from sherl_pipe.stages.methods.live import live_encoder
from sherl_pipe.stages.methods.route import Route, RouteSpec
from sherl_pipe.stages.words import PrefixTree
from torch import Tensor, nn

# What differs from a method's own settings.
CHANGES: dict[str, dict[str, Any]] = {
    "lst": {"reduction": 3},
    "dtl": {"reduction": 12},
    "unipt": {"reduction": 3},
    "weighted": {},
    "linear": {},
}
TEN = ("--reduction", 10)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_from_the_command_line(tmp_path: Path, family: str) -> None:
    model, data = save_model(tmp_path / "model", family), write_data(tmp_path / "data")
    source, cache = ("--model", model, "--data", data), tmp_path / "cache"
    done("extract", *source, "--cache", cache)
    for method, change in CHANGES.items():
        out = tmp_path / "runs" / method
        tune = ("tune", "--cache", cache, "--method", method, "--out", out, "--epochs", 1)
        sized = ("--reduction", change["reduction"]) if change else ()
        results = done(*tune, *sized, "--json").json
        assert [result["method"] for result in results] == [method]
        (folder,) = (out / "colour").iterdir()
        assert folder.name.startswith(f"{method}-r{change.get('reduction', 1)}-late")
        assert read_adapter(folder)[0].route.method == method
        answers = done("predict", "--adapter", folder, "--text", "the red cat", "--json").json
        assert answers["label"] in ("0", "1")
        if change:
            # The usual width is smaller.
            usual = done(*tune, "--json").json[0]
            assert 0 < usual["trainable"] < results[0]["trainable"]
        plan = ("plan", *source, "--cache", tmp_path / "new", "--method", method, *sized)
        assert done(*plan, "--json").json
        late = {"lst": 1, "unipt": 1, "dtl": 0}.get(method, 9)
        refused(3, "late: expected", f"found {late}", argv=(*tune, "--late", late))
        refused(3, "init: expected one of", "residual", argv=(*tune, "--init", "residual"))
    tune = ("tune", "--cache", cache, "--out", tmp_path / "other", "--epochs", 1)
    refused(3, "reduction: expected 1 to", "found 10", argv=(*tune, "--method", "lst", *TEN))
    for method in ("linear", "weighted"):
        refused(3, f"expected 1 ({method} reduces nothing)", argv=(*tune, "--method", method, *TEN))
    words = f"method: expected dtl for a backbone of texts (dtl+ has a convolution over patches), \
found dtl+ on {family}"
    refused(3, words, argv=(*tune, "--method", "dtl+"))
    assert not (tmp_path / "other").exists()
    every = "'dtl', 'dtl+', 'linear', 'lst', 'sherl', 'unipt', 'weighted'"
    refused(3, f"method: expected one of [{every}], found lora", argv=(*tune, "--method", "lora"))


class Largest(Route):
    """The largest value of every feature among an example's tokens, and a head."""

    def __init__(self, backbone: Backbone, spec: RouteSpec) -> None:
        super().__init__()
        self.spec, self.late = spec, None
        self.head = nn.Linear(backbone.width, spec.outputs)

    def reads(self) -> dict[str, tuple[int, ...]]:
        return {"hidden": self.spec.taps["hidden"]}

    def fuse(self, streams: Mapping[str, Packed], tree: PrefixTree | None = None) -> tuple[Tensor]:
        packed = streams["hidden"]
        states = packed.pad(packed.tap(0)).masked_fill(~packed.mask().unsqueeze(-1), -torch.inf)
        return (states.amax(1),)

    @staticmethod
    def hidden(
        routes: Sequence[Any],
        fused: Sequence[tuple[Tensor, ...]],
        batches: Sequence[Mapping[str, Packed]],
        tree: PrefixTree | None = None,
    ) -> list[Tensor]:
        return [states for (states,) in fused]

    def logits(self, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
        found: Tensor = self.head(hidden)
        return found

    def attach(self, backbone: Backbone) -> nn.Module:
        def largest(taps: Tensor, mask: Tensor) -> Tensor:
            states = taps[0].masked_fill(~mask.unsqueeze(-1), -torch.inf)
            return states.amax(1, keepdim=True).expand_as(states)

        return live_encoder(backbone, self.spec.taps["hidden"], largest)


class FromOutside(Method):
    """All that another method takes: this class, and its entry in METHODS."""

    usual: ClassVar[Mapping[str, Any]] = {"reduction": 1, "late": 0, "init": "random"}
    inits = ("random",)

    @staticmethod
    def late_blocks(late: int) -> dict[str, int]:
        return {}

    @staticmethod
    def choose_taps(
        backbone: Backbone, late: int, cached: Mapping[str, tuple[int, ...]]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
        return {"hidden": cached["hidden"][-1:]}, {}

    @staticmethod
    def build(backbone: Backbone, spec: RouteSpec) -> Largest:
        return Largest(backbone, spec).to(backbone.device)


def test_a_method_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one entry: tuned, shared, saved, and predicting what it learned."""
    monkeypatch.setitem(METHODS, "largest", FromOutside)
    model, data = save_model(tmp_path / "model", "bert"), write_data(tmp_path / "data")
    done("extract", "--model", model, "--data", data, "--cache", tmp_path / "cache")
    tune = ("tune", "--cache", tmp_path / "cache", "--out", tmp_path / "runs", "--seed", 0)
    found = done(*tune, "--method", "largest", "--seed", 1, "--lr", "0.1", "--json").json
    assert [result["method"] for result in found] == ["largest"] * 2
    folders = sorted((tmp_path / "runs" / "colour").iterdir())
    assert [folder.name[-5:] for folder in folders] == ["seed0", "seed1"]
    file = data / "colour" / "validation.jsonl"
    answers = done("predict", "--adapter", folders[0], "--file", file, "--json").out.splitlines()
    labels = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    right = [
        json.loads(line)["label"] == str(label) for line, label in zip(answers, labels, strict=True)
    ]
    assert 100 * sum(right) / len(right) == pytest.approx(found[0]["score"], abs=0.01)
