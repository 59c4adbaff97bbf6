"""`FoldedCache`: the packed cache as a transformers cache, for `generate(past_key_values=...)`.

How it fits in, without any patch that outlives a forward pass:

- the first pass of a batch returns the exact keys and values, so that prefill runs in the model's
  own kernel, and folds them;
- later passes return *handles*, tensors without storage that know their pages. While such a pass
  runs, the model's attention implementation is `"kvfold"` (registered with transformers'
  `AttentionInterface`), which reads the codes; before and after it is what the user chose;
- any other operator that touches a handle gets the decoded states, with one warning, or an error
  under `strict=True`.

One pair of hooks on the model's decoder brings positions and padding; they act only for passes that
carry this cache, and vanish with it.
"""

import inspect
import threading
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import sdpa_mask

from kvfold.attention.paged import attend
from kvfold.cache.config import CacheConfig
from kvfold.cache.store import LayerStore, View
from kvfold.cache.timeline import CacheError, Step, Timeline
from kvfold.calibration.artefact import Artefact
from kvfold.codec import Preset, Site, page_layout
from kvfold.integrations.describe import (
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    model_hash,
)

NAME = "kvfold"


class FoldedWarning(UserWarning):
    """A slow or decoding path was taken; the message names the reason."""


# --- handles ---------------------------------------------------------------------------------


class FoldedStates(torch.Tensor):
    """Keys or values of a layer as a tensor without storage: `[rows, kv_heads, slots, head_dim]`.

    `kvfold`'s attention reads the pages behind it; every other operator gets the decoded states.
    """

    view_of: View
    side: str
    memo: dict[str, Tensor]
    notice: Any

    @staticmethod
    def pair(view: View, notice: Any) -> "tuple[FoldedStates, FoldedStates]":
        """The handles of a view's keys and values; `notice(op)` is called before decoding."""
        memo: dict[str, Tensor] = {}
        handles = []
        for side, states in (("key", view.keys), ("value", view.values)):
            slots = view.step.slots + view.step.queries
            shape = (*states.shape[:2], slots, states.shape[3])
            handle = torch.Tensor._make_wrapper_subclass(
                FoldedStates, shape, dtype=states.dtype, device=states.device
            )
            handle.view_of, handle.side, handle.memo, handle.notice = view, side, memo, notice
            handles.append(handle)
        return handles[0], handles[1]

    def decoded(self) -> Tensor:
        """The states as an ordinary tensor, decoded once for both handles of a pass."""
        if not self.memo:
            view = self.view_of
            self.memo["key"], self.memo["value"] = view.store.decoded(view)
        return self.memo[self.side]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Decode, then run the operator on ordinary tensors."""

        def plain(x: Any) -> Any:
            if isinstance(x, FoldedStates):
                x.notice(func)
                return x.decoded()
            return x

        args, kwargs = tree_map(plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"FoldedStates({self.side}, shape={tuple(self.shape)}, dtype={self.dtype})"


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
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while a folded pass runs.

    Handles are read from their codes. Ordinary keys and values (sliding-window layers keep their
    own cache) go through SDPA, or through an exact softmax where a soft-cap or sink logits ask.
    """
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sink_logits = kwargs.get("softcap"), kwargs.get("s_aux")
    if kwargs.get("output_attentions"):
        raise UnsupportedError("attention weights are not kept when attention reads packed pages")
    if isinstance(key, FoldedStates):
        view = key.view_of
        _check_mask(attention_mask, view)
        out = attend(query, view, scaling=factor, softcap=softcap, sink_logits=sink_logits)
        return out.to(query.dtype).transpose(1, 2).contiguous(), None
    if softcap is None and sink_logits is None:
        sdpa = cast(Any, AttentionInterface())["sdpa"]
        return sdpa(
            module, query, key, value, attention_mask, dropout=dropout, scaling=factor, **kwargs
        )
    return _exact(query, key, value, attention_mask, factor, softcap, sink_logits), None


def _check_mask(mask: Tensor | None, view: View) -> None:
    """Refuse masks that are not plain causal ones over the tokens of each row."""
    if mask is None or view.step.queries == 1:
        return
    seen = int((view.query_tokens + 1).sum())
    found = int((mask if mask.dtype == torch.bool else mask >= 0).sum())
    padding = int((view.query_tokens < 0).sum())
    rows = view.step.rows if mask.shape[0] == 1 else 1
    # transformers lets padding queries see everything or nothing, so they are not counted
    if not padding and found * rows != seen * mask.shape[1]:
        raise UnsupportedError(
            f"the attention mask lets queries see {found} keys, plain causal attention {seen}; "
            "tree, bidirectional and custom masks are not supported on packed pages"
        )


def _exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    s = query @ key.mT * scaling
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
        s = s.masked_fill(~mask, torch.finfo(s.dtype).min) if mask.dtype == torch.bool else s + mask
    elif query.shape[2] > 1:
        causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device)
        s = s.masked_fill(~causal.tril(s.shape[-1] - s.shape[-2]), torch.finfo(s.dtype).min)
    if sink_logits is not None:
        extra = sink_logits.reshape(1, -1, 1, 1).expand(*s.shape[:3], 1).to(s.dtype)
        s = torch.cat((s, extra), -1)
    p = s.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (p[..., : key.shape[-2]] @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


# --- layers ----------------------------------------------------------------------------------


class FoldedLayer(DynamicLayer):
    """One compressed layer of a `FoldedCache`."""

    is_croppable = True

    def __init__(self, cache: "FoldedCache", info: LayerInfo, preset: Preset) -> None:
        self._cache = weakref.ref(cache)
        self.info, self.preset = info, preset
        self.store: LayerStore | None = None
        self.step: Step | None = None
        super().__init__()
        self.bind(torch.device("cpu"), cache.dtype)  # says now what does not fit

    @property
    def cache(self) -> "FoldedCache":
        """The cache that the layer is part of."""
        cache = self._cache()
        if cache is None:
            raise CacheError("the FoldedCache of this layer is gone")
        return cache

    def bind(self, device: torch.device, dtype: torch.dtype) -> LayerStore:
        """The layer's codecs on a device."""
        info, config = self.info, self.cache.config
        site = Site(
            "key",
            info.num_kv_heads,
            info.key_dim,
            config.block,
            info.index,
            dtype,
            device,
            info.rope,
        )
        value = replace(site, side="value", head_dim=info.value_dim)
        return LayerStore(
            self.preset.keys.bind(site, config.artefact),
            self.preset.values.bind(value, config.artefact),
            self.cache.timeline,
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Bind the codecs where the first states are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.store = self.bind(key_states.device, key_states.dtype)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the step's post-RoPE keys and values `[rows, kv_heads, queries, head_dim]`.

        Gives them back as they are in a batch's first pass, handles in later ones.
        """
        step = self.cache.step
        if step is None:
            raise CacheError(
                "update() was called outside a forward pass of the model that this FoldedCache was "
                "made for; positions and padding are unknown there"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        view = self.store.append(key_states, value_states, step)
        self.step = step
        if view is None:
            return key_states, value_states
        return FoldedStates.pair(view, self.cache.notice)

    def _handles(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.store is None or not self.cache.timeline.rows:
            return None, None
        return FoldedStates.pair(self.store.view_now(), self.cache.notice)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """A handle on all keys; reading it decodes."""
        return self._handles()[0]

    @keys.setter
    def keys(self, value: Any) -> None:
        pass

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """A handle on all values; reading it decodes."""
        return self._handles()[1]

    @values.setter
    def values(self, value: Any) -> None:
        pass

    def get_seq_length(self) -> int:
        """Slots held, padding included, as the stock cache counts."""
        pending = self.cache.step
        added = pending.queries if pending is not None and self.step is pending else 0
        return self.cache.timeline.slots + added

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of the mask."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: grows as needed."""
        return -1

    def get_max_cache_shape(self) -> int:
        """-1: grows as needed (name until transformers 5.15)."""
        return -1

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self.store, self.step, self.is_initialized = None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Done for all layers by `FoldedCache.reorder_cache`."""
        raise CacheError("reorder a FoldedCache as a whole: cache.reorder_cache(beam_idx)")

    def crop(self, tokens_to_remove: int) -> None:
        """Done for all layers by `FoldedCache.crop`."""
        raise CacheError("crop a FoldedCache as a whole: cache.crop(n)")

    def offload(self) -> None:
        """Not moved: packed pages stay on their device."""

    def prefetch(self) -> None:
        """Not moved: packed pages stay on their device."""


# --- the cache -------------------------------------------------------------------------------


class FoldedCache(DynamicCache):
    """A key/value cache that is really 4 to 10 times smaller, for `model.generate`.

    ```python
    cache = kvfold.FoldedCache(model, "turboquant4")
    model.generate(**inputs, past_key_values=cache)
    print(cache.summary())
    ```

    The first `sinks` tokens of each sequence and the last `window` stay exact; what leaves the
    window is coded in pages of `block` tokens, once. Full-attention layers are compressed;
    sliding-window and recurrent layers keep transformers' own classes.

    Args:
        model: the transformers model that will run with the cache.
        preset: name of a preset (`kvfold.presets()`), or a `CacheConfig`.
        keys: preset for the keys alone.
        values: preset for the values alone.
        overrides: layer index to preset.
        sinks: first tokens of each sequence, kept exact.
        window: most recent tokens, kept exact.
        block: tokens of a page.
        max_tokens: longest sequence of a row; None for the model's own limit.
        slab_blocks: blocks of each row by which the page pool grows.
        strict: raise where a handle would be decoded; else one warning names the operator.
        artefact: an `Artefact` or the path of one.
        bypass: store everything exactly, as the stock cache does.

    Raises:
        CodecError: unknown preset, or a layer that it does not fit.
        UnsupportedError: no layer of this model can be compressed.
        CalibrationError: the artefact does not belong to this model or preset.
    """

    layers: list[Any]  # stock classes of several kinds, and FoldedLayer

    def __init__(
        self,
        model: nn.Module,
        preset: str | Preset | CacheConfig = "turboquant4",
        *,
        keys: str | Preset | None = None,
        values: str | Preset | None = None,
        overrides: Mapping[int, str | Preset] | None = None,
        sinks: int = 4,
        window: int = 64,
        block: int = 128,
        max_tokens: int | None = None,
        slab_blocks: int = 4,
        strict: bool = False,
        artefact: Artefact | str | None = None,
        bypass: bool = False,
    ) -> None:
        if isinstance(preset, CacheConfig):
            config = preset
        else:
            if artefact is not None and not isinstance(artefact, Artefact):
                artefact = Artefact.load(artefact)
            config = CacheConfig(
                preset=preset,
                keys=keys,
                values=values,
                overrides=dict(overrides or {}),
                sinks=sinks,
                window=window,
                block=block,
                max_tokens=max_tokens,
                slab_blocks=slab_blocks,
                strict=strict,
                artefact=artefact,
            )
        infos = describe(model)
        unknown = sorted(set(config.overrides) - {info.index for info in infos})
        if unknown:
            raise CacheError(
                f"overrides name layers {unknown}; the model has layers 0 to {infos[-1].index}"
            )
        config.check_artefact(lambda: model_hash(model))
        self.config = config
        self.dtype = next(model.parameters()).dtype
        self._model_config = cast(PreTrainedConfig, model.config)
        self._infos = {info.index: info for info in infos}
        limit = getattr(decoder(model).config, "max_position_embeddings", None)
        self.timeline = Timeline(
            config.sinks,
            config.window,
            config.block,
            config.slab_blocks,
            config.max_tokens or limit,
        )
        self.step: Step | None = None
        self._failed = False
        self._warned = False
        self._lock = threading.Lock()
        self._bypass = bypass
        self._set_layers()
        _Hooks(self, model)

    def _set_layers(self) -> None:
        super().__init__(config=self._model_config)
        if self._bypass:
            return
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and index in self._infos:
                preset = self.config.preset_of(index)
                self.layers[index] = FoldedLayer(self, self._infos[index], preset)
        if not self.folded_layers:
            kinds = sorted({info.kind for info in self._infos.values()})
            raise UnsupportedError(
                f"no layer of this model can be compressed: its layers are {kinds}, and only "
                "full_attention layers are; bypass=True stores everything exactly"
            )

    @staticmethod
    def calibrate(
        model: nn.Module,
        tokenizer: Any,
        texts: str | Sequence[str],
        preset: str | Preset = "fisher2",
        **options: Any,
    ) -> Artefact:
        """Learn a preset's tables from a model reading texts, for `FoldedCache(artefact=...)`.

        Args:
            model: the model that the cache is for.
            tokenizer: its tokenizer.
            texts: what to read; about 30,000 tokens are enough.
            preset: name or preset; of `fisher`, all usual numbers of bits and all forms are fitted.
            options: as for `kvfold.integrations.collect.calibrate`.
        """
        from kvfold.integrations.collect import calibrate

        return calibrate(model, tokenizer, texts, preset, **options)

    @classmethod
    def from_cache(
        cls,
        model: nn.Module,
        cache: DynamicCache | Sequence[tuple[Tensor, Tensor]],
        preset: str | Preset | CacheConfig = "turboquant4",
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> "FoldedCache":
        """Fold a filled DynamicCache, or a legacy tuple of (keys, values) a layer.

        Args:
            model: the model that filled it.
            cache: what it holds is read layer by layer and not changed.
            preset: as for `FoldedCache`.
            attention_mask: `[rows, slots]`, needed where the batch is padded.
            position_ids: `[rows or 1, slots]`; by default tokens count from 0 within each row.
            options: as for `FoldedCache`.
        """
        new = cls(model, preset, **options)
        filled: list[Any] = list(cache.layers if isinstance(cache, DynamicCache) else cache)
        if len(filled) != len(new.layers):
            raise CacheError(f"the cache has {len(filled)} layers, the model {len(new.layers)}")
        pairs: list[Any] = [
            (layer.keys, layer.values) if isinstance(layer, DynamicLayer) else layer
            for layer in filled
        ]
        sample = next(pair[0] for pair, to in zip(pairs, new.layers, strict=True) if _is_folded(to))
        rows, _, slots, _ = sample.shape
        valid = None if attention_mask is None else attention_mask.bool()
        if position_ids is None and valid is not None:
            position_ids = (valid.long().cumsum(1) - 1).clamp_min(0)
        step = new.timeline.plan(rows, slots, valid, position_ids)
        new.step = step
        for index, (target, source) in enumerate(zip(new.layers, filled, strict=True)):
            if _is_folded(target):
                target.update(*pairs[index])
            elif type(source) is type(target):
                new.layers[index] = source
            else:
                raise CacheError(
                    f"layer {index} is a {type(target).__name__} and cannot be taken from a "
                    f"{type(source).__name__}"
                )
        new.timeline.commit(step)
        new.step = None
        return new

    # --- one pass ------------------------------------------------------------------------------

    def begin(self, queries: int, rows: int, mask: Any, positions: Tensor | None) -> None:
        """Plan a forward pass; called by the decoder's hook before it runs."""
        if not self._lock.acquire(blocking=False):
            raise CacheError(
                "this FoldedCache is in the middle of a forward pass of another thread; one cache "
                "serves one generation at a time: make one for each"
            )
        try:
            if self._failed:
                raise CacheError("a forward pass with this cache failed half-way; reset() it first")
            slots = self.timeline.slots
            if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
                kind = (
                    f"a {mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
                )
                raise CacheError(
                    f"attention_mask is {kind}; FoldedCache takes a 2-D mask [rows, tokens]"
                )
            valid = None
            if mask is not None:
                if mask.shape != (rows, slots + queries):
                    raise CacheError(
                        f"attention_mask has shape {tuple(mask.shape)}; [{rows}, {slots + queries}]"
                        f" = rows and cached ({slots}) plus new ({queries}) slots is expected"
                    )
                valid = mask[:, slots:].bool()
                if (slots and queries > 1) or (slots and not self.timeline.unpadded):
                    held = mask[:, :slots].bool().sum(1).tolist()
                    if held != self.timeline.lengths:
                        raise CacheError(
                            f"attention_mask marks {held} cached tokens a row, the cache holds "
                            f"{self.timeline.lengths}: cached tokens cannot be masked later"
                        )
            elif slots and not self.timeline.unpadded:
                raise CacheError(
                    "the cache holds padded rows and this pass has no attention_mask; pass "
                    f"attention_mask [{rows}, {slots + queries}]"
                )
            self.step = self.timeline.plan(rows, queries, valid, positions)
        except BaseException:
            self._lock.release()
            raise

    def end(self, failed: bool) -> None:
        """Commit a forward pass, or mark the cache as failed."""
        step, self.step = self.step, None
        if step is not None:
            updated = [layer.step is step for layer in self.folded_layers]
            if failed:
                self._failed = any(updated) or bool(step.pages)
            elif any(updated):
                self.timeline.commit(step)
        self._lock.release()

    def notice(self, operator: Any) -> None:
        """Say that a handle is about to be decoded: an error under `strict`, else one warning."""
        message = (
            f"operator {operator} touched a FoldedCache handle: the whole history of a layer is "
            "decoded for it, which costs the memory and time that kvfold saves. This happens when "
            "a model does not use transformers' attention interface, or when keys and values are "
            "read directly"
        )
        if self.config.strict:
            raise UnsupportedError(message + " (strict=True)")
        if not self._warned:
            self._warned = True
            warnings.warn(message, FoldedWarning, stacklevel=3)

    # --- what it holds -------------------------------------------------------------------------

    @property
    def folded_layers(self) -> list[FoldedLayer]:
        """The compressed layers."""
        return [layer for layer in self.layers if _is_folded(layer)]

    @property
    def bypass(self) -> bool:
        """Whether everything is stored exactly; may be switched while the cache is empty."""
        return self._bypass

    @bypass.setter
    def bypass(self, value: bool) -> None:
        if value != self._bypass:
            if self.get_seq_length():
                raise CacheError(
                    "bypass can be switched while the cache is empty; reset() it first"
                )
            self._bypass = value
            self._set_layers()

    def compressed_share(self) -> float:
        """Share of the (query, key) pairs of all queries on the cache that were read from codes."""
        return self.timeline.compressed_share()

    def nbytes(self) -> dict[str, int]:
        """Every allocated byte by part; `sum(cache.nbytes().values())` is all of them.

        `pages` (in use), `pool_unused` (reserved pages), `window` and `sinks` (exact), `tables`
        (shared by all pages: rotations, codebooks, orders), `exact_layers` (not compressed).
        """
        parts: dict[str, int] = dict.fromkeys(
            ("pages", "pool_unused", "window", "sinks", "tables", "exact_layers"), 0
        )
        used = len({n for row in self.timeline.table for n in row})
        seen: dict[int, int] = {}
        for layer in self.layers:
            if not _is_folded(layer):
                parts["exact_layers"] += sum(t.untyped_storage().nbytes() for t in _tensors(layer))
            elif layer.store is not None:
                for part, size in layer.store.nbytes(used).items():
                    parts[part] += size
                for t in _tensors([layer.store.key, layer.store.value]):
                    seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        parts["tables"] = sum(seen.values())
        return parts

    def uncompressed_nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the same tokens in an uncompressed cache of `dtype` (padding not counted)."""
        tokens = sum(self.timeline.lengths)
        elements = sum(
            layer.info.num_kv_heads * (layer.info.key_dim + layer.info.value_dim)
            for layer in self.folded_layers
        )
        return tokens * elements * dtype.itemsize + self.nbytes()["exact_layers"]

    def bits_per_element(self) -> float:
        """Stored bits of full pages over their elements, all compressed layers together."""
        layouts = []
        for layer in self.folded_layers:
            store = layer.store or layer.bind(torch.device("cpu"), self.dtype)
            layouts.append(page_layout(store.key, store.value))
        return 8 * sum(p.nbytes for p in layouts) / sum(p.elements for p in layouts)

    def summary(self) -> str:
        """Which layers are compressed how, and what the cache holds now, in a few lines."""
        lines = [repr(self)]
        by_preset: dict[str, list[int]] = {}
        for layer in self.folded_layers:
            by_preset.setdefault(layer.preset.name, []).append(layer.info.index)
        lines += [f"  {name}: layers {_ranges(layers)}" for name, layers in by_preset.items()]
        exact = [i for i, layer in enumerate(self.layers) if not _is_folded(layer)]
        if exact:
            lines.append(f"  exact (transformers' own classes): layers {_ranges(exact)}")
        held = sum(self.nbytes().values())
        whole = self.uncompressed_nbytes()
        if whole:
            lines.append(
                f"  {self.timeline.slots} slots, {held:,} bytes, {held / whole:.3f} of bfloat16 "
                f"({whole:,})"
            )
        return "\n".join(lines)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"FoldedCache({c.preset_of(None).name!r}, sinks={c.sinks}, window={c.window}, "
            f"block={c.block}{', bypass=True' if self._bypass else ''})"
        )

    # --- what generation does to it ------------------------------------------------------------

    def reset(self) -> None:
        """Forget every token and free the pages."""
        self.timeline.reset()
        self.step, self._failed = None, False
        super().reset()

    def crop(self, max_length: int) -> None:  # type: ignore[override]
        """Keep the first `max_length` slots, or drop `-max_length` where it is not positive.

        A page that is cut is decoded once, back into the exact window.
        """
        held = self.get_seq_length()
        max_length = int(max_length)  # assisted decoding counts with tensors
        keep = min(max_length, held) if max_length > 0 else max(0, held - abs(max_length))
        tables = [list(row) for row in self.timeline.table]
        reopened = self.timeline.crop(keep)
        for layer in self.layers:
            if not _is_folded(layer):
                layer.crop(max_length)
            elif layer.store is not None:
                for row, block in reopened:
                    layer.store.reopen(row, block, tables[row][block])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`; pages are shared, never copied."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; pages are shared, never copied."""
        self._select(torch.arange(self.timeline.rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._select(torch.arange(self.timeline.rows)[indices.cpu()])

    def _select(self, rows: Tensor) -> None:
        self.timeline.select(rows.tolist())
        for layer in self.layers:
            if not _is_folded(layer):
                layer.batch_select_indices(rows.to(layer.keys.device))
            elif layer.store is not None:
                layer.store.select(rows)


def _is_folded(layer: Any) -> TypeGuard[FoldedLayer]:
    return isinstance(layer, FoldedLayer)


def _ranges(indices: Sequence[int]) -> str:
    """[0, 1, 2, 5] as '0-2, 5'."""
    parts: list[list[int]] = []
    for i in indices:
        if parts and i == parts[-1][1] + 1:
            parts[-1][1] = i
        else:
            parts.append([i, i])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _tensors(thing: Any, seen: set[int] | None = None) -> list[Tensor]:
    """Tensors with storage reachable through attributes, lists and dicts, each object once."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (str, int, float, torch.dtype, torch.device, type)):
        return []
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return [] if isinstance(thing, FoldedStates) else [thing]
    if isinstance(thing, Mapping):
        inside: Any = thing.values()
    elif isinstance(thing, (list, tuple, set)):
        inside = thing
    elif isinstance(thing, (nn.Module, weakref.ref)):
        return []
    else:
        inside = vars(thing).values() if hasattr(thing, "__dict__") else ()
    return [t for item in inside for t in _tensors(item, seen)]


# --- hooks -----------------------------------------------------------------------------------


class _Hooks:
    """The hooks of one cache on its model's decoder; they go when the cache goes."""

    def __init__(self, cache: FoldedCache, model: nn.Module) -> None:
        base = decoder(model)
        self.cache = weakref.ref(cache)
        self.signature = inspect.signature(base.forward)
        self.configs = _attention_configs(base)
        self.restore: list[tuple[Any, str | None]] = []
        self.active: int | None = None  # thread of the pass under way
        handles = (
            base.register_forward_pre_hook(self.before, with_kwargs=True),
            base.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )
        weakref.finalize(cache, lambda: [handle.remove() for handle in handles])

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self.cache()
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        if cache is None or given.get("past_key_values") is not cache or cache.bypass:
            return
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return  # the model's own error is clearer
        rows, queries = tokens.shape[:2]
        cache.begin(queries, rows, given.get("attention_mask"), given.get("position_ids"))
        self.active = threading.get_ident()
        if cache.step is not None and not cache.step.is_first:
            for config in self.configs:
                self.restore.append((config, config._attn_implementation_internal))
                config._attn_implementation_internal = NAME

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # also called where `before` has refused the pass of another thread
        if self.active != threading.get_ident():
            return
        self.active = None
        for config, implementation in reversed(self.restore):
            config._attn_implementation_internal = implementation
        self.restore.clear()
        cache = self.cache()
        if cache is not None:
            cache.end(failed=output is None)


def _attention_configs(base: nn.Module) -> list[Any]:
    """The configs whose attention implementation the decoder and its layers read."""
    found: dict[int, Any] = {}
    for module in base.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
