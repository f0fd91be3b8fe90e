"""What is counted and sampled before an extraction, against what is then extracted."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_tools import snapshot, write_rows
from model_tools import save_model, sentences, write_data
from sherl_pipe.cache import CacheWriter, FeatureCache
from sherl_pipe.cache.layout import assign
from sherl_pipe.pipeline import opening, planning, space, staff, steps
from sherl_pipe.pipeline.config import RunConfig, make_config
from sherl_pipe.pipeline.console import Bars
from sherl_pipe.stages.inputs import pad_id
from sherl_pipe.stages.passes import LivePass
from sherl_pipe.stages.sample import choose, strata
from sherl_pipe.stages.scratch import MemoryStore, memory_writer, opened
from sherl_pipe.stages.settings import TuneSettings
from sherl_pipe.stages.survey import amounts, lengths_by_id, padded_tokens, survey, upper_bound
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.tokens import Tokens
from sherl_pipe.stages.tune import Tuner

QUIET = Bars(None)


def config_of(folder: Path, family: str, **extract: Any) -> RunConfig:
    """A tiny model and two tasks that label the same sentences."""
    model = folder / "model"
    if not model.exists():
        save_model(model, family)
        write_data(folder / "data", ("colour", "size"), train=70, validation=30)
    return make_config(
        {
            "model": str(model),
            "cache": folder / "cache",
            "data": {"source": str(folder / "data")},
            "extract": {"batch_tokens": 256, **extract},
            "tune": {"reduction": 1, "epochs": 2, "batch_size": 16},
        },
        "test",
    )


@pytest.mark.parametrize(
    ("family", "template"), [("t5", "neutral"), ("t5", "task"), ("bert", None)]
)
def test_what_is_counted_is_what_is_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, template: str | None
) -> None:
    config = config_of(tmp_path, family, template=template)
    ready = opening.prepare(config)
    setup = replace(planning.setup_of(ready), shard_bytes=1)  # many small shards
    counted, trees = planning.count(ready, {}, QUIET)
    found = amounts(counted, trees, setup.identity, shard_bytes=1, batch_tokens=256)
    small = {"shard_bytes": 1}
    extractor = staff.Extractor
    monkeypatch.setattr(staff, "Extractor", lambda *a, **k: extractor(*a, **k | small))
    monkeypatch.setattr("os.fsync", lambda _: None)
    steps.run_extract(config, QUIET)
    cache = FeatureCache.open(tmp_path / "cache")
    streams = {
        (split, name): (stream.examples, stream.rows, stream.layout.shards)
        for split in cache.splits
        for name, stream in cache.streams(split).items()
    }
    assert {(a.split, a.stream): (a.examples, a.rows, a.shards) for a in found} == streams
    assert max(a.shards for a in found) > 2
    if template == "neutral":
        assert next(a for a in found if a.split == "size/train").examples == 0


def test_padding_is_that_of_the_batches() -> None:
    lengths = np.array([3, 1, 2, 5, 4, 4])
    layout = assign(lengths, 100, seed=0)
    # At most 8 padded tokens: 1 2 | 3 4 | 4 | 5.
    assert padded_tokens(layout, lengths, 8) == 2 * 2 + 2 * 4 + 4 + 5
    assert padded_tokens(layout, lengths, 1000) == 6 * 5
    assert padded_tokens(assign(np.array([], np.int64), 10, 0), np.array([], np.int64), 8) == 0
    # Of many shards some are looked at.
    many = np.full(400, 7)
    assert padded_tokens(assign(many, 70, 0), many, 64) == 2800


def test_tokens_are_scaled_up_where_there_is_no_time_for_all(tmp_path: Path) -> None:
    rows = [{"sentence": text, "label": len(text) % 2} for text in sentences(2001)]
    write_rows(tmp_path / "data" / "long" / "train.jsonl", rows)
    save_model(tmp_path / "model", "bert")
    values = {"model": str(tmp_path / "model"), "data": {"source": str(tmp_path / "data")}}
    ready = opening.prepare(make_config(values, "test"))

    def count(seconds: float) -> Any:
        args = ready.sources, ready.templates, ready.tokenizer, 128
        return survey(*args, seconds=seconds)

    whole, part = count(1e9), count(0.0)
    assert whole.whole and not part.whole
    (split,), (sampled,) = whole.splits, part.splits
    assert split.rows == split.tokens.lengths.sum() and split.known.tolist() == list(range(2001))
    assert 256 <= len(sampled.known) < 700 and (np.diff(sampled.known) > 0).all()
    assert sampled.rows == pytest.approx(split.rows, rel=0.1)
    exact = lengths_by_id(whole)
    assert all(exact[key] == size for key, size in lengths_by_id(part).items())


def test_the_bound_is_above_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)
    for codec in ("float32", "int8"):
        config = config_of(tmp_path, "t5", codec=codec)
        ready = opening.prepare(config)
        bound = upper_bound(ready.sources, space._trees_of(ready), ready.identity)
        steps.run_extract(config, QUIET)
        size = sum(len(data) for _, data in snapshot(tmp_path / "cache").values())
        assert size < bound < 60 * size
        shutil.rmtree(tmp_path / "cache")


def test_strata_have_the_mean_of_all() -> None:
    batches = [np.array([number]) for number in range(40)]
    sizes = [number * number for number in range(40)]
    for count in (1, 3, 6):
        picked = [int(batch[0]) for batch in strata(batches, sizes, count)]
        assert len(picked) == count and picked == sorted(picked)
        assert np.mean([sizes[n] for n in picked]) == pytest.approx(np.mean(sizes), rel=0.08)
    assert len(strata(batches[:2], sizes[:2], 6)) == 2


def test_a_sample_has_every_task_by_its_share_and_stays_near_its_size(tmp_path: Path) -> None:
    ready = opening.prepare(config_of(tmp_path, "bert", template="task"))
    counted, _ = planning.count(ready, {}, QUIET)
    tables = planning._training_rows(ready.tables)
    total = sum(split.rows for split in counted.splits)
    everything = choose(counted, tables, 16, total)
    assert {name: len(m) for name, m in everything.members.items()} == {
        "colour/train": 70, "colour/validation": 30, "size/train": 70, "size/validation": 30
    }  # fmt: skip
    some = choose(counted, tables, 16, total / 4)
    length = lengths_by_id(counted)
    taken = sum(int(s.tokens.lengths[some.members[s.name]].sum()) for s in counted.splits)
    assert total / 8 < taken <= total / 4
    assert set(some.batches) == {"colour", "size"}
    assert len(some.members["size/validation"]) == 0
    for task, batches in some.batches.items():
        split = next(s for s in counted.splits if s.name == f"{task}/train")
        members = {split.ids[split.known[at]] for at in some.members[split.name]}
        for rows in batches:
            assert len(rows) == 16 and {tables[task].ids[row] for row in rows} <= members
            sizes = [length[tables[task].ids[row]] for row in rows]
            assert max(sizes) - min(sizes) < 8  # neighbours in length
    one = choose(counted, tables, 16, 1)
    assert sum(len(batches) for batches in one.batches.values()) == 1
    unlabelled = choose(counted, {}, 16, total / 4)
    taken = sum(int(s.tokens.lengths[unlabelled.members[s.name]].sum()) for s in counted.splits)
    assert taken == pytest.approx(total / 4, rel=0.3) and not unlabelled.batches
    assert all(len(members) for members in unlabelled.members.values())


def test_texts_that_tasks_share_are_counted_once(tmp_path: Path) -> None:
    ready = opening.prepare(config_of(tmp_path, "bert"))
    counted, _ = planning.count(ready, {}, QUIET)
    tables = planning._training_rows(ready.tables)
    total = sum(split.rows for split in counted.splits)
    sample = choose(counted, tables, 16, total * 0.6)
    taken = sum(int(s.tokens.lengths[sample.members[s.name]].sum()) for s in counted.splits)
    assert total * 0.3 < taken <= total * 0.6


def test_a_store_in_memory_holds_what_the_disk_would(tmp_path: Path) -> None:
    config = config_of(tmp_path, "t5")
    ready = opening.prepare(config)
    memory = memory_writer(ready.identity)
    with CacheWriter.open(tmp_path / "cache", ready.identity) as disk:
        for writer in (disk, memory):
            extractor = staff.Extractor(writer, ready.backbone, ready.tokenizer)
            known: dict[bytes, str] = {}
            for source in ready.sources[:2]:
                extractor.split(source, ready.templates[source.name], known)
            for table in ready.tables[:2]:
                writer.write_labels(table)
            steps._extract_words(extractor, opened(writer))
    assert opened(memory).content() == FeatureCache.open(tmp_path / "cache").content()
    keys = {key for key in disk.store.list() if key != "_lock"}
    assert set(memory.store.list()) == keys
    assert set(memory.store.list("colour/train")) == set(disk.store.list("colour/train")) < keys
    assert all(memory.store.size(key) == disk.store.size(key) for key in keys)
    store = MemoryStore()
    with pytest.raises(FileNotFoundError):
        store.read("a")
    assert store.size("a") is None and not store.exists("a")
    store.create("a", b"1")
    with pytest.raises(FileExistsError):
        store.create("a", b"2")
    store.delete("a")
    store.delete("a")
    assert list(store.list()) == [] and not Path("memory").exists()


@pytest.mark.parametrize("family", ["t5", "t5-gated", "bert", "roberta"])
def test_live_features_are_the_cached_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """What is timed as the live way is the same work: the same rows in the same places."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    config = config_of(tmp_path, family, codec="float32")
    steps.run_extract(config, QUIET)
    cache, backbone, tokenizer = steps.open_for_tuning(config, QUIET, whole=True)
    ready = opening.prepare(config)
    counted, _ = planning.count(ready, {}, QUIET)
    inputs = {
        identity: row
        for split in counted.splits
        for identity, row in zip(split.ids, split.tokens.inputs, strict=True)
    }
    for name in ("colour", "size"):
        task = Task(cache, name, backbone, tokenizer)
        tuner = Tuner(task, TuneSettings(reduction=1), tmp_path, budget=1 << 40)
        tokens = Tokens([inputs[each] for each in task.train.ids], 0)
        tree = tuner.scoring.tree if tuner.scoring else None
        live = LivePass(backbone, tuner.route.reads(), tokens, pad_id(tokenizer), tree)
        words = task.words_of(task.train.labels) if task.tree else None
        for batch in tuner.train.read(tuner.train.epoch(0, 0, 16)):
            other = live.batch(batch.rows, None if words is None else words[batch.rows])
            assert list(other.streams) == list(batch.streams)
            for role, cached in batch.streams.items():
                computed = other.streams[role]
                assert torch.equal(computed.lengths, cached.lengths)
                assert torch.allclose(computed.states, cached.states, atol=2e-5)
            assert not any(packed.states.requires_grad for packed in other.streams.values())
