"""Dual encoders: cached = live, the loss and the metric of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import write_rows
from clip_tools import save_clip, write_pairs
from sherl_pipe.cache import FeatureCache, InputError, LabelTable
from sherl_pipe.pipeline.config import make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.steps import open_for_tuning, run_extract
from sherl_pipe.stages import group
from sherl_pipe.stages.adapter import TunedModel, load_route
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.features import Batch
from sherl_pipe.stages.inputs import load_preprocessor, preprocessor_fingerprint
from sherl_pipe.stages.methods import find_method
from sherl_pipe.stages.pairs import SPEC, pairs_of
from sherl_pipe.stages.part import load_part
from sherl_pipe.stages.retrieval import RECALLS, Pairing, contrastive
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.task_rows import train_and_held_out
from sherl_pipe.stages.tune import Tuner
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPProcessor
from tune_tools import goes_on, halfway

QUIET = Bars(None)
Setting = dict[str, Any]


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A cache of pairs, with many small shards, and the whole backbone."""
    folder = tmp_path_factory.mktemp("clip")
    return {"folder": folder, **prepare(folder, save_clip(folder / "model"))}


def prepare(folder: Path, model: str, **extract: Any) -> Setting:
    data = write_pairs(folder / "data", copies=2)
    config = make_config(
        {
            "model": model,
            "cache": folder / "cache",
            "data": {"source": str(data / "shapes")},
            "extract": {"codec": "float32", "batch_tokens": 64, **extract},
        },
        "test",
    )
    run_extract(config, QUIET)
    cache, backbone, reader = open_for_tuning(config, QUIET, whole=True)
    return {"cache": cache, "backbone": backbone, "reader": reader, "data": data / "shapes"}


def make_tuner(setting: Setting, folder: Path, *, shaken: bool = True, **how: Any) -> Tuner:
    """A tuner whose every parameter is random, unless it is not `shaken`."""
    method = find_method(how.get("method", "sherl"))
    usual = method.usual_for(setting["cache"].identity.streams)
    settings = TuneSettings(**{**usual, "epochs": 1, "batch_size": 16, **how})
    task = Task(setting["cache"], "shapes", setting["backbone"], setting["reader"])
    tuner = Tuner(task, settings, folder, budget=1 << 30)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in tuner.parameters.values() if shaken else ():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return tuner


def live_inputs(setting: Setting, role: str, padding: str = "right") -> dict[str, Tensor]:
    """The pairs of a split, row by row: ragged texts and their images."""
    sources = load_sources(str(setting["data"]), images=True)
    pairs = pairs_of(next(each for each in sources if each.role == role))
    reader = setting["reader"]
    texts = reader.read([(row["caption"],) for row in pairs.texts.rows], 128)
    images = reader.read([row["image"] for row in pairs.images.rows], 0)
    rows = range(len(pairs.texts.rows))
    inputs = texts.batch(rows, reader.pad_token_id)
    if padding == "left":
        away = inputs["attention_mask"].shape[1] - torch.from_numpy(texts.lengths)
        size = inputs["attention_mask"].shape[1]
        places = (torch.arange(size) - away[:, None]) % size
        inputs = {name: values.gather(1, places) for name, values in inputs.items()}
        assert not inputs["attention_mask"][:, 0].all()
    assert len(set(texts.lengths.tolist())) > 3
    return inputs | images.batch(rows, 0)


@pytest.mark.parametrize(
    "how", [{}, {"reduction": 3}, {"method": "unipt", "init": "paper"}], ids=str
)
@pytest.mark.parametrize("padding", ["right", "left"])
def test_cached_is_live(
    setting: Setting, tmp_path: Path, how: dict[str, Any], padding: str
) -> None:
    tuner = make_tuner(setting, tmp_path, **how)
    model = TunedModel(setting["backbone"], tuner.route).eval()
    cached = tuner.outputs(tuner.held_out, 5)
    with torch.inference_mode():
        live = model(**live_inputs(setting, "validation", padding))
    torch.testing.assert_close(
        cached, torch.cat([live.text_embeds, live.image_embeds], 1), atol=1e-5, rtol=1e-4
    )
    assert (cached[0] - cached[1]).abs().max() > 0.03  # no collapse that would be equal anyhow
    # Training: all batches of an epoch, each against the rows that it has.
    inputs = live_inputs(setting, "train", padding)
    for batch in tuner.train.read(tuner.train.epoch(0, 0, 16)[:3]):
        grads = gradients(tuner, tuner.loss(batch))
        out = model(**{name: values[batch.rows] for name, values in inputs.items()})
        others = tuner.task.pairings[0].others(batch.rows)
        assert others.any()  # captions of one image, and images of one caption, meet
        scale = float(setting["backbone"].model.logit_scale.exp())
        loss = contrastive(out.text_embeds, out.image_embeds, scale, others)
        torch.testing.assert_close(tuner.loss(batch), loss, atol=1e-5, rtol=1e-4)
        rounding = sensitivity(tuner, batch, grads)
        for name, found in gradients(tuner, loss).items():
            most = 2e-5 + rounding[name]
            torch.testing.assert_close(grads[name], found, atol=most, rtol=1e-3, msg=name)
        assert sum(float(grad.abs().sum()) > 0 for grad in grads.values()) >= 0.9 * len(grads)


def gradients(tuner: Tuner, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(tuner.parameters.values()))
    return dict(zip(tuner.parameters, found, strict=True))


def sensitivity(tuner: Tuner, batch: Batch, grads: Mapping[str, Tensor]) -> dict[str, float]:
    """What entries of gradients move by at most when states do by some units in their last place,
    as they differ between batches of other sizes."""
    moved = dict.fromkeys(grads, 0.0)
    for seed in range(4):
        noise = torch.Generator().manual_seed(seed)
        streams = {
            role: replace(
                each,
                states=each.states * (1 + 2e-7 * torch.randn(each.states.shape, generator=noise)),
            )
            for role, each in batch.streams.items()
        }
        for name, found in gradients(tuner, tuner.loss(replace(batch, streams=streams))).items():
            moved[name] = max(moved[name], float((found - grads[name]).abs().max()))
    return moved


@pytest.mark.parametrize("old", [False, True])
def test_residual_start_is_the_model_itself(setting: Setting, tmp_path: Path, old: bool) -> None:
    """Before the first step embeddings are Hugging Face's own; also where the config is an old one
    that does not name its end token, which is the largest number then."""
    if old:
        setting = prepare(tmp_path, save_clip(tmp_path / "model", old=True))
    tuner = make_tuner(setting, tmp_path, shaken=False)
    inputs = live_inputs(setting, "validation")
    model: Any = setting["backbone"].model
    assert (model.config.text_config.eos_token_id == 2) == old
    with torch.inference_mode():
        texts = model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
        images = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    expected = torch.cat([F.normalize(texts, dim=1), F.normalize(images, dim=1)], 1)
    found = tuner.outputs(tuner.held_out, 100)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_only_what_ends_in_embeddings_is_loaded(setting: Setting) -> None:
    folder = str(setting["folder"] / "model")
    part, full = load_part(folder, {}), load_backbone(folder)
    for field in ("fingerprint", "config_hash", "parameters", "width", "family"):
        assert getattr(part, field) == getattr(full, field), field
    kept = {name for name, weight in part.model.named_parameters() if not weight.is_meta}
    norms = {f"{norm}.{kind}" for norm in NORMS for kind in ("weight", "bias")}
    assert kept == norms | {"text_projection.weight", "visual_projection.weight", "logit_scale"}


NORMS = ("text_model.final_layer_norm", "vision_model.post_layernorm")


def test_a_lossy_cache_is_near(setting: Setting, tmp_path: Path) -> None:
    exact = make_tuner(setting, tmp_path)
    lossy = prepare(tmp_path, str(setting["folder"] / "model"), codec="int8")
    coded = make_tuner(lossy, tmp_path)
    coded.route.load_state_dict(exact.route.state_dict())
    first, second = (tuner.outputs(tuner.held_out, 100) for tuner in (exact, coded))
    assert 0 < (first - second).abs().max() < 0.05


def test_an_adapter_is_loaded_as_it_was_saved(setting: Setting, tmp_path: Path) -> None:
    tuner = make_tuner(setting, tmp_path / "run")
    outputs = tuner.outputs(tuner.held_out, 100)
    result = tuner.finish(outputs, seconds=0.0, seconds_per_epoch=0.0, peak_mib=0.0)
    assert set(result.metrics) == set(RECALLS)
    assert result.score == pytest.approx(sum(result.metrics.values()) / 6)
    config, route = load_route(tmp_path / "run", setting["backbone"])
    assert config.labels == SPEC and config.route == tuner.spec
    loaded = make_tuner(setting, tmp_path / "other", shaken=False)
    loaded.route.load_state_dict(route.state_dict())
    assert torch.equal(loaded.outputs(loaded.held_out, 100), outputs)
    assert tuner.finished() == result
    # Other pairs of the same texts are another task, though numbers and ids of texts are the same.
    table = tuner.task.train
    tuner.task.train = replace(table, images=table.images[::-1])
    assert tuner.finished() is None


def test_a_stopped_tuning_ends_with_the_same_weights(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "CHECKPOINT_SECONDS", 0)

    def tuner(name: str) -> Tuner:
        return make_tuner(setting, tmp_path / name, shaken=False, epochs=3)

    goes_on(tuner("whole"), tuner, halfway)


def test_streamed_batches_are_the_same(setting: Setting, tmp_path: Path) -> None:
    tuner = make_tuner(setting, tmp_path)
    streamed = Tuner(
        tuner.task, tuner.settings, tmp_path, budget=1 << 30, residency="stream", readers=1
    )
    order = tuner.train.epoch(3, 1, 16)
    assert [list(each) for each in streamed.train.epoch(3, 1, 16)] == [list(x) for x in order]
    for one, two in zip(tuner.train.read(order), streamed.train.read(order), strict=True):
        assert np.array_equal(one.rows, two.rows)
        for role in ("text", "image"):
            assert torch.equal(one.streams[role].states, two.streams[role].states)


def some_table(pairs: list[tuple[int, int]]) -> LabelTable:
    texts, images = zip(*pairs, strict=True)
    name = [bytes([number]) * 16 for number in range(max(images) + 1)]
    ids = tuple(bytes([100 + text]) * 16 for text in texts)
    return LabelTable("some", "train", SPEC, ids, tuple(images), tuple(name))


@pytest.mark.parametrize("seed", range(5))
def test_recall_is_that_of_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = sorted({(int(rng.integers(17)), int(rng.integers(13))) for _ in range(40)})
    rng.shuffle(pairs)
    # Few different values: ties are frequent.
    texts = torch.from_numpy(rng.integers(0, 2, (17, 4))).float()
    images = torch.from_numpy(rng.integers(0, 2, (13, 4))).float()
    outputs = torch.cat([texts[[t for t, _ in pairs]], images[[i for _, i in pairs]]], 1)
    found = Pairing(some_table(pairs)).recalls(outputs)
    for way, own, other, (first, second) in (
        ("t2i", 0, 1, (texts, images)),
        ("i2t", 1, 0, (images, texts)),
    ):
        numbers = sorted({pair[other] for pair in pairs})
        for at in (1, 5, 10):
            hits = []
            for query in sorted({pair[own] for pair in pairs}):
                right = {pair[other] for pair in pairs if pair[own] == query}
                # The worst order that the values allow.
                order = sorted(
                    numbers, key=lambda n: (-float(first[query] @ second[n]), n in right)
                )
                hits.append(bool(right & set(order[:at])))
            assert found[f"{way}_r{at}"] == pytest.approx(100 * sum(hits) / len(hits))


def test_recall_of_what_is_all_the_same_is_none() -> None:
    pairing = Pairing(some_table([(number, number) for number in range(20)]))
    assert set(pairing.recalls(torch.ones(20, 6)).values()) == {0.0}


def test_chunks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    pairing = Pairing(some_table([(number, number % 9) for number in range(23)]))
    outputs = torch.randn(23, 8)
    outputs[:, 4:] = outputs[[number % 9 for number in range(23)], 4:]
    whole = pairing.recalls(outputs)
    monkeypatch.setattr("sherl_pipe.stages.retrieval._CHUNK", 4)
    assert pairing.recalls(outputs) == whole


def test_known_pairs_are_no_negatives() -> None:
    # Text 0 is beside images 0 and 1; image 2 has texts 1 and 2.
    pairing = Pairing(some_table([(0, 0), (0, 1), (1, 2), (2, 2), (3, 3)]))
    rows = np.array([1, 0, 2, 3, 4])
    others = pairing.others(rows)
    assert others.nonzero().tolist() == [[0, 1], [1, 0], [2, 3], [3, 2]]
    torch.manual_seed(1)
    texts, images = (F.normalize(torch.randn(5, 6), dim=1) for _ in range(2))
    logits = 7.0 * texts @ images.T
    total = 0.0
    for row in range(5):
        kept = [column for column in range(5) if not others[row, column]]
        total -= (
            logits[row].log_softmax(0)[row]
            if len(kept) == 5
            else (logits[row, row] - logits[row, kept].logsumexp(0))
        )
        kept = [column for column in range(5) if not others[column, row]]
        total -= logits[row, row] - logits[kept, row].logsumexp(0)
    assert contrastive(texts, images, 7.0, others) == pytest.approx(float(total) / 10, rel=1e-5)
    # The last batch of an epoch may be a single pair: nothing to tell it from.
    one = contrastive(texts[:1].requires_grad_(), images[:1], 7.0, others[:1, :1])
    one.backward()
    assert one.item() == 0.0


def test_an_image_is_held_out_with_all_its_texts() -> None:
    rng = np.random.default_rng(0)
    names = [rng.bytes(16) for _ in range(30)]
    ids = tuple(rng.bytes(16) for _ in range(90))
    table = LabelTable("a", "train", SPEC, ids, tuple(n % 30 for n in range(90)), tuple(names))
    train, held = train_and_held_out({"train": table})
    assert not set(train.image_ids) & set(held.image_ids)
    assert set(train.image_ids) | set(held.image_ids) == set(names)
    assert len(held.ids) == 3 * len(set(held.image_ids))


def test_the_processor_is_in_the_identity(setting: Setting, tmp_path: Path) -> None:
    reader = setting["reader"]
    assert setting["cache"].identity.tokenizer == preprocessor_fingerprint(reader)
    # As `CLIPProcessor` saves both, all in one file or not.
    processor = CLIPProcessor(reader.pictures.processor, reader.tokenizer)
    load_backbone(str(setting["folder"] / "model")).model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert preprocessor_fingerprint(load_preprocessor(str(tmp_path))) == (
        setting["cache"].identity.tokenizer
    )
    processor.image_processor.image_mean = [0.0, 0.0, 0.0]
    processor.save_pretrained(tmp_path)
    assert preprocessor_fingerprint(load_preprocessor(str(tmp_path))) != (
        setting["cache"].identity.tokenizer
    )


def test_texts_end_where_the_tower_looks(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="one token that ends a text"):
        setting["reader"].read([("a red </s> circle",)], 16)
    # Old configs do not name the end token; the largest number is meant, and here it is a word's.
    old = load_preprocessor(save_clip(tmp_path, eos_token_id=2))
    with pytest.raises(InputError, match="one token that ends a text"):
        old.read([("a red circle",)], 16)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": ""}, "an empty text"),
        ({"caption": " \n"}, "an empty text"),
        ({"caption": None}, "expected text, found nothing"),
        ({"caption": []}, "an empty list"),
        ({"caption": ["a cat", 3]}, "expected text, found int 3"),
        ({"words": "a cat"}, "caption columns"),
    ],
)
def test_odd_captions(setting: Setting, tmp_path: Path, row: Any, message: str) -> None:
    image = next((setting["folder"] / "data" / "images").iterdir())
    file = write_rows(tmp_path / "train.jsonl", [{"image": str(image), **row}])
    (source,) = load_sources(str(file), images=True)
    with pytest.raises(InputError, match=message):
        pairs_of(source)


def test_lists_and_columns_of_captions(setting: Setting, tmp_path: Path) -> None:
    first, second = sorted((setting["folder"] / "data" / "images").iterdir())[:2]
    rows = [
        {"image": str(first), "en": ["one", "two"], "de": "eins"},
        {"image": str(second), "en": "two", "de": "zwei"},
        {"image": str(first), "en": "one", "de": "eins"},
    ]
    (source,) = load_sources(str(write_rows(tmp_path / "a.jsonl", rows)), images=True)
    table = pairs_of(source, ("en", "de")).table()
    assert table.labels == (0, 0, 0, 1, 1)
    assert len(set(table.ids)) == 4 and table.ids[1] == table.ids[3]
    assert len(table.images) == 2
    with pytest.raises(InputError, match="caption columns"):
        pairs_of(source, ("fr",))


def test_cache_keeps_the_pairs(setting: Setting) -> None:
    cache: FeatureCache = setting["cache"]
    tables = cache.tasks["shapes"]
    assert tables["train"].spec == SPEC
    assert all(each in cache.places for each in (*tables["train"].ids, *tables["train"].images))
    assert cache.verify() == []
