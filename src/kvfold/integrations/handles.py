"""Handles, and the attention functions that read them in place of keys and values.

A handle is a tensor without storage that knows the pages behind it. Two routes read its codes.
While a folded pass runs, the model's attention implementation is `"kvfold"` (registered with
transformers' `AttentionInterface`). Models and code beside that interface are met where they call
`F.scaled_dot_product_attention`, also after `repeat_kv`. Any other operator that touches a handle
gets the decoded states.
"""

import sys
import threading
import warnings
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface

from kvfold.attention.dispatch import attend
from kvfold.cache.store import View
from kvfold.cache.timeline import CacheError
from kvfold.integrations import compiled
from kvfold.integrations.compiled import ROUTE
from kvfold.integrations.describe import UnsupportedError

NAME = "kvfold"


class FoldedWarning(UserWarning):
    """A slow or decoding path was taken, or gradients were dropped; the message says which."""


class Notices:
    """What a cache says once, or refuses under `strict`."""

    def __init__(self, strict: bool) -> None:
        self.strict, self.said = strict, set()

    def say(self, topic: str, message: str) -> None:
        """Raise under `strict`, else warn the first time a topic comes up."""
        if self.strict:
            raise UnsupportedError(message + " (strict=True)")
        if topic not in self.said:
            self.said.add(topic)
            warnings.warn(message, FoldedWarning, stacklevel=3)


class FoldedStates(torch.Tensor):
    """Keys or values of a layer as a tensor without storage: `[rows, kv_heads, slots, head_dim]`.

    `kvfold`'s attention and `F.scaled_dot_product_attention` read the pages behind it; every other
    operator gets the decoded states, with one warning, or an error under `strict`.
    """

    view_of: View
    side: str
    memo: dict[str, Tensor]
    notices: Notices
    repeats: int  #: query heads that share a head of this shape, after `repeat_kv`

    @staticmethod
    def pair(view: View, notices: Notices) -> "tuple[FoldedStates, FoldedStates]":
        """The handles of a view's keys and values."""
        memo: dict[str, Tensor] = {}
        handles = []
        for side, states in (("key", view.keys), ("value", view.values)):
            slots = view.step.slots + view.step.queries
            shape = (*states.shape[:2], slots, states.shape[3])
            handle = FoldedStates._make(shape, states.dtype, states.device)
            handle.view_of, handle.side, handle.memo, handle.notices = view, side, memo, notices
            handle.repeats = 1
            handles.append(handle)
        return handles[0], handles[1]

    @staticmethod
    def _make(shape: Any, dtype: torch.dtype, device: torch.device) -> "FoldedStates":
        make = torch.Tensor._make_wrapper_subclass
        return make(FoldedStates, shape, dtype=dtype, device=device)  # type: ignore[return-value]

    def shaped(self, shape: tuple[int, ...], repeats: int) -> "FoldedStates":
        """The same pages in one of the shapes that `repeat_kv` goes through."""
        handle = FoldedStates._make(shape, self.dtype, self.device)
        handle.view_of, handle.side = self.view_of, self.side
        handle.memo, handle.notices, handle.repeats = self.memo, self.notices, repeats
        return handle

    def decoded(self) -> Tensor:
        """The states as an ordinary tensor, decoded once for both handles of a pass.

        Raises:
            CacheError: the cache was cropped, reordered or reset since the handle was made.
            UnsupportedError: pages were dropped: an attention that does not know which would give
                weight to their zeros.
        """
        if not self.memo:
            view = self.view_of
            if view.has_holes:
                raise UnsupportedError(
                    "keys and values were read as plain tensors, and pages were dropped (trim, "
                    "prune or max_bytes); only kvfold's own attention leaves their tokens out"
                )
            if view.step.generation != view.store.timeline.generation:
                raise CacheError(
                    "this handle is stale: the cache was cropped, reordered or reset since; read "
                    "cache.layers[i].keys again"
                )
            self.memo["key"], self.memo["value"] = view.store.decoded(view)
        states = self.memo[self.side]
        if self.shape == states.shape:
            return states
        rows, heads, slots, dim = states.shape
        grown = states[:, :, None].expand(rows, heads, self.repeats, slots, dim)
        return grown.contiguous().view(self.shape)  # in memory as the handle says it is

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Meet attention and the operators of `repeat_kv` before they become single operators."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            meet = _MET.get(func)
            found = NotImplemented if meet is None else meet(*args, **kwargs)
            return func(*args, **kwargs) if found is NotImplemented else found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Decode, then run the operator on ordinary tensors."""

        def plain(x: Any) -> Any:
            if isinstance(x, FoldedStates):
                x.notices.say(
                    "decoded",
                    f"operator {func} touched a FoldedCache handle: the whole history of a layer "
                    "is decoded for it, which costs the memory and time that kvfold saves. This "
                    "happens when a model does not use transformers' attention interface, or when "
                    "keys and values are read directly",
                )
                return x.decoded()
            return x

        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FoldedStates({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"


# --- operators that a handle understands -----------------------------------------------------


def _read(
    query: Tensor,
    key: FoldedStates,
    scaling: float | None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention `[rows, query_heads, queries, value_dim]` over the pages behind a handle."""
    if torch.is_grad_enabled() and query.requires_grad:
        key.notices.say(
            "gradients",
            "attention on packed pages keeps no gradients; run under torch.no_grad()",
        )
    out = attend(
        query,
        key.view_of,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sink_logits=sink_logits,
        say=key.notices.say,
    )
    return out.to(query.dtype)


def _sdpa(
    query: Tensor,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` over handles, where it asks for plain causal attention.

    transformers from 5.20 packs the query heads of a group in place of the queries (`pack_gqa`).
    """
    both = isinstance(key, FoldedStates) and isinstance(value, FoldedStates)
    if not both or key.memo is not value.memo or dropout_p or query.ndim != 4 or key.ndim != 4:
        return NotImplemented
    view, kv_heads, packed = key.view_of, key.view_of.keys.shape[1], False
    if query.shape[2] != view.step.queries:
        packed = view.step.queries == 1 and query.shape[1] == kv_heads and key.repeats == 1
        if not packed:
            return NotImplemented
    shape = query.shape
    if packed:
        query = query.reshape(shape[0], -1, 1, shape[3])
    if not _is_causal(attn_mask, is_causal, view):
        return NotImplemented
    out = _read(query, key, scale)
    return out.reshape(*shape[:3], -1) if packed else out


def _is_causal(mask: Tensor | None, is_causal: bool, view: View) -> bool:
    """Whether a call of SDPA attends as `attend` does: to every token up to the query's own."""
    if mask is None:  # the flag aligns queries with the first keys: right for none but a prefill
        return view.step.queries == 1 and not is_causal
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2] != view.step.queries:
        return False
    if mask.dtype != torch.bool:  # a bias may ride on an additive mask (ALiBi)
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        if not bool((hidden | (mask == 0)).all()):
            return False
        mask = ~hidden
    return not bool(_sees_otherwise(mask, view).any())


def _sees_otherwise(mask: Tensor, view: View) -> Tensor:
    """`[rows, queries]` queries to which a mask shows another number of keys than their own."""
    tokens = view.query_tokens.to(mask.device)
    wanted = tokens + 1
    if view.store.sliding_window is not None:
        wanted = wanted.clamp_max(view.store.sliding_window)
    return (mask[:, 0].sum(-1) != wanted) & (tokens >= 0)  # padding may see anything


def _getitem(x: Any, index: Any) -> Any:
    """`x[:, :, None, :, :]`, the first step of `repeat_kv`."""
    everything = slice(None)
    wanted = (everything, everything, None, everything, everything)
    if not isinstance(x, FoldedStates) or x.ndim != 4 or index != wanted:
        return NotImplemented
    rows, heads, slots, dim = x.shape
    return x.shaped((rows, heads, 1, slots, dim), x.repeats)


def _expand(x: Any, *sizes: Any) -> Any:
    """`.expand(rows, heads, repeats, slots, dim)`, the second."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 else sizes
    if not isinstance(x, FoldedStates) or x.ndim != 5 or x.shape[2] != 1 or len(sizes) != 5:
        return NotImplemented
    rows, heads, repeats, slots, dim = sizes
    same = all(a in (-1, b) for a, b in zip((rows, heads, slots, dim), _four(x), strict=True))
    if not same or repeats < 1:
        return NotImplemented
    return x.shaped((*x.shape[:2], repeats, *x.shape[3:]), repeats)


def _reshape(x: Any, *sizes: Any) -> Any:
    """`.reshape(rows, heads * repeats, slots, dim)`, the third."""
    sizes = tuple(sizes[0]) if len(sizes) == 1 else sizes
    if not isinstance(x, FoldedStates) or x.ndim != 5:
        return NotImplemented
    rows, heads, slots, dim = _four(x)
    wanted = (rows, heads * x.shape[2], slots, dim)
    return x.shaped(wanted, x.repeats) if sizes == wanted else NotImplemented


def _repeat_interleave(x: Any, repeats: Any, dim: int | None = None, **more: Any) -> Any:
    """`torch.repeat_interleave(x, repeats, dim=1)`, what `repeat_kv` amounts to."""
    plain = isinstance(x, FoldedStates) and x.ndim == 4 and x.repeats == 1 and dim == 1
    if not plain or not isinstance(repeats, int) or more:
        return NotImplemented
    rows, heads, slots, dim_ = x.shape
    return x.shaped((rows, heads * repeats, slots, dim_), repeats)


def _four(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:2], *x.shape[3:])


def _contiguous(x: Any, **_: Any) -> Any:
    return x


_MET: dict[Any, Any] = {
    F.scaled_dot_product_attention: _sdpa,
    Tensor.__getitem__: _getitem,
    Tensor.expand: _expand,
    Tensor.reshape: _reshape,
    torch.repeat_interleave: _repeat_interleave,
    Tensor.repeat_interleave: _repeat_interleave,
    Tensor.contiguous: _contiguous,
}


# --- which attention a config names ----------------------------------------------------------


class Switch:
    """Names `"kvfold"` in attention configs while at least one folded pass runs on them.

    Counted, so that passes of several threads on one model leave what the user chose.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        #: by identity of a config: the config, the user's choice, passes under way
        self.held: dict[int, tuple[Any, str | None, int]] = {}

    def take(self, configs: list[Any]) -> None:
        """Switch configs to kvfold's attention."""
        with self.lock:
            for config in configs:
                chosen = config._attn_implementation_internal
                _, original, count = self.held.get(id(config), (config, chosen, 0))
                self.held[id(config)] = (config, original, count + 1)
                config._attn_implementation_internal = NAME

    def give(self, configs: list[Any]) -> None:
        """Undo one `take`; the last one restores the user's choice."""
        with self.lock:
            for config in configs:
                _, original, count = self.held.pop(id(config))
                if count > 1:
                    self.held[id(config)] = (config, original, count - 1)
                else:
                    config._attn_implementation_internal = original

    def original(self, config: Any) -> str | None:
        """What the user chose for a config."""
        held = self.held.get(id(config))
        return held[1] if held else config._attn_implementation_internal


SWITCH = Switch()


# --- attention -------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls while a folded pass runs.

    Handles are read from their codes. Ordinary keys and values (sliding-window layers keep their
    own cache, other threads may use the model without one) go to what the user chose.
    """
    if torch.compiler.is_compiling() and ROUTE.pending is not None:
        (found, layer), ROUTE.pending = ROUTE.pending, None
        more = scaling, kwargs.get("softcap"), kwargs.get("s_aux")
        positions = kwargs.get("position_ids")
        out = compiled.attend(found, layer, query, key, value, attention_mask, positions, *more)
        return out.transpose(1, 2).contiguous(), None
    if not isinstance(key, FoldedStates):
        more = {"scaling": scaling, "dropout": dropout, **kwargs}
        return _plain(module, query, key, value, attention_mask, more)
    if kwargs.get("output_attentions"):
        raise UnsupportedError("attention weights are not kept when attention reads packed pages")
    _check_mask(attention_mask, key.view_of)
    out = _read(query, key, scaling, kwargs.get("softcap"), kwargs.get("s_aux"))
    return out.transpose(1, 2).contiguous(), None


def _check_mask(mask: Tensor | None, view: View) -> None:
    """Refuse masks that are not plain causal ones over the tokens of each row."""
    if mask is None or view.step.queries == 1:
        return
    if bool(_sees_otherwise(mask if mask.dtype == torch.bool else mask >= 0, view).any()):
        raise UnsupportedError(
            "the attention mask lets a query see another number of keys than plain causal "
            "attention does; tree, bidirectional and custom masks are not supported on packed pages"
        )


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    more: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention on ordinary tensors, by the user's choice; masks came as SDPA takes them."""
    original = SWITCH.original(cast(Any, module).config)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is not None and (
        original == "eager" or more.get("softcap") is not None or more.get("s_aux") is not None
    ):
        if more["scaling"] is None:
            more = {**more, "scaling": query.shape[-1] ** -0.5}
        return eager(module, query, key, value, _additive(mask, query, key), **more)
    return cast(Any, AttentionInterface())["sdpa"](module, query, key, value, mask, **more)


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A boolean or absent (causal) mask as eager attention adds it."""
    low = torch.finfo(query.dtype).min
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if queries == 1:
            return None
        seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = seen.tril(keys - queries)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.where(mask[..., :keys], 0.0, low).to(query.dtype)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, compiled.mask_of_rows)
