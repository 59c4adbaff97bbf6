"""What `torch.compile` sees of a `FoldedCache`: one operator a layer, which plans when it runs.

A compiled pass is traced without handles, lengths or pages: whatever would change from step to step
stays behind two operators, so that nothing is compiled anew as the cache grows. Both find their
cache by a number in a tensor, so that a new cache needs no new graph either.

    model.forward = torch.compile(model.forward, fullgraph=True)
    with kvfold.fused(model):
        model.generate(**inputs, past_key_values=kvfold.FoldedCache(model, "fisher2"))
"""

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from kvfold.attention import dispatch
from kvfold.cache.timeline import CacheError
from kvfold.integrations.describe import UnsupportedError

if TYPE_CHECKING:
    from kvfold.integrations.transformers import FoldedCache, FoldedLayer

_CACHES: "weakref.WeakValueDictionary[int, FoldedCache]" = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
#: key length that a traced pass gives to masks: the operator takes the mask of the rows' padding.
ROWS_ONLY = -1


class Route:
    """While a pass is traced: the layer whose attention comes next, as (its cache's key, index)."""

    def __init__(self) -> None:
        self.pending: tuple[Tensor, int] | None = None


ROUTE = Route()


def key_of(cache: "FoldedCache") -> Tensor:
    """`[1]` int64 on the CPU by which the operators find a cache."""
    number = next(_NUMBERS)
    _CACHES[number] = cache
    return torch.tensor([number])


def _cache_of(key: Tensor) -> "FoldedCache":
    cache = _CACHES.get(int(key))
    if cache is None:
        raise CacheError("the FoldedCache of this compiled pass is gone")
    return cache


def traced(layer: "FoldedLayer", keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What a traced pass gets from a layer: its own keys and values, which attention appends."""
    _check(layer)
    ROUTE.pending = layer.found_by, layer.info.index
    return keys, values


def mask_sizes(layer: "FoldedLayer") -> tuple[int, int]:
    """Key length and offset of a traced pass's mask."""
    _check(layer)
    return ROWS_ONLY, 0


def _check(layer: "FoldedLayer") -> None:
    """Raise `UnsupportedError` where the model's attention, which the trace calls, is not ours."""
    chosen = layer.attention_config._attn_implementation
    if chosen != "kvfold" or ROUTE.pending is not None:
        raise UnsupportedError(
            "a pass with a FoldedCache is compiled inside `with kvfold.fused(model):`, which makes "
            f"kvfold's attention the model's; it is {chosen!r}"
        )


@torch.library.custom_op("kvfold::slots", mutates_args=("key",))
def slots(key: Tensor) -> Tensor:
    """Slots that a cache holds, as a number on the CPU; `key` is named as changed to keep order."""
    return torch.tensor(_cache_of(key).timeline.slots)


@slots.register_fake
def _(key: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("kvfold::attend", mutates_args=("key",))
def attend(
    key: Tensor,
    layer: int,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Append a layer's keys and values and attend: `[rows, query_heads, queries, value_dim]`.

    Args:
        key: of the cache (`key_of`).
        layer: index of the layer; the first one begins the pass, the last one ends it.
        query: `[rows, query_heads, queries, key_dim]` after RoPE.
        keys: `[rows, kv_heads, queries, key_dim]` after RoPE.
        values: `[rows, kv_heads, queries, value_dim]`.
        mask: `[rows, slots]` which slots are tokens, as the model was given it.
        positions: `[rows or 1, queries]`.
        scaling: of the scores; None for key_dim^-0.5.
        softcap: of the scores.
        sink_logits: `[query_heads]`.
    """
    cache = _cache_of(key)
    hooks, layers = cache._hooks, cache.folded_layers
    assert hooks is not None
    try:
        if layer == layers[0].info.index:
            if len(layers) != len(cache.layers):
                raise UnsupportedError(
                    "torch.compile needs a cache whose layers are all compressed; this one keeps "
                    f"{len(cache.layers) - len(layers)} of {len(cache.layers)} in transformers' "
                    "own classes, whose lengths are Python numbers"
                )
            hooks.begin(cache, keys.shape[0], keys.shape[2], mask, positions)
        step, handles = cache.step, cache.layers[layer].update(keys, values)
        assert step is not None
        if step.is_first:
            valid = None if mask is None else mask.bool()
            out = _fresh(query, keys, values, valid, scaling, softcap, sink_logits)
        else:
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            out = dispatch.attend(
                query,
                handles[0].view_of,
                scaling=scale,
                softcap=softcap,
                sink_logits=sink_logits,
                say=cache.notices.say,
            ).to(query.dtype)
    except BaseException:
        hooks.end(failed=True)
        raise
    if layer == layers[-1].info.index:
        hooks.end(failed=False)
    return out.contiguous()


@attend.register_fake
def _(key: Tensor, layer: int, query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return query.new_empty((*query.shape[:3], values.shape[3]))


def _fresh(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    valid: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Causal attention of a batch's first pass, on keys and values as they are."""
    queries = query.shape[2]
    seen = torch.ones(queries, queries, dtype=torch.bool, device=query.device).tril()
    if valid is not None:
        # padding sees itself: a softmax over nothing is not a number
        seen = (seen & valid[:, None, None]) | torch.eye(queries, device=seen.device).bool()
    if softcap is None and sink_logits is None:
        mask = None if valid is None else seen
        return F.scaled_dot_product_attention(
            query, keys, values, mask, 0.0, mask is None, scale=scaling, enable_gqa=True
        )
    group = query.shape[1] // keys.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ keys.repeat_interleave(group, 1).mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sink_logits is not None:
        sinks = sink_logits.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks.to(scores.dtype)), -1)
    weights = scores.float().softmax(-1)[..., : keys.shape[2]].to(query.dtype)
    return weights @ values.repeat_interleave(group, 1)


def mask_of_rows(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask for kvfold's attention: as SDPA takes it, or the rows' padding for a traced pass."""
    if kwargs.get("kv_length") != ROWS_ONLY:
        return sdpa_mask(*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise UnsupportedError(
            "attention masks beyond plain causal ones are not supported on packed pages"
        )
    return kwargs.get("attention_mask")
