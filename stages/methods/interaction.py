"""UniPT's parallel interaction of reduced taps (Diao et al., CVPR 2024)."""

from __future__ import annotations

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
