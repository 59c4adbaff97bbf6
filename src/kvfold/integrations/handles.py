"""Handles, and the attention function that reads them in place of keys and values.

A handle is a tensor without storage that knows the pages behind it. While a folded pass runs, the
model's attention implementation is `"kvfold"` (registered with transformers' `AttentionInterface`),
which reads the codes; any other operator that touches a handle gets the decoded states.
"""

import sys
import threading
import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvfold.attention.dispatch import attend
from kvfold.cache.store import View
from kvfold.cache.timeline import CacheError
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

    `kvfold`'s attention reads the pages behind it; every other operator gets the decoded states,
    with one warning, or an error under `strict`.
    """

    view_of: View
    side: str
    memo: dict[str, Tensor]
    notices: Notices

    @staticmethod
    def pair(view: View, notices: Notices) -> "tuple[FoldedStates, FoldedStates]":
        """The handles of a view's keys and values."""
        memo: dict[str, Tensor] = {}
        handles = []
        for side, states in (("key", view.keys), ("value", view.values)):
            slots = view.step.slots + view.step.queries
            shape = (*states.shape[:2], slots, states.shape[3])
            handle = torch.Tensor._make_wrapper_subclass(
                FoldedStates, shape, dtype=states.dtype, device=states.device
            )
            handle.view_of, handle.side, handle.memo, handle.notices = view, side, memo, notices
            handles.append(handle)
        return handles[0], handles[1]

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
        return self.memo[self.side]

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
    if not isinstance(key, FoldedStates):
        more = {"scaling": scaling, "dropout": dropout, **kwargs}
        return _plain(module, query, key, value, attention_mask, more)
    if kwargs.get("output_attentions"):
        raise UnsupportedError("attention weights are not kept when attention reads packed pages")
    view = key.view_of
    if torch.is_grad_enabled() and query.requires_grad:
        key.notices.say(
            "gradients",
            "attention on packed pages keeps no gradients; run under torch.no_grad()",
        )
    _check_mask(attention_mask, view)
    out = attend(
        query,
        view,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        say=key.notices.say,
    )
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


def _check_mask(mask: Tensor | None, view: View) -> None:
    """Refuse masks that are not plain causal ones over the tokens of each row."""
    if mask is None or view.step.queries == 1:
        return
    attended = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].sum(-1)
    tokens = view.query_tokens.to(mask.device)
    wrong = (attended != tokens + 1) & (tokens >= 0)  # padding queries may see anything
    if bool(wrong.any()):
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
AttentionMaskInterface.register(NAME, sdpa_mask)
