"""Side weights pruned from the live backbone, kept beside the runs that start from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from sherl_pipe.cache import CorruptCacheError, FeatureCache, InputError
from sherl_pipe.cache.errors import explain
from sherl_pipe.cache.fingerprint import example_id, hash_bytes, hash_json
from sherl_pipe.cache.labels import Label
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.pipeline.config import RunConfig
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.machine import pick_device
from sherl_pipe.stages.backbone import Backbone, load_backbone
from sherl_pipe.stages.data import load_sources
from sherl_pipe.stages.methods.fisher import EXAMPLES, importances, prune
from sherl_pipe.stages.methods.lst_seq2seq import LstSeq2Seq
from sherl_pipe.stages.task import Task
from sherl_pipe.stages.templates import Template
from sherl_pipe.stages.tokens import tokenize
from sherl_pipe.stages.tune import Tuner
from torch import Tensor


class Pruning:
    """What tunings with `--init fisher` start from.

    A cache holds no texts and a tuning no blocks, so the texts are read again and the backbone is
    loaded whole; both only where the weights are not there yet. Seeds and learning rates of a task
    have the same ones.

    Args:
        config: of the run.
        cache: that is tuned from.
        tokenizer: of the backbone.
        model: overrides the name in the cache, for a backbone that has moved.
        bars: for the progress.
    """

    def __init__(
        self, config: RunConfig, cache: FeatureCache, tokenizer: Any, model: str | None, bars: Bars
    ) -> None:
        self._config, self._cache, self._tokenizer = config, cache, tokenizer
        self._model, self._bars = model, bars

    def weights(self, tuner: Tuner) -> dict[str, Tensor]:
        """For `Tuner.start_from`.

        Raises InputError where the training texts are not found, StaleCacheError for another
        backbone, CorruptCacheError for kept weights that are damaged, StorageError.
        """
        task, route = tuner.task, tuner.route
        if not isinstance(route, LstSeq2Seq):
            raise TypeError(f"{type(route).__name__} has no side blocks to prune")
        # Ids are hashes: the smallest are a random draw that is the same everywhere.
        chosen = dict(sorted(zip(task.train.ids, task.train.labels, strict=True))[:EXAMPLES])
        examples = [[identity.hex(), label] for identity, label in chosen.items()]
        fingerprint = self._cache.identity.backbone["fingerprint"]
        key = hash_json([fingerprint, route.spec.to_json(), task.spec.to_json(), examples])
        store, name = LocalStore(tuner.folder.parent), f"fisher-{key[:12]}.safetensors"
        if not store.exists(name):
            say(f"tune: {task.name}: the side blocks are pruned by {len(chosen)} examples")
            found = self._made(task, route, chosen)
            store.replace(name, save_tensors(found, {"sha256": hash_bytes(save_tensors(found))}))
        return _read(store, name)

    def _made(
        self, task: Task, route: LstSeq2Seq, chosen: Mapping[bytes, Label]
    ) -> dict[str, Tensor]:
        texts = self._texts(task, set(chosen))
        tokens = tokenize(
            self._tokenizer, [texts[each] for each in chosen], self._cache.identity.max_length
        )
        if task.texts is not None:
            words = [task.texts.tokens[str(label)] for label in chosen.values()]
        elif task.tree is not None:
            numbers = task.words_of(list(chosen.values())).tolist()
            words = [task.tree.words[number] for number in numbers]
        else:
            raise TypeError(f"{task.name} has no label words")
        # Kept no longer than this: training needs the memory.
        whole = self._load()
        return prune(whole, route, importances(whole, tokens, words, self._bars))

    def _load(self) -> Backbone:
        identity = self._cache.identity
        name = self._model or str(identity.backbone["name"])
        revision = identity.backbone.get("revision")
        backbone = load_backbone(name, revision=revision, device=pick_device(self._config.device))
        backbone.require(identity.backbone, str(self._cache.path))
        return backbone

    def _texts(self, task: Task, wanted: set[bytes]) -> dict[bytes, tuple[str, ...]]:
        """The rendered texts of examples, from the data that the cache was made from."""
        data, named = self._config.data, str(self._cache.identity.backbone["name"])
        if data.source is None and self._config.model != named:
            raise InputError(
                explain(
                    "data",
                    expected="the texts that the cache was made from, for --init fisher",
                    found="none",
                    todo="Name them with --data as for `sherl-pipe extract`.",
                )
            )
        templates = {}
        for split in {self._cache.places[identity][0] for identity in wanted}:
            notes = self._cache.stream(split, task.backbone.family.main).notes
            templates[str(notes["template"])] = Template.from_json(notes["template"])
        found: dict[bytes, tuple[str, ...]] = {}
        for source in load_sources(self._config.data_source, text_columns=data.text_columns):
            for template in templates.values():
                if set(template.columns) <= source.rows[0].keys():
                    rendered = {example_id(texts): texts for texts in source.texts(template)}
                    found |= {each: rendered[each] for each in wanted & rendered.keys()}
        if found.keys() != wanted:
            raise InputError(
                explain(
                    "data",
                    expected=f"all training texts of {task.name}, for --init fisher",
                    found=f"{len(found)} of {len(wanted)} in {self._config.data_source}",
                    todo="Name the texts that the cache was made from with --data.",
                )
            )
        return found


def _read(store: LocalStore, name: str) -> dict[str, Tensor]:
    data = store.read(name)
    try:
        found = load_tensors(data)
        size = int.from_bytes(data[:8], "little")
        expected = json.loads(data[8 : 8 + size])["__metadata__"]["sha256"]
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptCacheError(f"{store.path(name)} is damaged. Delete it.") from error
    if hash_bytes(save_tensors(found)) != expected:
        raise CorruptCacheError(f"{store.path(name)} is damaged. Delete it.")
    return found
