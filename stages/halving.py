"""Which tunings of a sweep are stopped early: asynchronous successive halving.

The rule is that of Li et al., "A System for Massively Parallel Hyperparameter Tuning" (MLSys
2020), in the form that stops and never pauses: after `grace`, `grace * factor`, ... epochs a
tuning goes on if it is among the best 1/`factor` of those of its task that came so far before it
or with it. Scores and verdicts are files in one folder, so that any number of processes, with or
without Ray, decides together, nobody waits for anybody, and a verdict is never changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sherl_pipe.cache.errors import CorruptCacheError
from sherl_pipe.cache.store import LocalStore
from sherl_pipe.stages import checkpoint

if TYPE_CHECKING:
    from sherl_pipe.stages.tune import Tuner


@dataclass(frozen=True)
class Halted:
    """A tuning that was stopped early.

    Attributes:
        task, name: which; the name of its settings.
        epoch: epochs that it was trained.
        score: on the held-out rows then.
        seconds: spent on it.
    """

    task: str
    name: str
    epoch: int
    score: float
    seconds: float


@dataclass(frozen=True)
class Halving:
    """The rule, and where verdicts are kept.

    Attributes:
        folder: of the verdicts; shared by all processes.
        grace: epochs that every tuning gets.
        factor: one in so many goes on.
    """

    folder: Path
    grace: int = 1
    factor: int = 3

    def rungs(self, epochs: int) -> list[int]:
        """Numbers of epochs after which is decided; all below `epochs`."""
        found, rung = [], self.grace
        while rung < epochs:
            found.append(rung)
            rung *= self.factor
        return found

    def kept(self, tuner: Tuner, epoch: int) -> bool:
        """Whether it was decided before that the tuning goes on after so many epochs."""
        entry = self._read(self._place(tuner, epoch))
        return entry is not None and entry["keep"] is True

    def halted(self, tuner: Tuner) -> Halted | None:
        """What is known of a tuning that was stopped before."""
        for epoch in self.rungs(tuner.settings.epochs):
            entry = self._read(self._place(tuner, epoch))
            if entry is not None and entry["keep"] is False:
                return Halted(**entry["at"])
        return None

    def enter(
        self, entries: Sequence[tuple[Tuner, float, float]], epoch: int
    ) -> list[Halted | None]:
        """Decide about tunings that come to a rung together.

        Args:
            entries: each with its score and the seconds spent on it.
            epoch: the rung.

        Returns for each None if it goes on. Raises StorageError.
        """
        places, found = [], []
        for tuner, score, seconds in entries:
            at = Halted(tuner.task.name, tuner.settings.name, epoch, score, seconds)
            places.append(self._place(tuner, epoch))
            found.append(at)
            self._write(places[-1], {"at": asdict(at), "keep": None})
        verdicts: list[Halted | None] = []
        for (tuner, score, _), path, at in zip(entries, places, found, strict=True):
            known = [self._read(each) for each in path.parent.glob("*.json")]
            scores = [float(entry["at"]["score"]) for entry in known if entry is not None]
            keep = sum(other > score for other in scores) < math.ceil(len(scores) / self.factor)
            self._write(path, {"at": asdict(at), "keep": keep})
            verdicts.append(None if keep else at)
            if not keep:
                LocalStore(tuner.folder).delete(checkpoint.NAME)
        return verdicts

    def _place(self, tuner: Tuner, epoch: int) -> Path:
        # Scores on other rows, labels or features are no company.
        about = f"{tuner.task.name}-{tuner.task.key[:12]}-{self.grace}-{self.factor}"
        return self.folder / about / str(epoch) / f"{tuner.settings.name}.json"

    def _write(self, path: Path, entry: Any) -> None:
        LocalStore(path.parent).replace(path.name, json.dumps(entry).encode())

    def _read(self, path: Path) -> Any:
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptCacheError(f"{path} is damaged. Delete it.") from error
