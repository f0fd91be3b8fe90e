"""A backbone of which only the part that a route runs is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_tools import FAMILIES, save_model, write_data
from safetensors.torch import load_file, save_file
from sherl_pipe.cache import InputError, StaleCacheError
from sherl_pipe.pipeline.config import RunConfig, make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages import weights
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.methods import METHODS
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tune import Tuner
from torch import Tensor, nn
from transformers import BertModel, T5Config, T5ForConditionalGeneration
from tune_tools import run

QUIET = Bars(None)
LATE = METHODS["sherl"].late_blocks(1)
Weights = dict[str, Tensor]


def loaded(backbone: Backbone) -> set[str]:
    return {name for name, weight in backbone.model.named_parameters() if not weight.is_meta}


def assert_same(folder: str, *, whole: bool = False) -> Backbone:
    """The part has everything that describes the whole; whether it is one is checked too."""
    part, full = load_part(folder, LATE), load_backbone(folder)
    assert part.whole is whole and full.whole
    for field in ("fingerprint", "config_hash", "parameters", "dtype", "device", "width", "family"):
        assert getattr(part, field) == getattr(full, field), field
    kept = dict(full.model.named_parameters())
    for name, weight in part.model.named_parameters():
        assert weight.is_meta or torch.equal(weight, kept[name]), name
    return part


def rewrite(folder: str, change: Callable[[Weights], Weights]) -> None:
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", [*FAMILIES, "demo"])
@pytest.mark.parametrize("piece", [64, 1 << 20])
def test_describes_the_whole_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, piece: int
) -> None:
    monkeypatch.setattr(weights, "PIECE", piece)
    assert_same("demo" if family == "demo" else save_model(tmp_path, family))


def test_holds_what_the_late_route_needs_and_no_more(tmp_path: Path) -> None:
    part = load_part(save_model(tmp_path / "t5", "t5"), {"decoder": 2})
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    late = ("decoder.block.3.", "decoder.block.4.")
    others = {name for name in loaded(part) if not name.startswith(late)}
    norms = {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}
    assert others == {"shared.weight", bias, *norms}
    # The head is the embedding; T5 1.1 has one of its own and never embeds anything.
    gated = loaded(load_part(save_model(tmp_path / "gated", "t5-gated"), {"decoder": 1}))
    assert "lm_head.weight" in gated and "shared.weight" not in gated
    bert = loaded(load_part(save_model(tmp_path / "bert", "bert"), {"hidden": 3}))
    assert {".".join(name.split(".")[:3]) for name in bert} == {
        f"encoder.layer.{block}" for block in (1, 2, 3)
    }
    encoder = loaded(load_part(str(tmp_path / "t5"), {"encoder": 1}))
    assert "encoder.block.4.layer.0.SelfAttention.q.weight" in encoder
    assert "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in encoder
    assert not any(name.startswith("decoder.block") for name in encoder)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_not_loaded_refuses_to_run(tmp_path: Path, family: str) -> None:
    part = load_part(save_model(tmp_path, family), LATE)
    stream = part.family.main
    states, block = torch.zeros(1, 2, part.width), part.blocks(stream)[0]
    with pytest.raises(RuntimeError, match=r"\.0\..*was not loaded"):
        next(each for each in block.modules() if [*each.parameters(recurse=False)])(states)
    embeddings = part.model.get_submodule(part.family.embeddings[0])
    table = next(each for each in embeddings.modules() if isinstance(each, nn.Embedding))
    if family not in ("t5", "bart"):  # whose head it is
        with pytest.raises(RuntimeError, match="was not loaded"):
            table(torch.zeros(1, 2, dtype=torch.long))


def extracted(tmp_path: Path, family: str, late: int = 1) -> RunConfig:
    config = make_config(
        {
            "model": save_model(tmp_path / "model", family),
            "cache": tmp_path / "cache",
            "data": {"source": str(write_data(tmp_path / "data"))},
            "extract": {"codec": "float32", "taps": "all"},
            "tune": {"late": late},
        },
        "test",
    )
    run_extract(config, QUIET)
    return config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("late", [1, 2])
def test_a_route_on_the_part_computes_the_same_bits(tmp_path: Path, family: str, late: int) -> None:
    config = extracted(tmp_path, family, late)
    found = []
    for whole in (False, True):
        cache, backbone, tokenizer = open_for_tuning(config, QUIET, whole=whole)
        assert backbone.whole is whole
        for weight in backbone.model.parameters():
            # Some libraries' products depend on how a matrix lies in memory, in their last bits.
            weight.data = weight.data.clone()
        task = Task(cache, "colour", backbone, tokenizer)
        settings = TuneSettings(late=late, reduction=3, epochs=1, batch_size=8, lr=1e-2)
        tuner = Tuner(task, settings, tmp_path / f"run-{whole}", budget=1 << 30)
        tensors = (*tuner.route.parameters(), *tuner.route.buffers())
        assert not any(tensor.is_meta for tensor in tensors)
        before = tuner.outputs(tuner.held_out, 6)
        run(tuner)
        found.append((before, tuner.outputs(tuner.held_out, 6)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(*found[0])


def test_a_changed_byte_makes_the_cache_stale(tmp_path: Path) -> None:
    config = extracted(tmp_path, "bert")
    open_for_tuning(config, QUIET)
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # Of a weight that a tuning never computes with.
    start = header["embeddings.position_embeddings.weight"]["data_offsets"][0]
    content[8 + int.from_bytes(content[:8], "little") + start] ^= 1
    file.write_bytes(content)
    with pytest.raises(StaleCacheError, match="backbone fingerprint"):
        open_for_tuning(config, QUIET)


def test_shards(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(
        folder, max_shard_size="30KB"
    )
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_model(tmp_path, "t5")
    rewrite(folder, lambda old: {name: weight.to(dtype) for name, weight in old.items()})
    assert_same(folder)


def test_names_with_the_base_models_prefix(tmp_path: Path) -> None:
    folder = save_model(tmp_path, "bert")

    def as_saved_with_a_head(old: Weights) -> Weights:
        extra = {"cls.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(4)}
        return {f"bert.{name}": weight for name, weight in old.items()} | extra

    rewrite(folder, as_saved_with_a_head)
    assert_same(folder)


def _legacy(old: Weights) -> Weights:
    return {k.replace("LayerNorm.weight", "LayerNorm.gamma"): v for k, v in old.items()}


def _double(old: Weights) -> Weights:
    return {name: weight.double() for name, weight in old.items()}


@pytest.mark.parametrize("change", [_legacy, _double])
def test_unusual_checkpoints_are_loaded_whole(
    tmp_path: Path, change: Callable[[Weights], Weights]
) -> None:
    folder = save_model(tmp_path, "bert")
    rewrite(folder, change)
    assert_same(folder, whole=True)


@pytest.mark.parametrize("stored", ["decoder.embed_tokens.weight", "lm_head.weight"])
def test_tied_weights_under_another_of_their_names(tmp_path: Path, stored: str) -> None:
    folder = save_model(tmp_path, "t5")
    rewrite(folder, lambda old: {stored: old.pop("shared.weight"), **old})
    part = assert_same(folder)
    assert part.model.get_parameter("lm_head.weight") is part.model.get_parameter("shared.weight")


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_tied_weights_that_are_stored_twice_are_tied_if_equal(
    tmp_path: Path, change: float
) -> None:
    folder = save_model(tmp_path, "t5")
    rewrite(folder, lambda old: {"lm_head.weight": old["shared.weight"] + change, **old})
    part = assert_same(folder)
    head, shared = (part.model.get_parameter(f"{name}.weight") for name in ("lm_head", "shared"))
    assert (head is shared) is (change == 0.0)


def _lose_a_weight(folder: Path) -> None:
    rewrite(str(folder), lambda old: {k: v for k, v in old.items() if "layer.1.output" not in k})


def _cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def _pickle(folder: Path) -> None:
    weights_ = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights_, folder / "pytorch_model.bin")


def _forget_the_family(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "reformer"}')


def _remove(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("spoil", [_lose_a_weight, _pickle, _forget_the_family, _remove, _cut_off])
def test_errors_are_those_of_loading_all(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    folder = save_model(tmp_path, "bert")
    spoil(tmp_path)
    with pytest.raises(Exception) as whole:
        load_backbone(folder)
    with pytest.raises(whole.type) as part:
        load_part(folder, LATE)
    assert str(part.value) == str(whole.value)
    if spoil is _cut_off:
        assert whole.type is InputError and "is damaged" in str(whole.value)


MEASURE = """
import sys, torch
from pathlib import Path
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.memory import PeakMemory
from sherl_pipe.stages.part import load_part

small, large = sys.argv[1:]
load_part(small, {"decoder": 1})  # imports
for load in (lambda: load_part(large, {"decoder": 1}), lambda: load_backbone(large)):
    peak = PeakMemory(torch.device("cpu"))
    backbone = load()
    print(peak.peak_mib())
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's counters")
def test_peak_memory_is_that_of_the_part(tmp_path: Path) -> None:
    config = T5Config(vocab_size=1000, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / "model.safetensors").stat().st_size / 2**20
    command = [sys.executable, "-c", MEASURE, save_model(tmp_path / "small", "t5")]
    run = subprocess.run(
        [*command, str(tmp_path / "large")], capture_output=True, text=True, check=True
    )
    part, whole = map(float, run.stdout.split())
    # One block of twelve, which is a tenth of the weights; the other half of the margin is for
    # buffers, a few MiB for each of up to eight threads.
    assert size > 150 and part < size / 3
    assert whole > 0.8 * size
