"""Who runs stage one: this process, or workers on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from sherl_pipe.cache import CacheWriter
from sherl_pipe.cache.fence import admit
from sherl_pipe.pipeline.actor import Setup
from sherl_pipe.pipeline.config import RunConfig, model_from_root, place_from_root
from sherl_pipe.pipeline.console import Bars, say
from sherl_pipe.pipeline.crew import Engine, employed, lost_error
from sherl_pipe.pipeline.opening import Prepared
from sherl_pipe.stages.crew import CrewExtractor
from sherl_pipe.stages.extract import Extractor
from sherl_pipe.stages.inputs import pad_id
from sherl_pipe.stages.passes import tokens_in_batch

Employ = Callable[[Prepared, CacheWriter, Bars], AbstractContextManager[Extractor]]


@contextmanager
def staff_for(config: RunConfig) -> Iterator[Employ]:
    """What makes the extractor of a run. Ray is started, or joined, where workers are asked for.

    Raises InputError where Ray is not installed or has no room for so many, WorkerError where no
    cluster answers; the extractor's block ends with WorkerError for shards that were given up.
    """
    address, wanted = config.ray_address, config.extract.workers
    if wanted == "auto" and address is None:
        wanted = max(1, torch.cuda.device_count()) if config.device != "cpu" else 1
    if address is None and wanted in (None, 1):
        yield in_process
        return
    # Here and not above: most runs need no Ray, and it need not be installed.
    from sherl_pipe.pipeline import workers

    count = wanted if isinstance(wanted, int) else None
    with workers.connect(address, cpus=count) as machines:
        share = workers.share(machines, count, config.device)
        what = "a GPU" if share.gpus else f"{share.cpus} threads"
        say(f"extract: {share.workers} workers on {len(machines)} machines, {what} each")
        options = {"size": share.workers, "cpus": share.cpus, "gpus": share.gpus}
        yield partial(with_workers, workers, options)


def _settings(ready: Prepared, bars: Bars) -> dict[str, Any]:
    config = ready.config.extract
    return {
        "batch_tokens": config.batch_tokens,
        "shard_bytes": config.shard_mib << 20,
        "progress": bars,
        "announce": say,
    }


@contextmanager
def in_process(ready: Prepared, writer: CacheWriter, bars: Bars) -> Iterator[Extractor]:
    """This process alone."""
    yield Extractor(writer, ready.backbone, ready.tokenizer, **_settings(ready, bars))


@contextmanager
def with_workers(
    engine: Engine, options: dict[str, int], ready: Prepared, writer: CacheWriter, bars: Bars
) -> Iterator[Extractor]:
    """Workers that `engine` runs; `options` as those of `Workers`."""
    # Workers need not start in this folder.
    config, path = ready.config, place_from_root(ready.path)
    device = "cuda" if options["gpus"] else "cpu"
    setup = Setup(
        model=model_from_root(config.model),
        revision=ready.backbone.revision or config.revision,
        dtype=config.extract.dtype,
        device=device,
        threads=max(1, options["cpus"]),
        path=path,
        identity=writer.identity,
        token=admit(path),
        pad_id=pad_id(ready.tokenizer),
        batch_tokens=tokens_in_batch(
            config.extract.batch_tokens, ready.backbone.width, torch.device(device)
        ),
    )
    if not any(table.spec.kind == "text" for table in ready.tables):
        # Needed no more, the workers' copies want the memory; free-text targets are extracted here.
        ready.backbone.model.to("meta")
        torch.cuda.empty_cache()
    with employed(engine, setup, **options) as crew:
        extractor = CrewExtractor(
            writer, ready.backbone, ready.tokenizer, crew=crew, **_settings(ready, bars)
        )
        yield extractor
    if extractor.lost:
        raise lost_error(extractor.lost, path)
