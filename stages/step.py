"""Stage two, a step: of one tuning or several, in one process or a team of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from sherl_pipe.cache import NonFiniteError
from sherl_pipe.stages.features import Batch
from sherl_pipe.stages.team import Team
from torch import Tensor

if TYPE_CHECKING:
    from sherl_pipe.stages.tune import Tuner


def losses(tuners: Sequence[Tuner], batches: Sequence[Batch]) -> list[Tensor]:
    """Mean loss of each tuning's training batch; the late blocks run once for all of them.

    The tunings have one backbone, method, depth of the late route and precision.
    """
    routes = [tuner.route for tuner in tuners]
    streams = [batch.streams for batch in batches]
    with tuners[0].autocast():
        fused = []
        for tuner, own in zip(tuners, streams, strict=True):
            with tuner.randomness.own():
                fused.append(tuner.route.fuse(own))
        hidden = routes[0].hidden(routes, fused, streams)
        return [
            tuner.loss_of(states, batch.rows)
            for tuner, states, batch in zip(tuners, hidden, batches, strict=True)
        ]


def train_step(
    tuners: Sequence[Tuner],
    batches: Sequence[Batch | None],
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    total: int,
    team: Team | None = None,
    shares: Sequence[float] = (),
) -> list[NonFiniteError | None]:
    """Take step `step` of `total` of several tunings (see `losses`), each on its own batch.

    On the CPU one after another, so that each is bit for bit what it is alone: larger products
    are no faster there. On CUDA together, equal up to the rounding of sums in another order.

    Args:
        tuners, batches, optimizers: of each tuning; None for a batch of which a team's other
            members have all rows.
        step, total: as for the schedule.
        team: of processes that take the step together, `batches` being this one's parts.
        shares: of each tuning's whole batch, what its part holds of what the loss is a mean over.

    Returns for each tuning the error that ends it, if its gradient is no number; no other tuning
    is touched by that.
    """
    weights = shares or [1.0] * len(tuners)
    whole = list(zip(tuners, batches, weights, strict=True))
    held = [(tuner, batch, share) for tuner, batch, share in whole if batch is not None]
    if tuners[0].task.backbone.device.type == "cpu":
        for tuner, batch, share in held:
            (tuner.loss(batch) * share).backward()
    elif held:
        found = losses([tuner for tuner, _, _ in held], [batch for _, batch, _ in held])
        own = [loss * share for loss, (_, _, share) in zip(found, held, strict=True)]
        torch.stack(own).sum().backward()
    if team is not None:
        team.add_up([each for tuner in tuners for each in tuner.parameters.values()])
    errors: list[NonFiniteError | None] = []
    for tuner, optimizer in zip(tuners, optimizers, strict=True):
        try:
            tuner.update(optimizer, step, total)
            errors.append(None)
        except NonFiniteError as error:
            errors.append(error)
        # Now, so that the next batch takes their place.
        optimizer.zero_grad(set_to_none=True)
    return errors
