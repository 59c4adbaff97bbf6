"""Evaluate a transformers model as if its cache were packed from the first token on.

    with streaming(model, "kivi4-g64"):
        logits = model(input_ids, use_cache=False).logits

Every full-attention layer reads decoded codes for each query's cold keys and values
(`kvfold.attention.streaming`); sliding and chunked layers stay exact. One attention function is
registered with transformers and does nothing until a model's config names it; the config does so
only while the decoder's forward runs.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from kvfold.attention.streaming import align, align_order, streaming_attention
from kvfold.cache.config import CacheConfig
from kvfold.codec import BoundCodec, CodecError, Preset, Site, page_layout
from kvfold.integrations.describe import (
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    model_hash,
    text_config,
)

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact

NAME = "kvfold_streaming"
#: queries worked on at once; a GPU takes as many as fit (CHUNK_ELEMENTS).
CHUNK = {"cpu": 256}


@contextmanager
def streaming(
    model: nn.Module,
    preset: str | Preset,
    *,
    sinks: int = 4,
    window: int = 64,
    block: int = 1,
    page_len: int = 128,
    artefact: "Artefact | None" = None,
    overrides: Mapping[int, str | Preset] | None = None,
) -> Iterator["Session"]:
    """While open, forwards of `model` without a cache have streaming semantics.

    A batch with padding needs its `attention_mask`; positions then count real tokens unless
    `position_ids` says otherwise.

    Args:
        model: a decoder model; forward runs with `use_cache=False`.
        preset: the code of keys and values.
        sinks: first tokens of each row, kept exact.
        window: most recent tokens of each query, exact.
        block: tokens that leave the window together.
        page_len: tokens of a stored page.
        artefact: calibration, for presets that use one.
        overrides: layer index to preset.

    Raises:
        UnsupportedError: a model without layers that can be compressed.
        CodecError: a preset that does not fit the model, or lacks its artefact.
    """
    config = CacheConfig(
        preset,
        overrides=overrides or {},
        sinks=sinks,
        window=window,
        block=page_len,
        artefact=artefact,
    )
    with Session(model, config, block) as session:
        yield session


class Session:
    """Codecs bound to a model for streaming evaluation, in force while entered as a context.

    Binding costs more than entering: an evaluation makes a session once and enters it often.

    Args:
        model: a decoder model.
        config: what is kept exact and how the rest is coded; its `block` is the page length.
        block: tokens that leave the window together.
    """

    def __init__(self, model: nn.Module, config: CacheConfig, block: int = 1) -> None:
        if block < 1:
            raise CodecError(f"block ({block}) must be at least 1")
        self.config, self.block, self.decoder = config, block, decoder(model)
        self.layers = [layer for layer in describe(model) if layer.num_kv_heads]
        #: indices of the layers that read codes.
        self.folded = frozenset(i.index for i in self.layers if i.kind == "full_attention")
        if not self.folded:
            kinds = ", ".join(sorted({layer.kind for layer in self.layers}))
            raise UnsupportedError(
                f"model type {text_config(model).model_type!r} has no full-attention layer to "
                f"compress, only {kinds}"
            )
        config.check_artefact(lambda: model_hash(model))
        self.by_module = {id(layer.module): layer for layer in self.layers}
        self.signature = inspect.signature(self.decoder.forward)
        self.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self.model_type = text_config(model).model_type
        found = [text_config(model), self.decoder.config]
        found += [c for layer in self.layers if (c := getattr(layer.module, "config", None))]
        self.configs = list({id(c): c for c in found}.values())
        self.before: list[str | None] | None = None
        self.order: Tensor | None = None
        self.inverse: Tensor | None = None
        self.lengths: Tensor | None = None
        self.positions: Tensor | None = None
        self.seen: set[int] = set()
        self._bound: dict[tuple[int, torch.device], tuple[BoundCodec, BoundCodec]] = {}
        for layer in self.layers:  # so that what does not fit is said at once
            if layer.index in self.folded:
                device = next((p.device for p in layer.module.parameters()), torch.device("cpu"))
                if device.type != "meta":
                    self.codecs(layer, device)

    def __enter__(self) -> "Session":
        if any(layer.module in _SESSIONS for layer in self.layers):
            raise RuntimeError("a streaming session is already open on this model; close it first")
        self.handles = [
            self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.decoder.register_forward_hook(self.end, always_call=True),
        ]
        for layer in self.layers:
            _SESSIONS[layer.module] = self
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            del _SESSIONS[layer.module]

    def bits_per_element(self) -> float:
        """Stored bits of full pages over their K and V elements, all compressed layers together."""
        device = next(self.decoder.parameters()).device
        pages = [
            page_layout(*self.codecs(layer, device))
            for layer in self.layers
            if layer.index in self.folded
        ]
        return 8 * sum(page.nbytes for page in pages) / sum(page.elements for page in pages)

    def codecs(self, layer: LayerInfo, device: torch.device) -> tuple[BoundCodec, BoundCodec]:
        """The key and the value codec of a layer, its tables on `device`."""
        if (layer.index, device) not in self._bound:
            preset, dims = self.config.preset_of(layer.index), (layer.key_dim, layer.value_dim)
            sites = [
                Site(
                    side,
                    layer.num_kv_heads,
                    dim,
                    self.config.block,
                    layer.index,
                    self.dtype,
                    device,
                    layer.rope,
                )
                for side, dim in zip(("key", "value"), dims, strict=True)
            ]
            self._bound[layer.index, device] = (
                preset.keys.bind(sites[0], self.config.artefact),
                preset.values.bind(sites[1], self.config.artefact),
            )
        return self._bound[layer.index, device]

    # --- around the decoder's forward ------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Read the rows' tokens and positions, and name our attention function."""
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        if given.get("past_key_values") is not None or given.get("use_cache"):
            raise ValueError(
                "streaming evaluation runs without a cache: call the model with use_cache=False"
            )
        kwargs = {**kwargs, "use_cache": False}
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} axes; [batch, tokens] is possible")
        self.order = self.inverse = self.lengths = None
        if mask is not None and not bool(mask.bool().all()):
            valid = mask.bool()
            self.order = align_order(valid)
            self.inverse, self.lengths = self.order.argsort(1), valid.sum(1)
            if positions is None:
                positions = kwargs["position_ids"] = (valid.long().cumsum(1) - 1).clamp_min(0)
        if positions is not None and positions.ndim == 3:
            positions = positions[0]
        self.positions = _row_positions(positions, self.order, self.lengths)
        self.seen.clear()
        self.before = [config._attn_implementation for config in self.configs]
        for config in self.configs:
            config._attn_implementation = NAME
        return args, kwargs

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Undo `begin`, also after an exception, and check that every layer read codes."""
        self.restore()
        missed = sorted(self.folded - self.seen)
        if missed and output is not None:
            raise UnsupportedError(
                f"model type {self.model_type!r} does not call attention through transformers' "
                f"AttentionInterface (layers {missed[:4]}…), so its cache cannot be evaluated"
            )

    def restore(self) -> None:
        """Name the configs' own attention implementations again."""
        if self.before is not None:
            for config, name in zip(self.configs, self.before, strict=True):
                config._attn_implementation = name
        self.before = None

    # --- one layer -------------------------------------------------------------------------

    @torch.no_grad()
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None,
        softcap: float | None,
        sliding_window: int | None,
        s_aux: Tensor | None,
    ) -> Tensor:
        """`[batch, heads, slots, value_dim]` of one attention module."""
        layer = self.by_module[id(module)]
        if layer.index not in self.folded:
            if softcap is None and s_aux is None:
                return _plain(query, key, value, attention_mask, scaling)
            codecs = (None, None)
        else:
            codecs, sliding_window = self.codecs(layer, key.device), None
            if layer.rope_limit is not None:
                last = key.shape[2] if self.positions is None else int(self.positions.max()) + 1
                layer.check_length(last, self.config.preset_of(layer.index).keys)
            self.seen.add(layer.index)
        order, lengths, positions, inverse = (
            t if t is None else t.to(key.device)
            for t in (self.order, self.lengths, self.positions, self.inverse)
        )
        if order is not None:
            query, key, value = (align(x, order) for x in (query, key, value))
        out = streaming_attention(
            query,
            key,
            value,
            *codecs,
            positions,
            lengths,
            sinks=self.config.sinks,
            window=self.config.window,
            block=self.block,
            scaling=scaling,
            softcap=softcap,
            sink_logits=s_aux,
            sliding_window=sliding_window,
            chunk=CHUNK.get(key.device.type, query.shape[2]),
        )
        return out if inverse is None else align(out, inverse)


#: the open session of each attention module.
_SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    session = _SESSIONS[module]
    out = session.attend(
        module, query, key, value, attention_mask, scaling, softcap, sliding_window, s_aux
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def _plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    if mask is not None:
        mask = mask[:, :, :, : k.shape[2]]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scaling
    )


def _row_positions(
    positions: Tensor | None, order: Tensor | None, lengths: Tensor | None
) -> Tensor | None:
    """Positions with each row's tokens first; refuses rows whose positions do not rise by one."""
    if positions is None:
        return None
    if order is not None:
        positions = positions.expand(len(order), -1).gather(1, order)
    steps = positions.diff(dim=1) == 1
    if lengths is not None:
        index = torch.arange(steps.shape[1], device=steps.device)
        steps |= index >= lengths[:, None] - 1
    if not bool(steps.all()):
        raise ValueError(
            "position_ids must rise by one within a row; packed or reordered sequences are not "
            "supported"
        )
    return positions
