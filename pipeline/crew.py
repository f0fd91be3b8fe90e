"""A crew of workers for stage one: who does which shard, and what happens when one dies.

Knows nothing of Ray: an engine starts workers, calls them and says what became of a call.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from sherl_pipe.cache import WorkerError
from sherl_pipe.cache.place import Place
from sherl_pipe.pipeline.actor import Setup, ShardActor
from sherl_pipe.stages.shards import Done, Lost, ShardJob

# A shard that has killed so many workers is given up, and so is a place where as many died idle.
STRIKES = 3
# Shards that a worker with a GPU commits while it computes the next one, at most: compressing on
# one processor is slower than many a GPU, and each shard takes memory.
MOST_COMMITS = 8
# A cluster that gives room to no worker for so long is not waited for.
PLACE_SECONDS = 120.0


class WorkerDiedError(Exception):
    """A worker ended before it answered."""


class Engine(Protocol):
    """What starts workers and calls them; `sherl_pipe.pipeline.workers` is one."""

    def hire(self, kind: type, cpus: int, gpus: int, calls: int) -> Any:
        """A new worker, an object of `kind` somewhere that works on so many calls at a time; given
        at once, whether there is room or not."""

    def call(self, worker: Any, method: str, *arguments: Any) -> Hashable:
        """Begin a call."""

    def first_done(self, calls: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those of some calls that are over, once there are any or the time is."""

    def result(self, call: Any) -> Any:
        """What a call gave. Raises what it raised; WorkerDiedError."""

    def dismiss(self, worker: Any) -> None:
        """End a worker, whatever it does."""


@dataclass
class _Member:
    """A worker as the driver sees it.

    Attributes:
        state: `placing`, `loading` or `ready`.
        calls: under way, with the shard of each; None for the call that gets it ready.
        alone: whether it has a shard that is suspected, and gets no other.
        failures: times in a row that a worker in this place died without a shard.
    """

    worker: Any
    state: str = "placing"
    calls: dict[Any, int | None] = field(default_factory=dict)
    alone: bool = False
    failures: int = 0


class Workers:
    """A `Crew` of workers that an engine runs.

    A worker that dies is replaced. The shards that it had are suspected, and each is tried again on
    a worker that has nothing else, so that it is known which of them kills.

    Args:
        engine: runs the workers.
        setup: for each.
        size: how many.
        cpus, gpus: that each gets.
        kind: what they are.
    """

    def __init__(
        self,
        engine: Engine,
        setup: Setup,
        *,
        size: int,
        cpus: int,
        gpus: int,
        kind: type = ShardActor,
    ) -> None:
        self._engine, self._setup, self._kind = engine, setup, kind
        self._cpus, self._gpus = cpus, gpus
        # Shards are committed while the device computes the next one; a worker that computes on
        # its processor has none to spare.
        self._depth = 1 + max(1, min(cpus, MOST_COMMITS)) if gpus else 1
        self._members = [self._hire() for _ in range(size)]
        self._since = time.monotonic()

    def work(
        self, shards: Sequence[int], job: Callable[[int], ShardJob], told: Callable[[Done], None]
    ) -> list[Lost]:
        """As `Crew.work`."""
        queue, suspects = deque(shards), deque[int]()
        strikes, lost = Counter[int](), list[Lost]()
        while True:
            self._deal(queue, suspects, job)
            running = any(shard is not None for m in self._members for shard in m.calls.values())
            if not (queue or suspects or running):
                return lost
            for member, call in self._over():
                shard = member.calls[call]
                try:
                    answer = self._engine.result(call)
                except WorkerDiedError as error:
                    for suspect in self._replace(member, str(error)):
                        strikes[suspect] += 1
                        if strikes[suspect] < STRIKES:
                            suspects.append(suspect)
                        else:
                            lost.append(Lost(job(suspect), str(error)))
                    break  # the member's other calls went with it
                del member.calls[call]
                if shard is None:
                    self._go_on(member)
                else:
                    member.alone, member.failures = False, 0
                    told(answer)

    def close(self) -> None:
        """End all workers."""
        while self._members:
            self._engine.dismiss(self._members.pop().worker)

    def _hire(self, failures: int = 0) -> _Member:
        worker = self._engine.hire(self._kind, self._cpus, self._gpus, self._depth)
        member = _Member(worker, failures=failures)
        member.calls[self._engine.call(worker, "place")] = None
        return member

    def _go_on(self, member: _Member) -> None:
        """The next step of a worker that is not ready yet."""
        if member.state == "placing":
            member.state = "loading"
            member.calls[self._engine.call(member.worker, "load", self._setup)] = None
        else:
            member.state = "ready"

    def _deal(
        self, queue: deque[int], suspects: deque[int], job: Callable[[int], ShardJob]
    ) -> None:
        """Give shards to workers that are ready: to idle ones first, suspects to these alone."""
        ready = [member for member in self._members if member.state == "ready"]
        for depth in range(self._depth):
            for member in ready:
                if member.alone or len(member.calls) != depth:
                    continue
                if suspects and not depth:
                    member.alone, shard = True, suspects.popleft()
                elif queue and (not depth or len(queue) >= len(ready)):
                    shard = queue.popleft()
                else:
                    continue
                call = self._engine.call(member.worker, "run", job(shard))
                member.calls[call] = shard

    def _over(self) -> Iterator[tuple[_Member, Any]]:
        """Calls that are over; waits for some, not for ever where no worker finds a place."""
        of = {call: member for member in self._members for call in member.calls}
        done = self._engine.first_done(list(of), 1.0)
        if done or any(member.state != "placing" for member in self._members):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > PLACE_SECONDS:
            what = "GPU" if self._gpus else "processors"
            raise WorkerError(
                f"no worker found room on the Ray cluster for {PLACE_SECONDS:.0f} s: each needs "
                f"{self._gpus or self._cpus} {what} of one machine. `ray status` shows what is "
                "free. Ask for fewer --workers, or wait, then run the same command again."
            )
        return ((of[call], call) for call in done)

    def _replace(self, member: _Member, reason: str) -> list[int]:
        """Put a new worker where one died; the shards that it had.

        Raises WorkerError where no place is left.
        """
        self._engine.dismiss(member.worker)
        had = [shard for shard in member.calls.values() if shard is not None]
        failures = 0 if had else member.failures + 1
        place = self._members.index(member)
        if failures < STRIKES:
            self._members[place] = self._hire(failures)
            return had
        del self._members[place]
        if not self._members:
            raise WorkerError(
                f"every worker died before its first shard, {STRIKES} times in each place. The "
                f"last one: {reason} Check the memory of the machines and Ray's logs, then run "
                "the same command again."
            )
        return had


@contextmanager
def employed(engine: Engine, setup: Setup, **options: Any) -> Iterator[Workers]:
    """Workers that end with the block; options as those of `Workers`."""
    crew = Workers(engine, setup, **options)
    try:
        yield crew
    finally:
        crew.close()


def lost_error(lost: Sequence[Lost], path: Place) -> WorkerError:
    """The error at the end of a run in which shards were given up."""
    shards = "; ".join(
        f"{each.job.name}, with examples {', '.join(one.hex() for one in each.job.ids)} (the last "
        f"worker: {each.reason})"
        for each in lost
    )
    return WorkerError(
        f"{path}: {len(lost)} {'shard' if len(lost) == 1 else 'shards'} killed {STRIKES} workers "
        f"each and {'was' if len(lost) == 1 else 'were'} given up: {shards}. Everything else is "
        "committed. Remove the example that does it, or give workers more memory, and run the same "
        "command again."
    )
