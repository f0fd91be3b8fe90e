"""Stage one: what is run, what is stored, and what is refused."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_tools import save_model, write_data
from sherl_pipe.cache import CacheWriter, FeatureCache, InputError, NonFiniteError
from sherl_pipe.pipeline import machine
from sherl_pipe.pipeline.config import RunConfig, make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.pipeline.opening import prepare
from sherl_pipe.pipeline.planning import setup_of
from sherl_pipe.pipeline.steps import run_extract
from sherl_pipe.stages.backbone import load_backbone
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.families import FAMILIES
from sherl_pipe.stages.passes import side_by_side, token_batches, tokens_in_batch
from sherl_pipe.stages.surgery import cut_after
from sherl_pipe.stages.taps import extracted_taps, paper_blocks
from sherl_pipe.stages.tokens import load_tokenizer
from sherl_pipe.stages.weights import weights_fingerprint
from sherl_pipe.stages.words import PrefixTree, Scoring

QUIET = Bars(None)


def config_of(tmp_path: Path, family: str, **extract: Any) -> RunConfig:
    model = save_model(tmp_path / "model", family)
    data = write_data(tmp_path / "data", ("colour", "mood"))
    return make_config(
        {
            "model": model,
            "cache": tmp_path / "cache",
            "data": {"source": str(data)},
            "extract": {"codec": "float32", "batch_tokens": 64, **extract},
        },
        "test",
    )


def test_side_layers_are_the_published_ones() -> None:
    assert paper_blocks(12) == [1, 2, 3, 5, 6, 7, 9, 10, 11]
    assert paper_blocks(6) == [1, 2, 3, 5]
    depths = {"encoder": 12, "decoder": 12}
    taps = extracted_taps(FAMILIES["t5"], depths, "paper")
    assert taps["encoder"] == (0, 2, 3, 4, 6, 7, 8, 10, 11, 12)
    assert taps["decoder"] == (0, 2, 3, 4, 6, 7, 8, 10, 11)
    assert extracted_taps(FAMILIES["bert"], {"hidden": 6}, "paper") == {"hidden": tuple(range(6))}
    with pytest.raises(InputError, match="0 to 6"):
        extracted_taps(FAMILIES["bert"], {"hidden": 6}, (0, 7))
    depths = {"encoder": 5, "decoder": 3}
    assert extracted_taps(FAMILIES["t5"], depths, (1, 4)) == {
        "encoder": (1, 4, 5),
        "decoder": (1, 2),
    }
    with pytest.raises(InputError, match="encoder: expected 0 to 5"):
        extracted_taps(FAMILIES["t5"], depths, (1, 6))


def test_blocks_behind_the_last_tap_do_not_run(tmp_path: Path) -> None:
    backbone = load_backbone(save_model(tmp_path, "bert"))
    cut: Any = cut_after(backbone, "hidden", 2)
    assert len(cut.encoder.layer) == 2
    assert len(backbone.blocks("hidden")) == 4
    ran = []
    for number, block in enumerate(backbone.blocks("hidden")):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    cut = cut_after(backbone, "hidden", 2)
    cut(input_ids=torch.tensor([[3, 5, 1]]), attention_mask=torch.ones(1, 3))
    assert ran == [0, 1]


@pytest.mark.parametrize("codec", ["float32", "int8", "int4"])
def test_non_finite_states_name_tap_and_examples(tmp_path: Path, codec: str) -> None:
    config = config_of(tmp_path, "bert", codec=codec)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    token = load_tokenizer(config.model).convert_tokens_to_ids("hates")
    name = "embeddings.word_embeddings.weight"
    weights[name][token, 3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"colour/train.*tap 0, 1, 2, 3 of (\d+) examples"):
        run_extract(config, QUIET)
    left = list((tmp_path / "cache").rglob("manifest.json"))
    assert left == []


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "gpt2"])
def test_batches_that_are_computed_side_by_side_are_those_of_one_thread(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "TINY", 0)  # a small model gets one thread
    config = config_of(tmp_path, family)
    run_extract(config, QUIET)
    before = torch.get_num_threads()
    for threads in (2, 3, 9):
        try:
            torch.set_num_threads(threads)
            run_extract(config.model_copy(update={"cache": str(tmp_path / str(threads))}), QUIET)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
        many, one = (FeatureCache.open(tmp_path / name) for name in (str(threads), "cache"))
        assert many.content() == one.content()


def test_tokens_in_a_batch_are_what_is_asked_for_or_what_suits_the_device(tmp_path: Path) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert tokens_in_batch(7, 768, cpu) == tokens_in_batch(7, 768, cuda) == 7
    by_width = [tokens_in_batch(None, width, cpu) for width in (4096, 768, 96, 8)]
    assert by_width == [512, 512, 2048, 4096]
    assert tokens_in_batch(None, 8, cuda) == tokens_in_batch(None, 4096, cuda) == 4096
    config = config_of(tmp_path, "bert", batch_tokens=None)
    ready = prepare(config, QUIET)
    with CacheWriter.open(ready.path, ready.identity) as writer:
        assert Extractor(writer, ready.backbone, ready.tokenizer).batch_tokens == 4096
    assert setup_of(ready).batch_tokens == 4096


def test_an_error_in_one_batch_ends_those_beside_it(tmp_path: Path) -> None:
    def work(batch: Any) -> torch.Tensor:
        assert torch.is_inference_mode_enabled()
        if batch[0] == 3:
            raise RuntimeError("the third")
        return torch.full((1,), float(batch[0]))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = side_by_side(work, [np.array([each]) for each in range(9)], torch.device("cpu"))
        assert [float(next(found)) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="the third"):
            next(found)
        assert torch.get_num_threads() == 2 and not list(found)
        assert not [each for each in threading.enumerate() if each.name.startswith("forward")]
    finally:
        torch.set_num_threads(before)


def test_decoder_states_are_stored_once_per_prefix(tmp_path: Path) -> None:
    run_extract(config_of(tmp_path, "t5", template="neutral"), QUIET)
    cache = FeatureCache.open(tmp_path / "cache")
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    for task in ("colour", "mood"):
        tree = PrefixTree.of_words(cache.tasks[task]["train"].spec.words, tokenizer, 0)
        for role in ("train", "validation"):
            stream = cache.stream(f"colour/{role}", tree.stream)
            encoder = cache.stream(f"colour/{role}", "encoder")
            assert stream.rows == encoder.examples * len(tree.nodes)
            assert len(tree.nodes) == 1 + len(tree.words)
    # The second task's texts are the first one's: only its words are new.
    assert cache.stream("mood/train", "encoder").examples == 0
    assert cache.stream("mood/train", "encoder").notes["reused"] == 40


def test_prefix_tree_shares_what_words_share() -> None:
    tree = PrefixTree(0, ((5, 6, 1), (5, 7, 1), (5, 1)))
    assert tree.nodes == [(0,), (0, 5), (0, 5, 6), (0, 5, 7)]
    assert tree.paths == [[0, 1, 2], [0, 1, 3], [0, 1]]
    assert tree.flat_nodes == [0, 1, 2, 0, 1, 3]
    mask = tree.flat_mask(torch.float32)[0, 0]
    assert (mask[5, :3] < -1e30).all() and (mask[5, 3:] == 0).all()
    assert (mask[3, 4:] < -1e30).all()
    logits = torch.randn(2, 4, 9)
    logs = logits.log_softmax(-1)
    expected = logs[:, 0, 5] + logs[:, 1, 7] + logs[:, 3, 1]
    scoring = Scoring.of(tree, "vocabulary")
    assert torch.allclose(scoring.score(logits)[:, 1], expected, atol=1e-5)


def test_words_are_scored_where_they_part() -> None:
    """Cut behind the last place at which words part; probabilities among the words only."""
    tree = PrefixTree(0, ((5, 6, 8, 1), (5, 7, 1), (4, 9, 1)))
    scoring = Scoring.of(tree, "words")
    assert scoring.tree.words == ((5, 6), (5, 7), (4,))
    assert scoring.tokens == (4, 5, 6, 7)
    assert [tree.nodes[node] for node in scoring.nodes] == [(0,), (0, 5)]
    assert scoring.paths == ((0, 2), (0, 2), (0,))
    logits = torch.randn(2, 2, 4, requires_grad=True)
    first, second = logits[:, 0, :2].log_softmax(-1), logits[:, 1, 2:].log_softmax(-1)
    expected = torch.stack([first[:, 1] + second[:, 0], first[:, 1] + second[:, 1], first[:, 0]], 1)
    assert torch.allclose(scoring.score(logits), expected, atol=1e-6)
    assert torch.allclose(scoring.score(logits).exp().sum(-1), torch.ones(2))
    # Along the paths of the words 1 and 2; the second one's path is one place long.
    loss = scoring.loss(logits, torch.tensor([1, 2]))
    assert torch.allclose(loss, -(expected[0, 1] + expected[1, 2]) / 2)
    loss.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert (logits.grad[0, 0, 2:] == 0).all() and (logits.grad[1, 1] == 0).all()
    one = Scoring.of(PrefixTree(0, ((5, 1),)), "words")
    assert one.tree.words == ((5,),)
    with pytest.raises(InputError, match="loss: expected one of"):
        Scoring.of(tree, "nope")


def test_words_that_look_alike_to_the_tokenizer_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "t5")
    with pytest.raises(InputError, match="the same to the tokenizer"):
        PrefixTree.of_words(("zebra", "zebu"), load_tokenizer(str(tmp_path)), 0)


def test_token_budget() -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 40, 200))
    batches = list(token_batches(np.arange(200), lengths, 128))
    assert np.concatenate(batches).tolist() == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or lengths[batch].max() * len(batch) <= 128
    # A single input longer than the budget still makes a batch.
    assert [len(b) for b in token_batches(np.arange(2), np.array([200, 300]), 128)] == [1, 1]


def test_fingerprint_sees_one_changed_weight(tmp_path: Path) -> None:
    backbone = load_backbone(save_model(tmp_path, "bert"))
    before = weights_fingerprint(backbone.model)
    assert before == backbone.fingerprint == load_backbone(str(tmp_path)).fingerprint
    assert load_backbone(str(tmp_path), dtype=torch.bfloat16).fingerprint == before
    with torch.no_grad():
        backbone.blocks("hidden")[3].output.dense.bias[0] += 1e-6
    assert weights_fingerprint(backbone.model) != before


def test_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path, "bert")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights.pop("encoder.layer.1.output.dense.bias")
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder.layer.1.output.dense.bias"):
        load_backbone(str(tmp_path))


def test_unknown_family_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "reformer"}')
    with pytest.raises(InputError, match=", ".join(sorted(FAMILIES))):
        load_backbone(str(tmp_path))
