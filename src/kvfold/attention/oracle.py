"""The float32 oracle: softmax attention over decoded states; every fast path answers to it."""

import torch
from torch import Tensor

from kvfold.cache.store import View


def oracle(
    q: Tensor,
    view: View,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """What `kvfold.attention.paged.attend` computes, on decoded states, all at once, in float32."""
    keys, values = view.store.decoded(view, torch.float32)
    rows, query_heads, queries, _ = q.shape
    group = query_heads // keys.shape[1]
    slots = keys.shape[2]
    # padding and what is not held: behind every query
    token = torch.full((rows, slots), slots, device=q.device)
    for r in range(rows):
        place = view.store.slots_of(view.step, r)
        held = view.store.reads(view, r).nonzero()[:, 0]
        token[r, place[held].to(q.device)] = held.to(q.device)
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    s = q.float() @ keys.mT * scaling
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    seen = token[:, None, :] <= view.query_tokens[:, :, None]
    if view.store.sliding_window is not None:
        seen &= token[:, None, :] > view.query_tokens[:, :, None] - view.store.sliding_window
    s = s.masked_fill(~seen[:, None], -torch.inf)
    if sink_logits is not None:
        extra = sink_logits.float().view(1, -1, 1, 1).expand(rows, -1, queries, 1)
        s = torch.cat((s, extra), -1)
    p = s.softmax(-1)[..., :slots]
    return torch.where(view.query_tokens[:, None, :, None] >= 0, p @ values, 0.0)
