"""Random states that do not disturb one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Randomness:
    """A tuning's own random state, whatever is trained beside it."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(self._devices):
            torch.manual_seed(seed)
            self.state = self._now()

    def restart(self, *numbers: int) -> None:
        """Go on from a state that is made from numbers alone."""
        (seed,) = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
        # Seeds are signed there.
        self.state = Randomness(int(seed >> 1), self._device).state

    @contextmanager
    def own(self) -> Iterator[None]:
        """Torch draws from this state inside."""
        outer = self._now()
        self._set(self.state)
        try:
            yield
        finally:
            self.state = self._now()
            self._set(outer)

    def _now(self) -> Tensor:
        states = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._devices)]
        return torch.cat(states)

    def _set(self, state: Tensor) -> None:
        size = len(torch.get_rng_state())
        torch.set_rng_state(state[:size])
        for device in self._devices:
            torch.cuda.set_rng_state(state[size:], device)
