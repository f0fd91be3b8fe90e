"""T5's attention for few queries, with the products spared that make no difference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FewQueries(nn.Module):
    """Stands where a T5 cross-attention was and gives what that gives, up to rounding.

    A label word asks a memory of S states a question of P positions, P being one or two. Keys and
    values of the whole memory, which cost 2 S d^2 products forward and as many backward, are most
    of the late route then. A query's product with a key, q . (W_k m), is (W_k^T q) . m, and a
    weighted sum of values, sum a (W_v m), is W_v (sum a m): so each head's matrix is applied to
    its P queries and answers instead, P (d^2 + S d heads) twice. Where that is not less, and where
    there is a KV cache, the model's own attention runs.

    Args:
        attention: the model's own `T5Attention`; its weights are shared.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`[B, P, d]` of queries `[B, P, d]` and a memory `[B, S, d]`, as `T5Attention` has it."""
        own, memory = self.attention, key_value_states
        if memory is None or past_key_values is not None or not self._pays(hidden_states, memory):
            found: tuple[Tensor, Tensor | None, Tensor | None] = own(
                hidden_states,
                mask=mask,
                key_value_states=memory,
                position_bias=position_bias,
                past_key_values=past_key_values,
                **rest,
            )
            return found
        size, positions, width = hidden_states.shape
        heads, narrow = own.n_heads, own.key_value_proj_dim

        def by_head(weight: Tensor) -> Tensor:
            return weight.view(heads, narrow, width)

        def head_first(rows: Tensor) -> Tensor:  # [B, H P, x] -> [H, B P, x]
            rows = rows.view(size, heads, positions, -1)
            return rows.transpose(0, 1).reshape(heads, size * positions, -1)

        def batch_first(rows: Tensor) -> Tensor:  # [H, B P, x] -> [B, H P, x]
            rows = rows.view(heads, size, positions, -1)
            return rows.transpose(0, 1).reshape(size, heads * positions, -1)

        queries = own.q(hidden_states).view(size * positions, heads, narrow).transpose(0, 1)
        scores = batch_first(queries @ by_head(own.k.weight)) @ memory.transpose(1, 2)
        scores = scores.view(size, heads, positions, -1)
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores = scores + mask
        shares = scores.float().softmax(-1).to(scores.dtype).flatten(1, 2)
        answers = head_first(shares @ memory) @ by_head(own.v.weight).transpose(1, 2)
        answers = answers.view(heads, size, positions, narrow).permute(1, 2, 0, 3)
        out: Tensor = own.o(answers.reshape(size, positions, heads * narrow))
        return out, position_bias, None

    def _pays(self, queries: Tensor, memory: Tensor) -> bool:
        heads, inner = self.attention.n_heads, self.attention.inner_dim
        length = memory.shape[1]
        return bool(queries.shape[1] * (inner + heads * length) < length * inner)


class LonePosition(nn.Module):
    """Stands where a T5 self-attention was and gives what that gives.

    One position attends to itself alone, with a share of one whatever queries, keys and position
    bias are; so of one position only the value goes on. Several positions, and those with a KV
    cache, get the model's own attention.

    Args:
        attention: the model's own `T5Attention`; its weights are shared.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: Tensor, *, past_key_values: Any = None, **rest: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`[B, P, d]` of states `[B, P, d]`, as `T5Attention` has it."""
        if hidden_states.shape[1] > 1 or past_key_values is not None:
            found: tuple[Tensor, Tensor | None, Tensor | None] = self.attention(
                hidden_states, past_key_values=past_key_values, **rest
            )
            return found
        alone: Tensor = self.attention.o(self.attention.v(hidden_states))
        return alone, rest.get("position_bias"), None
