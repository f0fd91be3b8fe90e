"""UniPT's parallel interaction of reduced taps (Diao et al., CVPR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def parallel_interaction(
    targets: Tensor,
    anchor: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    mask: Tensor | None = None,
) -> Tensor:
    """What the anchor finds in the targets, as far as each is trusted (SPEC 6.1).

    Of target t, token i takes m_i = t_i + sum_j a_ij t_j with a_i = relu(z_i . t_j) / (sum + e)
    over the example's tokens j. The targets' m are summed with shares that are a softmax of
    w . (mean z * mean t) + b, means being those of the example's tokens.

    Args:
        targets: t, `[M, B, S, h]`.
        anchor: z, `[B, S, h]`.
        weight: w, `[h]`.
        bias: b, `[]`.
        epsilon: e.
        mask: `[B, S]`, 1 or True where there is a token; all of them by default.

    Returns `[B, S, h]`, also for padded places: their own states alone, which nobody else sees.
    """
    taps, batch, size, _ = targets.shape
    if mask is None:
        keys, target_mean, anchor_mean = targets, targets.mean(2), anchor.mean(1)
    else:
        marks = mask.to(targets.dtype).unsqueeze(-1)
        tokens = marks.sum(1).clamp(min=1)
        keys = targets * marks  # a score of nothing is 0, and so is its weight
        target_mean, anchor_mean = keys.sum(2) / tokens, (anchor * marks).sum(1) / tokens
    shares = ((target_mean * anchor_mean) @ weight + bias).softmax(0)  # [M, B]
    # The keys of all targets side by side: one product scores them, and one more sums them.
    keys = keys.transpose(0, 1).flatten(1, 2)
    scores = F.relu(anchor @ keys.transpose(1, 2)).view(batch, size, taps, size)
    scale = shares.t().unsqueeze(1) / (scores.sum(-1) + epsilon)
    found = (scores * scale.unsqueeze(-1)).flatten(2) @ keys
    return found + (shares[:, :, None, None] * targets).sum(0)


def causal_interaction(
    reduced: Tensor,
    seen: Tensor,
    memory: Tensor,
    inside: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
) -> Tensor:
    """What the positions of a decoder find in their past and in a memory.

    The parallel interaction, generalised: a position looks through the targets, and its means are
    taken, over the positions that it sees alone. The memory is one more target, of which it has no
    state of its own: m_p = sum_s a_ps n_s.

    Args:
        reduced: targets, and last the anchor, `[M + 1, B, Q, h]`.
        seen: `[B, P, Q]`, or `[1, P, Q]` for all examples, 1 where one of the last P positions sees
            one of Q; itself always.
        memory: n, `[B, S, h]`.
        inside: `[B, S]`, 1 where the memory has a token.
        weight, bias, epsilon: as for `parallel_interaction`.

    Returns `[B, P, h]`.
    """
    asked, targets = seen.shape[1], reduced[:-1]
    anchor = reduced[-1, :, -asked:]  # [B, P, h]
    means = seen @ reduced / seen.sum(-1, keepdim=True).clamp(min=1)
    marks = inside.unsqueeze(-1)
    keys = memory * marks
    memory_mean = keys.sum(1, keepdim=True) / marks.sum(1, keepdim=True)  # [B, 1, h]
    of_targets = (means[:-1] * means[-1]) @ weight
    of_memory = (memory_mean * means[-1]) @ weight
    shares = (torch.cat([of_targets, of_memory.unsqueeze(0)]) + bias).softmax(0).unsqueeze(-1)

    def found(scores: Tensor, rows: Tensor) -> Tensor:
        scores = F.relu(scores)
        return (scores / (scores.sum(-1, keepdim=True) + epsilon)) @ rows

    past = found(anchor @ targets.transpose(-1, -2) * seen, targets) + targets[:, :, -asked:]
    return (shares[:-1] * past).sum(0) + shares[-1] * found(anchor @ keys.transpose(1, 2), keys)
