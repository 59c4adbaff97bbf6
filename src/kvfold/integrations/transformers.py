"""`FoldedCache`: the packed cache as a transformers cache, for `generate(past_key_values=...)`.

How it fits in, without any patch that outlives a forward pass: the first pass of a batch returns
the exact keys and values, so that prefill runs in the model's own kernel, and folds them; later
passes return handles (`handles.py`), which the attention that `hooks.py` names reads as codes.
"""

import copy
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvfold.attention import dispatch
from kvfold.cache.config import CacheConfig
from kvfold.cache.numbers import Numbers
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import CacheError, Step, Timeline, upload
from kvfold.calibration.artefact import Artefact
from kvfold.codec import BoundCodec, Codec, Preset, Site, page_layout
from kvfold.integrations import compiled
from kvfold.integrations.artefacts import for_preset
from kvfold.integrations.describe import (
    EncoderError,
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    model_hash,
)
from kvfold.integrations.graphs import Graphs
from kvfold.integrations.handles import FoldedStates, FoldedWarning, Notices
from kvfold.integrations.hooks import Hooks
from kvfold.integrations.late import Late
from kvfold.kernels import cpu

__all__ = ["FoldedCache", "FoldedLayer", "FoldedWarning"]


#: recorded passes decode nothing and walk no pages: what would be said is refused there.
RECORDED = Notices(strict=True)


# --- layers ----------------------------------------------------------------------------------


#: by model: of a layer's side and a device the codec that was bound last, and what it was bound to.
#: A new cache of the same preset, one a request, takes it over: matrices are not inverted again.
_BOUND: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Any]]" = weakref.WeakKeyDictionary()


def _bound(model: nn.Module, codec: Codec, site: Site, artefact: Artefact | None) -> BoundCodec:
    """A codec at a layer, shared by the caches of a model."""
    held = _BOUND.setdefault(model, {})
    at = site.layer, site.side, site.device
    if at in held:
        *before, used, bound = held[at]
        if before == [codec, site] and used is artefact:
            return bound
    bound = codec.bind(site, artefact)
    held[at] = codec, site, artefact, bound
    return bound


class FoldedLayer(DynamicLayer):
    """One compressed layer of a `FoldedCache`."""

    is_croppable = True

    def __init__(
        self,
        cache: "FoldedCache",
        info: LayerInfo,
        preset: Preset,
        sliding_window: int | None = None,
    ) -> None:
        self._cache = weakref.ref(cache)
        self.info, self.preset = info, preset
        self.found_by = cache.found_by
        self.attention_config: Any = cache.attention_config
        #: which mask transformers makes for the layer depends on the first
        self.is_sliding, self.sliding_window = sliding_window is not None, sliding_window
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
        model = self.cache.model
        return LayerStore(
            _bound(model, self.preset.keys, site, config.artefact),
            _bound(model, self.preset.values, value, config.artefact),
            self.cache.timeline,
            self.sliding_window,
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
        if torch.compiler.is_compiling():
            return compiled.traced(self, key_states, value_states)
        step = self.cache.step
        if step is None:
            raise CacheError(
                "update() was called outside a forward pass of the model that this FoldedCache was "
                "made for; positions and padding are unknown there"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.store is not None
        static = self.cache.static
        if static is not None:
            self.step = step
            view = self.store.append_in_place(key_states, value_states, static, step)
            return FoldedStates.pair(view, RECORDED)
        view = self.store.append(key_states, value_states, step)
        self.step = step
        if view is None:
            return key_states, value_states
        return FoldedStates.pair(view, self.cache.notices)

    def _handles(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.store is None or not self.cache.timeline.rows:
            return None, None
        return FoldedStates.pair(self.store.view_now(), self.cache.notices)

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
        """Slots held, padding included, as the stock cache counts; a tensor in compiled passes."""
        if torch.compiler.is_compiling():
            return cast(int, compiled.slots(self.found_by))  # as the stock static cache does
        pending = self.cache.step
        added = pending.queries if pending is not None and self.step is pending else 0
        return self.cache.timeline.slots + added

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset of the mask."""
        if torch.compiler.is_compiling():
            return compiled.mask_sizes(self)
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
        graphs: replay decode steps as CUDA graphs: None where that is possible, True to be told
            where it is not (`summary()` says it always), False never.
        trim: cold tokens of a row that are kept, the newest (`CacheConfig` says more of these).
        prune: cold tokens of a row that decoding keeps, those that got most attention.
        top_k: cold tokens of a row that a decoded token reads.
        max_bytes: bytes of the compressed layers.
        offload: keep cold pages in CPU memory, streamed while a GPU reads them.
        strict: raise where a handle would be decoded; else one warning names the operator.
        artefact: an `Artefact` or the path of one; by default, for presets that require one, what
            `kvfold calibrate` left for this model or kvfold ships (the demo model's).
        bypass: store everything exactly, as the stock cache does.
        sliding: `"folded"` packs sliding-window layers too and drops their pages behind the window;
            by default they keep transformers' own class, exact.
        unsupported: `"exact"` keeps a model exact that has no layer to compress (latent attention,
            state spaces, cross-attention); `summary()` says why. By default it is refused by name.

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
        graphs: bool | None = None,
        trim: int | None = None,
        prune: int | None = None,
        top_k: int | None = None,
        max_bytes: int | None = None,
        offload: bool = False,
        strict: bool = False,
        artefact: Artefact | str | None = None,
        bypass: bool = False,
        unsupported: Literal["refuse", "exact"] = "refuse",
        sliding: Literal["exact", "folded"] = "exact",
    ) -> None:
        if isinstance(preset, CacheConfig):
            config = preset
            given = {"keys": keys, "values": values, "overrides": overrides, "sinks": sinks}
            given |= {"window": window, "block": block, "max_tokens": max_tokens}
            given |= {"trim": trim, "prune": prune, "top_k": top_k, "max_bytes": max_bytes}
            given |= {"offload": offload}
            given |= {"slab_blocks": slab_blocks, "strict": strict, "artefact": artefact}
            given |= {"unsupported": unsupported, "sliding": sliding}
            given |= {"graphs": graphs}
            defaults = inspect.signature(FoldedCache.__init__).parameters
            both = [name for name, value in given.items() if value != defaults[name].default]
            if both:
                raise CacheError(
                    f"{', '.join(both)} given beside a CacheConfig: put them into the config "
                    "(dataclasses.replace)"
                )
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
                graphs=graphs,
                trim=trim,
                prune=prune,
                top_k=top_k,
                max_bytes=max_bytes,
                offload=offload,
                strict=strict,
                artefact=artefact,
                unsupported=unsupported,
                sliding=sliding,
            )
        #: why nothing is compressed, where `unsupported="exact"` was needed
        self.exact_because: str | None = None
        infos: list[LayerInfo] = []
        try:
            infos = describe(model)
        except EncoderError:
            raise  # it has no cache that could be kept exact
        except UnsupportedError as error:
            if config.unsupported == "refuse":
                raise _with_way_out(error) from None
            self.exact_because = str(error)
        unknown = sorted(set(config.overrides) - {info.index for info in infos})
        if infos and unknown:
            raise CacheError(
                f"overrides name layers {unknown}; the model has layers 0 to {infos[-1].index}"
            )
        not_full = {
            i.index: i.kind
            for i in infos
            if i.index in config.overrides
            and i.kind != "full_attention"
            and not (i.kind == "sliding_attention" and config.sliding == "folded")
        }
        if not_full:
            raise CacheError(
                f"overrides name layers that keep transformers' own cache: {not_full}; only "
                "full_attention layers are compressed"
            )
        needy = [
            preset
            for preset in (config.preset_of(layer) for layer in (None, *config.overrides))
            if "required" in (preset.keys.artefact, preset.values.artefact)
        ]
        if infos:
            if needy and config.artefact is None:
                config = replace(config, artefact=for_preset(model, needy[0]))
            config.check_artefact(lambda: model_hash(model))
        self.config = config
        self.dtype = next(model.parameters()).dtype
        self._model_config = cast(PreTrainedConfig, model.config)
        # without the modules: the cache does not keep the weights alive
        self._infos = {info.index: replace(info, module=cast(Any, None)) for info in infos}
        self._model = weakref.ref(model)
        #: by which compiled passes find the cache
        self.found_by = compiled.key_of(self)
        self.attention_config: Any = decoder(model).config if infos else None
        limit = getattr(self.attention_config, "max_position_embeddings", None)
        self.timeline = Timeline(
            config.sinks,
            config.window,
            config.block,
            config.slab_blocks,
            config.max_tokens or limit,
            config.budget(),
        )
        self.step: Step | None = None
        #: numbers on the device while a pass is recorded as a graph
        self.static: Numbers | None = None
        self._failed = False
        self.late = Late()
        self._lock = threading.Lock()
        self.notices = Notices(config.strict)
        self._bypass = bypass or not infos
        self._set_layers()
        self._hooks = None if self.exact_because else Hooks(self, model)
        wanted = config.graphs
        if wanted is None:
            wanted = next(model.parameters()).device.type == "cuda"
        self.graphs = Graphs(self, model) if wanted and not self._bypass else None
        if config.evicts and (self._hooks is None or not self._hooks.reads_codes):
            raise UnsupportedError(
                f"{type(model).__name__} does not call attention through transformers' interface, "
                "so it cannot leave tokens out: trim, prune, top_k and max_bytes need a model that "
                "does"
            )

    def _set_layers(self) -> None:
        super().__init__(config=self._model_config)
        if self._bypass:
            return
        for index, layer in enumerate(self.layers):
            info = self._infos.get(index)
            if type(layer) is DynamicLayer and info and info.kind != "cross_attention":
                self.layers[index] = FoldedLayer(self, info, self.config.preset_of(index))
            elif (
                type(layer) is DynamicSlidingWindowLayer
                and self.config.sliding == "folded"
                and info
                and info.kind == "sliding_attention"
            ):
                preset = self.config.preset_of(index)
                self.layers[index] = FoldedLayer(self, info, preset, layer.sliding_window)
        windows = [layer.sliding_window or math.inf for layer in self.folded_layers]
        reach = max(windows, default=math.inf)
        self.timeline.reach = None if reach == math.inf else int(reach)
        if not self.folded_layers:
            kinds = sorted({info.kind for info in self._infos.values()})
            slides = "; sliding='folded' compresses sliding_attention layers too"
            error = UnsupportedError(
                f"no layer of this model can be compressed: its layers are {kinds}, and only "
                "full_attention layers are"
                f"{slides if 'sliding_attention' in kinds else ''}"
            )
            if self.config.unsupported == "refuse":
                raise _with_way_out(error)
            self.exact_because, self._bypass = str(error), True

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
        if sample is None or not sample.numel():
            raise CacheError("the cache is empty; a FoldedCache needs no filled one to start from")
        rows, _, slots, _ = sample.shape
        if attention_mask is not None and attention_mask.shape != (rows, slots):
            raise CacheError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; the cache holds "
                f"[rows, slots] = {(rows, slots)}"
            )
        valid = None if attention_mask is None else attention_mask.bool()
        if position_ids is None and valid is not None:
            position_ids = (valid.long().cumsum(1) - 1).clamp_min(0)
        new.fit(rows)
        step = new.timeline.plan(rows, slots, valid, position_ids)
        new.step = step
        for index, (target, source) in enumerate(zip(new.layers, filled, strict=True)):
            if _is_folded(target):
                target.update(*pairs[index])
            elif type(source) is type(target):
                new.layers[index] = copy.deepcopy(source)
            else:
                raise CacheError(
                    f"layer {index} is a {type(target).__name__} and cannot be taken from a "
                    f"{type(source).__name__}"
                )
        new.timeline.commit(step)
        new.end_step()
        return new

    # --- one pass ------------------------------------------------------------------------------

    @contextmanager
    def _beginning(self) -> Iterator[None]:
        """Hold the cache for a pass, or for nobody where planning it fails."""
        if not self._lock.acquire(blocking=False):
            raise CacheError(
                "this FoldedCache is in the middle of a forward pass of another thread; one cache "
                "serves one generation at a time: make one for each"
            )
        try:
            if self._failed:
                raise CacheError("a forward pass with this cache failed half-way; reset() it first")
            self._check_late()
            yield
        except BaseException:
            self._lock.release()
            raise

    def _check_late(self) -> None:
        """Raise for what the device has found wrong since; the cache is of no use then."""
        try:
            self.late.check()
            for layer in self.folded_layers:
                if layer.store is not None:
                    layer.store.watch.check()
        except ValueError:
            self._failed = True
            raise

    def begin_token(self) -> Step:
        """Plan a pass of one token a row, all cached tokens attended to, without the device."""
        with self._beginning():
            self.step = self._next_token()
            return self.step

    def _next_token(self) -> Step:
        first, lengths = torch.tensor(self.timeline.first), torch.tensor(self.timeline.lengths)
        positions = (first + lengths)[:, None]
        return self.timeline.plan(self.timeline.rows, 1, None, positions, self._worth)

    def end_token(self, step: Step, outcome: Literal["done", "dropped", "failed"] = "done") -> None:
        """Commit what `begin_token` planned, or let it go: dropped as if it had not begun."""
        if outcome == "done":
            self.timeline.commit(step)
        self._failed |= outcome == "failed"
        self.end_step()
        self._lock.release()

    def begin(self, queries: int, rows: int, mask: Any, positions: Tensor | None) -> None:
        """Plan a forward pass; called by the decoder's hook before it runs.

        Where one token a row follows on CUDA, the mask and positions are compared there (`Late`):
        each row takes a token, none is padding.
        """
        with self._beginning():
            slots = self.timeline.slots
            given = [x for x in (mask, positions) if isinstance(x, Tensor)]
            unread = bool(given) and all(x.ndim == 2 and x.is_cuda for x in given)
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
                if not (unread and queries == 1 and slots):
                    self.timeline.check_mask(mask[:, :slots].bool(), thorough=queries > 1)
                    valid = mask[:, slots:].bool()
            elif slots and not self.timeline.unpadded:
                raise CacheError(
                    "the cache holds padded rows and this pass has no attention_mask; pass "
                    f"attention_mask [{rows}, {slots + queries}]"
                )
            if unread and queries == 1 and slots and rows == self.timeline.rows:
                line = self.timeline
                ahead = max(a + n for a, n in zip(line.first, line.lengths, strict=True))
                self._check_length(ahead + 1, None)
                self.step = step = self._next_token()
                numbers = torch.tensor([step.length, step.first])
                length, first = upload(numbers, given[0].device)
                self.late.note(mask, positions, length, first + length - 1)
                return
            self._check_length(slots + queries, positions)
            self.fit(rows)
            self.step = self.timeline.plan(rows, queries, valid, positions, self._worth)

    def fit(self, rows: int) -> None:
        """Before a batch's first pass: how many pages `max_bytes` has room for.

        Raises:
            CacheError: not even the sinks, the window, the tables and one page a row fit.
        """
        if self.config.max_bytes is None or self.timeline.rows:
            return
        stores = [layer.bind(torch.device("cpu"), self.dtype) for layer in self.folded_layers]
        # 16 bytes a page and 128 a layer are more than the addresses of slabs take
        exact = sum(s.exact_nbytes(rows, self.dtype) + 128 for s in stores)
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        kernels = [cpu.held_by(s) for s in stores] if on_cpu else []
        tables = _nbytes(_tensors([[s.key, s.value] for s in stores] + kernels))
        page = sum(s.layout.nbytes + s.mass_nbytes + 16 for s in stores)
        total = (self.config.max_bytes - exact - tables) // page
        if total < rows:
            raise CacheError(
                f"max_bytes ({self.config.max_bytes:,}) is too small for {rows} rows: sinks and "
                f"window take {exact:,} bytes, tables {tables:,}, and one page a row "
                f"{rows * page:,}; at least {exact + tables + rows * page:,} are needed"
            )
        self.timeline.budget = self.config.budget(total)

    def _worth(self) -> list[float]:
        """What each page number is to the layer that attends to it most; infinite if not yet seen.

        The mean over layers is blind: most layers look at no page in particular, and at a quarter
        of the pages it kept the right ones for 17 % of retrieved digits where this keeps all.
        """
        masses = [
            layer.store.mass.double().cpu()
            for layer in self.folded_layers
            if layer.store is not None and layer.store.mass is not None
        ]
        if not masses:
            return [math.inf] * self.timeline.num_pages
        mass, queries = torch.stack(masses).unbind(-1)
        return torch.where(queries > 0, mass / queries, torch.inf).amax(0).tolist()

    def _check_length(self, tokens: int, positions: Tensor | None) -> None:
        bounded = [layer for layer in self.folded_layers if layer.info.rope_limit is not None]
        if bounded and positions is not None:
            tokens = int(positions.max()) + 1
        for layer in bounded:
            layer.info.check_length(tokens, layer.preset.keys)

    def end(self, failed: bool) -> None:
        """Commit a forward pass, or mark the cache as failed; called by the hook after it."""
        step = self.step
        if step is not None:
            updated = any(layer.step is step for layer in self.folded_layers)
            if not failed and updated:
                self.timeline.commit(step)
            elif updated or step.pages:
                self._failed = True
        self.end_step()
        if self._lock.locked():
            self._lock.release()

    def end_step(self) -> None:
        """Let go of the pass under way; what it folds on a stream of its own is waited for."""
        self.step = None
        for layer in self.folded_layers:
            layer.step = None
            if layer.store is not None:
                layer.store.settle()

    @property
    def model(self) -> nn.Module:
        """The model that the cache was made for."""
        model = self._model()
        if model is None:
            raise CacheError("the model of this FoldedCache is gone")
        return model

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
            if self.exact_because:
                raise UnsupportedError(self.exact_because)
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

        `pages` (in use), `pool_unused` (reserved pages), `window` and `sinks` (exact), `mass`
        (attention that pages got, where `prune` is set), `tables`
        (shared by all pages: rotations, codebooks, orders), `exact_layers` (not compressed). Forks
        share their pages, and each counts them.
        """
        parts: dict[str, int] = dict.fromkeys(
            ("pages", "pool_unused", "window", "sinks", "mass", "tables", "exact_layers"), 0
        )
        used = len(self.timeline.numbers.held)
        tables: list[Tensor] = []
        for layer in self.layers:
            if not _is_folded(layer):
                parts["exact_layers"] += sum(t.untyped_storage().nbytes() for t in _tensors(layer))
            elif layer.store is not None:
                for part, size in layer.store.nbytes(used).items():
                    parts[part] += size
                kernel = dispatch.tables_of(layer.store)
                tables += _tensors([layer.store.key, layer.store.value, kernel])
        parts["tables"] = _nbytes(tables)
        return parts

    def uncompressed_nbytes(self, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes of the same tokens in an uncompressed cache of `dtype` (padding not counted)."""
        elements = 0
        for layer in self.folded_layers:
            most = math.inf if layer.sliding_window is None else layer.sliding_window - 1
            tokens = int(sum(min(n, most) for n in self.timeline.lengths))
            width = layer.info.key_dim + layer.info.value_dim
            elements += tokens * layer.info.num_kv_heads * width
        exact = (layer for layer in self.layers if not _is_folded(layer))
        elements += sum(t.numel() for layer in exact for t in _tensors(layer))
        return elements * dtype.itemsize

    def bits_per_element(self) -> float:
        """Stored bits of full pages over their elements, all compressed layers together."""
        layouts = []
        if self._bypass:
            return 8.0 * self.dtype.itemsize
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
        if self.graphs is not None:
            how = self.graphs.reason or f"{self.graphs.replays} steps replayed"
            lines.append(f"  CUDA graphs: {how}")
        exact = [i for i, layer in enumerate(self.layers) if not _is_folded(layer)]
        if exact:
            lines.append(f"  exact (transformers' own classes): layers {_ranges(exact)}")
        if self.exact_because:
            lines.append(f"  nothing is compressed: {self.exact_because}")
        if self.config.offload:
            stores = [layer.store for layer in self.folded_layers if layer.store is not None]
            moved = any(s.is_allocated and s.pool.is_offloaded for s in stores)
            lines.append(
                "  offload: "
                + ("cold pages lie in pinned CPU memory" if moved else "nothing to move (no GPU)")
            )
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
        names = ("trim", "prune", "top_k", "max_bytes")
        budgets = "".join(f", {n}={getattr(c, n)}" for n in names if getattr(c, n) is not None)
        return (
            f"FoldedCache({c.preset_of(None).name!r}, sinks={c.sinks}, window={c.window}, "
            f"block={c.block}{budgets}{', bypass=True' if self._bypass else ''})"
        )

    # --- files ---------------------------------------------------------------------------------

    def save(self, path: str | Path, *, token_ids: Sequence[int] | None = None) -> None:
        """Write all that the cache holds into one file, whole or not at all (`integrations.saved`).

        Args:
            path: of the file.
            token_ids: the tokens that were cached, for whoever looks the file up.

        Raises:
            CacheError: the cache is empty, or in the middle of a pass.
            UnsupportedError: a layer keeps a state that cannot be saved.
        """
        from kvfold.integrations import saved

        saved.save(self, Path(path), token_ids)

    @classmethod
    def load(
        cls, model: nn.Module, path: str | Path, *, artefact: Artefact | str | None = None
    ) -> "FoldedCache":
        """A cache that was saved, also in another process: it goes on where it was.

        Args:
            model: the model it was made with.
            path: of the file.
            artefact: the calibration it was made with, where kvfold does not find it by itself.

        Raises:
            CacheError: damaged, truncated, of another version, another model or another dtype.
            CodecError, CalibrationError: its codecs or its artefact are not those of this kvfold.
        """
        from kvfold.integrations import saved

        return saved.load(cls, model, Path(path), artefact)

    # --- what generation does to it ------------------------------------------------------------

    def reset(self) -> None:
        """Forget every token and free the pages; also after a pass that failed or was stopped."""
        if self._hooks is not None:
            self._hooks.abort()
        self.timeline.reset()
        self.step, self._failed, self.late = None, False, Late()
        self._set_layers()

    def crop(self, max_length: int) -> None:  # type: ignore[override]
        """Keep the first `max_length` slots, or drop `-max_length` where it is not positive.

        A page that is cut is decoded once, back into the exact window.
        """
        max_length = int(max_length)  # assisted decoding counts with tensors
        held = self.get_seq_length()
        keep = min(max_length, held) if max_length > 0 else max(0, held - abs(max_length))
        left = self.timeline.check_crop(keep)
        for layer in self.folded_layers:
            if layer.store is not None:
                layer.store.check_crop(left)
        for layer in self.layers:  # first, since a sliding layer past its window refuses
            # in the one sign that all versions take; 0 trims what a layer recorded for a rollback
            if not _is_folded(layer) and (keep < held or getattr(layer, "record_past", False)):
                layer.crop(keep - held)
        tables = [list(row) for row in self.timeline.table]
        reopened = self.timeline.crop(keep)
        for layer in self.folded_layers:
            if layer.store is not None:
                for row, block in reopened:
                    layer.store.reopen(row, block, tables[row][block])

    def trim(self, tokens: int) -> None:
        """Keep the newest `tokens` cold tokens of each row (whole pages) beside sinks and window.

        Positions stay absolute; the sequence length, which is a count of slots, does not change.
        """
        self._evicting("trim")
        self.timeline.trim(tokens // self.config.block)

    def prune(self, tokens: int | None = None, *, nbytes: int | None = None) -> None:
        """Keep the cold pages of each row that got most attention, in the layer that gave it.

        Attention tells what was asked until now: prune once the question has been read. Rows that
        share a page (a repeated prompt) share what it got.

        Args:
            tokens: budget of a row in cold tokens (whole pages).
            nbytes: budget of all rows in bytes of pages, in place of `tokens`.

        Raises:
            CacheError: the cache was made without `prune=`, so no attention was observed.
        """
        self._evicting("prune")
        if self.config.prune is None:
            raise CacheError(
                "this cache does not observe attention; make it with prune= (a large budget "
                "keeps everything until prune() is called)"
            )
        if (tokens is None) == (nbytes is None):
            raise CacheError("give prune() a budget in tokens or in nbytes, one of them")
        if tokens is None:
            assert nbytes is not None
            page = sum(s.store.layout.nbytes for s in self.folded_layers if s.store is not None)
            tokens = nbytes // (page * self.timeline.rows) * self.config.block if page else 0
        self.timeline.prune(tokens // self.config.block, self._worth())

    def _evicting(self, operation: str) -> None:
        if self._bypass or self._hooks is None or not self._hooks.reads_codes:
            raise UnsupportedError(
                f"{operation}() needs packed layers and a model that calls attention through "
                "transformers' interface"
            )
        if self.step is not None:
            raise CacheError(f"{operation}() in the middle of a forward pass")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes row `beam_idx[i]`; pages are shared, never copied."""
        self._rows("reorder_cache", beam_idx, beam_idx.cpu())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times; pages are shared, never copied."""
        rows = torch.arange(self.timeline.rows).repeat_interleave(repeats)
        self._rows("batch_repeat_interleave", repeats, rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        held = torch.arange(self.timeline.rows)
        rows = held[indices.cpu()] if self.timeline.rows else held
        self._rows("batch_select_indices", indices, rows)

    def _rows(self, operation: str, argument: Any, rows: Tensor) -> None:
        """Apply a row operation: `rows` are the old rows of the new ones."""
        for layer in self.layers:
            if not _is_folded(layer):
                if not hasattr(layer, operation):
                    raise UnsupportedError(f"{type(layer).__name__} has no {operation}")
                getattr(layer, operation)(argument)
        if self._bypass or not self.timeline.rows:
            return
        self.timeline.select(rows.tolist())
        for layer in self.folded_layers:
            if layer.store is not None:
                layer.store.select(rows)

    def fork(self, count: int = 1) -> "FoldedCache":
        """A cache of its own that goes on from here, with each row `count` times.

        The pages of the prompt are shared, never copied: both caches read them, and what either
        adds goes into pages of its own. Sinks and window, which change, are copied.

        Args:
            count: rows of the new cache for each row of this one.
        """
        if count < 1:
            raise CacheError(
                f"fork({count}); at least 1 row for each row of this cache is possible"
            )
        rows = torch.arange(self.timeline.rows).repeat_interleave(count)
        new = self._twin(
            self.timeline.forked(rows.tolist()), lambda store, to: store.forked(to, rows), {}
        )
        for layer in new.layers:
            if not _is_folded(layer) and count > 1:
                layer.batch_repeat_interleave(count)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "FoldedCache":
        """A cache of its own for the same model, with copies of all pages."""
        return self._twin(self.timeline.copied(), LayerStore.copied, memo)

    def _twin(
        self,
        timeline: Timeline,
        store: Callable[[LayerStore, Timeline], LayerStore],
        memo: dict[int, Any],
    ) -> "FoldedCache":
        """A cache for the same model, under this timeline, with layers that `store` makes."""
        if self.step is not None:
            raise CacheError("this FoldedCache is in the middle of a forward pass")
        new = FoldedCache(self.model, self.config, bypass=self._bypass)
        new.timeline = timeline
        for index, layer in enumerate(self.layers):
            if not _is_folded(layer):
                new.layers[index] = copy.deepcopy(layer, memo)
            elif layer.store is not None:
                target = new.layers[index]
                target.dtype, target.device, target.is_initialized = layer.dtype, layer.device, True
                target.store = store(layer.store, timeline)
        return new

    def __reduce__(self) -> Any:
        """Refuse to be pickled: a cache belongs to a model in this process."""
        raise CacheError("a FoldedCache cannot be pickled; pickle its config (cache.config)")


def _with_way_out(error: UnsupportedError) -> UnsupportedError:
    return UnsupportedError(f"{error}; unsupported='exact' keeps such a model uncompressed")


def _is_folded(layer: Any) -> TypeGuard[FoldedLayer]:
    return isinstance(layer, FoldedLayer)


def _nbytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


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
