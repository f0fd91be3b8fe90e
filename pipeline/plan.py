"""Arithmetic of a plan: what was counted and measured, made into sizes, times and a verdict.

Pure: no files, no clocks, no models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sherl_pipe.stages.amounts import Amount, StepSample, StreamSample, TaskAmount


@dataclass(frozen=True)
class Measured:
    """What a plan is made from.

    Attributes:
        streams: that the extraction writes.
        samples: of some of them, one at least.
        tasks: that are to be tuned.
        steps: of some of them, one at least where there are tasks.
        other_bytes: of the cache beside its streams: labels, record, root.
        data_seconds: reading, hashing and tokenising the data.
    """

    streams: Sequence[Amount]
    samples: Sequence[StreamSample]
    tasks: Sequence[TaskAmount]
    steps: Sequence[StepSample]
    other_bytes: int
    data_seconds: float


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        codec: of the cache.
        epochs: of every tuning.
        tunings: how many, spread evenly over the tasks.
        budget: bytes of memory for features; larger ones are streamed.
        free_bytes: on the cache's disk; None where nobody knows of a limit.
    """

    codec: str
    epochs: int
    tunings: int
    budget: int
    free_bytes: int | None

    def fits(self, size: int | None) -> bool:
        """Whether a cache of `size` bytes has room; None for one that cannot be."""
        return size is not None and (self.free_bytes is None or size <= self.free_bytes)


@dataclass(frozen=True)
class TaskPlan:
    """A tuning of one task.

    Attributes:
        amount: of an epoch.
        cached_seconds, live_seconds: of an epoch.
        forward_seconds: of the frozen forward in a live epoch.
        read_seconds: for bringing the features into memory: once, or in every epoch if `streamed`.
        start_seconds: for fitting the head that training starts from, once; live there is a
            frozen forward more.
        streamed: whether the features are larger than the budget.
        measured: whether steps of this very task were timed.
    """

    amount: TaskAmount
    cached_seconds: float
    live_seconds: float
    forward_seconds: float
    read_seconds: float
    start_seconds: float
    streamed: bool
    measured: bool


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
        sizes: bytes on disk by codec; None where a codec cannot hold the values.
        values: numbers that are stored.
        extraction_seconds: of the whole of it.
        tasks: one tuning of each.
        cached_seconds, live_seconds: of an epoch, the mean over the tasks; None without tasks.
        cached_total, live_total: seconds of all that is planned, extraction included.
        break_even: epochs of every tuning after which caching is ahead; None for never.
        fits: whether the disk holds it.
        verdict: `cache`, `too few epochs`, `never`, `no tasks` or `no space`.
        sentence: the same for people.
    """

    sizes: Mapping[str, int | None]
    values: int
    extraction_seconds: float
    tasks: Sequence[TaskPlan]
    cached_seconds: float | None
    live_seconds: float | None
    cached_total: float | None
    live_total: float | None
    break_even: float | None
    fits: bool
    verdict: str
    sentence: str


def make_plan(found: Measured, wanted: Wanted) -> Plan:
    """Sizes, times and verdict of what is wanted."""
    codecs = sorted({name for sample in found.samples for name in sample.sizes})
    sizes = {name: cache_bytes(found, name) for name in codecs}
    # The smallest first.
    sizes = dict(sorted(sizes.items(), key=lambda each: (each[1] is None, each[1] or 0)))
    size = sizes[wanted.codec]
    fits = wanted.fits(size)
    extraction = extraction_seconds(found)
    tasks = [task_plan(each, found.steps, wanted.budget) for each in found.tasks]
    cached = live = cached_total = live_total = even = None
    if tasks:
        cached = sum(each.cached_seconds for each in tasks) / len(tasks)
        live = sum(each.live_seconds for each in tasks) / len(tasks)
        once = sum(each.read_seconds for each in tasks if not each.streamed) / len(tasks)
        starts = [each for each in tasks if each.start_seconds]
        once += sum(each.start_seconds for each in starts) / len(tasks)
        live_once = sum(each.start_seconds + each.forward_seconds for each in starts) / len(tasks)
        cached_total = extraction + wanted.tunings * (once + wanted.epochs * cached)
        live_total = wanted.tunings * (live_once + wanted.epochs * live)
        even = break_even(extraction, once - live_once, cached, live, wanted.tunings)
    verdict, sentence = _verdict(wanted, size or 0, fits, tasks, extraction, even)
    return Plan(
        sizes,
        sum(each.values for each in found.streams),
        extraction,
        tasks,
        cached,
        live,
        cached_total,
        live_total,
        even,
        fits,
        verdict,
        sentence,
    )


def cache_bytes(found: Measured, codec: str) -> int | None:
    """Bytes of a whole cache; None where the codec cannot hold the values."""
    sizes = [stream_bytes(amount, found.samples, codec) for amount in found.streams]
    known = [size for size in sizes if size is not None]
    return None if len(known) < len(sizes) else found.other_bytes + sum(known)


def stream_bytes(amount: Amount, samples: Sequence[StreamSample], codec: str) -> int | None:
    """Bytes of one stream, scaled up from its own sample, else from those of its kind."""
    kin = _kin(amount, samples)
    sizes = [size for sample in kin if (size := sample.sizes.get(codec)) is not None]
    if len(sizes) < len(kin):
        return None
    fixed = sum(size.fixed for size in sizes) / len(kin)
    values = max(1, sum(sample.amount.values for sample in kin))
    examples = max(1, sum(sample.amount.examples for sample in kin))
    features = sum(size.features for size in sizes) * amount.values / values
    tables = sum(size.tables for size in sizes) * amount.examples / examples
    return round(fixed + features + tables)


def extraction_seconds(found: Measured) -> float:
    """Seconds from the first look at the data to the last manifest."""
    total = found.data_seconds
    fixed = sum(sample.fixed_seconds for sample in found.samples) / len(found.samples)
    for amount in found.streams:
        kin = [s for s in found.samples if s.amount.main == amount.main] or found.samples
        padded = max(1, sum(sample.amount.padded for sample in kin))
        values = max(1, sum(sample.amount.values for sample in kin))
        compute = sum(sample.compute_seconds for sample in kin) * amount.padded / padded
        commit = sum(sample.commit_seconds for sample in kin) * amount.values / values
        total += fixed + pipelined(compute, commit, amount.shards)
    return total


def pipelined(compute: float, commit: float, shards: int) -> float:
    """Seconds of a stream whose shards are committed while the next ones are computed.

    The first shard's computation and the last one's commit have nothing beside them.
    """
    return max(compute, commit) + min(compute, commit) / max(1, shards)


def task_plan(amount: TaskAmount, steps: Sequence[StepSample], budget: int) -> TaskPlan:
    """An epoch of a task, scaled from its own steps, else from those of all tasks."""
    own = [each for each in steps if each.task == amount.task]
    used = own or steps
    scale = amount.tokens / max(1, sum(each.tokens for each in used))
    held = amount.held_tokens / max(1, sum(each.loaded_tokens for each in used))
    cached = sum(each.cached_seconds for each in used) * scale
    read = sum(each.load_seconds for each in used) * held
    # How often a fit looks at the rows hardly depends on how many there are.
    fit = sum(each.fit_seconds for each in used) * amount.rows
    fit /= max(1, sum(each.rows for each in used))
    streamed = sum(each.loaded_bytes for each in used) * held > budget
    return TaskPlan(
        amount,
        # The next features are read while a step runs.
        max(cached, read) if streamed else cached,
        sum(each.live_seconds for each in used) * scale,
        sum(each.forward_seconds for each in used) * scale,
        read,
        sum(each.start_seconds for each in used) * scale + fit,
        streamed,
        bool(own),
    )


def break_even(
    extraction: float, once: float, cached: float, live: float, tunings: int
) -> float | None:
    """Epochs of every tuning after which a cache has paid; None for never.

    Args:
        extraction: seconds, paid once.
        once: seconds that every tuning pays more from the cache than live.
        cached, live: seconds of an epoch.
        tunings: how many share the cache.
    """
    saved = live - cached
    return max(0.0, extraction / max(1, tunings) + once) / saved if saved > 0 else None


def in_words(seconds: float) -> str:
    """`0.42 s`, `8.1 s`, `95 s`, `2.7 min`, `12 min`, `3.4 h`."""
    for size, unit in ((1, "s"), (60, "min")):
        if seconds < 120 * size:
            number = seconds / size
            return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"


def _kin(amount: Amount, samples: Sequence[StreamSample]) -> Sequence[StreamSample]:
    """The samples that a stream is like."""
    own = [
        sample
        for sample in samples
        if (sample.amount.split, sample.amount.stream) == (amount.split, amount.stream)
    ]
    return own or [s for s in samples if s.amount.main == amount.main] or samples


def _verdict(
    wanted: Wanted,
    size: int,
    fits: bool,
    tasks: Sequence[TaskPlan],
    extraction: float,
    even: float | None,
) -> tuple[str, str]:
    if not fits:
        return "no space", (
            f"does not fit: about {size:,} bytes with {wanted.codec}, "
            f"{wanted.free_bytes or 0:,} are free"
        )
    if not tasks:
        return "no tasks", "no task has labels to tune on, so nothing can be said of epochs"
    cached = sum(each.cached_seconds for each in tasks) / len(tasks)
    live = sum(each.live_seconds for each in tasks) / len(tasks)
    each_way = f"an epoch takes {in_words(cached)} from the cache, {in_words(live)} live"
    if even is None:
        forward = sum(each.forward_seconds for each in tasks) / len(tasks)
        instead = cached - (live - forward)
        return "never", (
            f"do not cache: {each_way}. Getting the features costs {in_words(instead)}, computing "
            f"them {in_words(forward)}"
        )
    pays = f"caching pays after {even:.1f} epochs"
    costs = f"extraction {in_words(extraction)}; {each_way}"
    if even > wanted.epochs:
        return "too few epochs", f"do not cache for {wanted.epochs} epochs: {pays} only ({costs})"
    return "cache", f"{pays} ({costs})"
