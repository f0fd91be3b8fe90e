"""What families of backbones differ in, beyond the properties that all tests ask of all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import done, refused, write_rows
from model_tools import CAUSAL, ENCODERS, VISION, save_model, write_data
from sherl_pipe.cache import FeatureCache, InputError
from sherl_pipe.pipeline import planning
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.opening import positions
from sherl_pipe.pipeline.predict import Predictor
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.families import FAMILIES
from sherl_pipe.stages.methods.ladder import encoder_ladder
from sherl_pipe.stages.methods.route import pooled
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.templates import make_template
from sherl_pipe.stages.tune import Tuner
from transformers import AutoConfig, AutoModelForCausalLM

QUIET = Bars(None)
POOLED = (*ENCODERS, *CAUSAL)


def extracted(tmp_path: Path, family: str, **extract: Any) -> Any:
    config = make_config(
        {
            "model": save_model(tmp_path / "model", family),
            "cache": tmp_path / "cache",
            "data": {"source": str(write_data(tmp_path / "data"))},
            "extract": {"codec": "float32", **extract},
        },
        "test",
    )
    run_extract(config, QUIET)
    return config


def test_every_pooled_family_is_among_those_that_tests_go_through() -> None:
    same_as_roberta = {"xlm-roberta"}
    pooled_ones = {n for n, f in FAMILIES.items() if not f.seq2seq and not f.towers}
    assert pooled_ones - same_as_roberta == {*POOLED, *VISION}
    assert {n for n, f in FAMILIES.items() if f.images} == {*VISION}
    assert {n for n, f in FAMILIES.items() if f.causal} == {*CAUSAL}
    assert {n for n, f in FAMILIES.items() if f.towers} == {"clip"}  # see test_stages_clip.py
    assert FAMILIES["xlm-roberta"] is FAMILIES["roberta"]


@pytest.mark.parametrize("taps", ["all", (0, 1)], ids=str)
@pytest.mark.parametrize("family", POOLED)
def test_taps_are_the_backbones_hidden_states(tmp_path: Path, family: str, taps: Any) -> None:
    """Of one example at a time, so that padding has no part in what is expected."""
    config = extracted(tmp_path, family, taps=taps)
    cache, backbone, tokenizer = open_for_tuning(config, QUIET, whole=True)
    stream = FeatureCache.open(tmp_path / "cache").stream("colour/train", "hidden")
    places = {identity.tobytes(): number for number, identity in enumerate(stream.ids)}
    rows = [json.loads(line) for line in (tmp_path / "data/colour/train.jsonl").open()]
    lead = "sentence: " if backbone.family.causal else ""
    assert len(places) == len(rows) == stream.examples
    # The last hidden state of a model with a final norm has that behind it; it is no tap.
    known = len(stream.spec.taps) - (taps == "all")
    for row, identity in zip(rows, cache.tasks["colour"]["train"].ids, strict=True):
        inputs = tokenizer(lead + row["sentence"], return_tensors="pt")
        with torch.no_grad():
            out: Any = backbone.model(**inputs, output_hidden_states=True)
        found = torch.from_numpy(stream.read_example(places[identity]))
        for tap in range(known):
            assert found[tap].shape == out.hidden_states[tap][0].shape
            assert (found[tap] - out.hidden_states[tap][0]).abs().max() < 1e-5


@pytest.mark.parametrize("family", CAUSAL)
def test_what_a_causal_head_reads_depends_on_nothing_behind_it(tmp_path: Path, family: str) -> None:
    cache, backbone, tokenizer = open_for_tuning(extracted(tmp_path, family), QUIET)
    task = Task(cache, "colour", backbone, tokenizer)

    def outputs(**how: Any) -> torch.Tensor:
        tuner = Tuner(task, TuneSettings(reduction=3, **how), tmp_path / "run", budget=1 << 30)
        return tuner.outputs(tuner.held_out, 6)

    first = outputs(pool="first")  # of "sentence: ...": the same token everywhere
    assert (first - first[0]).abs().max() < 1e-5
    assert outputs(pool="last").std(0).min() > 1e-3


@pytest.mark.parametrize("pool", ["mean", "first", "last"])
def test_pools_read_the_same_under_either_padding(pool: str) -> None:
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    shifted, behind = states.clone(), mask.clone()
    shifted[1], behind[1] = states[1].roll(2, 0), mask[1].roll(2, 0)
    expected = {
        "mean": torch.stack([states[0].mean(0), states[1, :2].mean(0)]),
        "first": states[:, 0],
        "last": torch.stack([states[0, 3], states[1, 1]]),
    }[pool]
    assert torch.allclose(pooled(states, mask, pool), expected)
    assert torch.allclose(pooled(shifted, behind, pool), expected)


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(InputError, match="pool: expected .*'last'.*, found max"):
        pooled(torch.zeros(1, 1, 1), torch.ones(1, 1), "max")


@pytest.mark.parametrize(
    ("family", "longest"),
    [("bert", 64), ("distilbert", 64), ("roberta", 63), ("mpnet", 62), ("gpt2", 64)]
    + [(family, None) for family in ("deberta-v2", "llama", "modernbert", "t5")],
)
def test_learned_positions_bound_the_length(
    tmp_path: Path, family: str, longest: int | None
) -> None:
    assert positions(load_backbone(save_model(tmp_path, family))) == longest


@pytest.mark.parametrize("family", ["llama", "modernbert"])
def test_angles_stay_exact_in_half_precision(tmp_path: Path, family: str) -> None:
    folder = save_model(tmp_path, family)
    full = load_backbone(folder)
    tables = dict(full.model.named_buffers())
    assert tables
    for half in (load_backbone(folder, dtype=torch.bfloat16), full.cast(torch.bfloat16)):
        assert half.dtype == torch.bfloat16 and half.fingerprint == full.fingerprint
        for name, table in half.model.named_buffers():
            assert torch.equal(table, tables[name]), name
    assert full.dtype == torch.float32


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_with_a_head_is_the_same_backbone(
    tmp_path: Path, family: str, tied: bool
) -> None:
    """As language models are published: behind a prefix, the head beside it."""
    folder = save_model(tmp_path / "model", family)
    plain = load_backbone(folder)
    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.base_model.load_state_dict(plain.model.state_dict())
    model.save_pretrained(tmp_path / "head")
    whole, part = (load(str(tmp_path / "head")) for load in (load_backbone, _two_blocks))
    assert whole.fingerprint == part.fingerprint == plain.fingerprint
    assert whole.whole and not part.whole


def _two_blocks(folder: str) -> Backbone:
    return load_part(folder, {"hidden": 2})


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "llama"])
def test_from_texts_to_predictions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Two columns, all commands, and predictions that are those of the cached evaluation."""
    texts = ["a cat", "the dog likes", "red bird and", "big", "not very small 3", "hates . the"]
    rows = [
        {"sentence1": one, "sentence2": other, "label": int("cat" in one or "red" in other)}
        for one in texts
        for other in texts
    ]
    for role, part in (("train", rows[::2]), ("validation", rows[1::2])):
        write_rows(tmp_path / "data" / "pair" / f"{role}.jsonl", part)
    model = save_model(tmp_path / "model", family)
    done("extract", "--model", model, "--data", tmp_path / "data", "--cache", tmp_path / "cache",
         "--codec", "float32")  # fmt: skip
    monkeypatch.setattr(planning, "SECONDS", 0.2)
    done("plan", "--model", model, "--data", tmp_path / "data", "--cache", tmp_path / "new")
    (result,) = done(
        "tune", "--cache", tmp_path / "cache", "--out", tmp_path / "runs", "--epochs", 1,
        "--reduction", 1, "--json",
    ).json  # fmt: skip
    route = json.loads((Path(result["folder"]) / "adapter_config.json").read_text())["route"]
    assert route["pool"] == ("mean" if family == "distilbert" else "last")
    file = tmp_path / "data" / "pair" / "validation.jsonl"
    answers = [
        json.loads(line)
        for line in done(
            "predict", "--adapter", result["folder"], "--file", file, "--json"
        ).out.splitlines()
        if line
    ]
    right = sum(
        str(a["label"]) == str(r["label"]) for a, r in zip(answers, rows[1::2], strict=True)
    )
    assert 100 * right / len(answers) == pytest.approx(result["metrics"]["accuracy"])
    predictor = Predictor(Path(result["folder"]), device="cpu")
    segments = len(predictor.template.segments)
    assert segments == (2 if family == "distilbert" else 1)


def test_causal_backbones_read_columns_as_one_text() -> None:
    template = make_template("neutral", "pair", ("one", "two"), joined=FAMILIES["gpt2"].joined)
    assert template.render({"one": "a", "two": ""}) == ("one: a two: ",)


def test_an_unknown_family_is_told_the_known_ones_and_how_to_add_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "reformer"}')
    data = write_data(tmp_path / "data")
    argv = ("extract", "--model", tmp_path, "--data", data, "--cache", tmp_path / "cache")
    line = refused(3, "reformer", "docs/families.md", *FAMILIES, argv=argv)
    assert line.index("bert") < line.index("t5")


def test_a_family_without_side_blocks_is_told_those_that_have_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load_backbone(save_model(tmp_path, "bert"))
    backbone.family = replace(backbone.family, side=None)
    monkeypatch.setitem(FAMILIES, "bert", backbone.family)
    with pytest.raises(InputError, match=r"one of bart, deberta-v2, deit, .*, found bert"):
        encoder_ladder(backbone, [0, 1], 3)


@pytest.mark.parametrize("family", ["llama", "modernbert", "qwen3"])
def test_side_heads_of_rotary_positions_have_even_widths(tmp_path: Path, family: str) -> None:
    backbone = load_backbone(save_model(tmp_path, family))
    for reduction in (1, 2, 3, 4):
        side: Any = encoder_ladder(backbone, [1, 3], reduction).stack
        heads = backbone.config.num_attention_heads
        width = getattr(backbone.config, "head_dim", None) or backbone.width // heads
        expected = width // 2 // reduction * 2
        assert side.config.hidden_size == heads * expected
        kinds = getattr(backbone.config, "layer_types", None)
        assert kinds is None or side.config.layer_types == [kinds[1], kinds[3]]
    with pytest.raises(InputError, match="reduction"):
        encoder_ladder(backbone, [1, 3], 99)
