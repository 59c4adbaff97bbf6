"""A `FoldedCache` as a file: pages as they are, sinks and window exact, and what they belong to.

A sealed file (`kvfold.sealed`) with the header `kvfold_cache`:

    format, page_format, model_hash, model, dtype, config, codecs, artefact, timeline, exact,
    tokens, sha256

`config` is `CacheConfig.to_json`, `codecs` what its names stood for, with the versions of their
bytes, `artefact` the digest of the calibration, `timeline` the lengths,
runs and page tables, `exact` the class and counters of layers that keep transformers' own states,
`tokens` the token ids if they were given. Tensors are `layers.{i}.{pages|keys|values|mass}`; pages
that rows share are written once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvfold import sealed
from kvfold.cache.config import CacheConfig
from kvfold.cache.timeline import CacheError
from kvfold.calibration.artefact import Artefact, CalibrationError
from kvfold.codec import codec_from_json
from kvfold.integrations.artefacts import found
from kvfold.integrations.describe import UnsupportedError, describe, model_hash
from kvfold.layout import PAGE_FORMAT

if TYPE_CHECKING:
    from kvfold.integrations.transformers import FoldedCache

#: version of the file; a reader refuses others.
FORMAT = 1
KIND = sealed.Kind("saved cache", "kvfold_cache", FORMAT, CacheError)
_HEADER = {"page_format", "model_hash", "model", "dtype", "config", "codecs", "artefact"}
_HEADER |= {"timeline", "exact"}
#: layers of transformers whose states are keys and values.
_PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)


def save(cache: "FoldedCache", path: Path, token_ids: Sequence[int] | None) -> None:
    """`FoldedCache.save`."""
    if cache.step is not None or cache.bypass or not cache.timeline.rows:
        raise CacheError("nothing to save: the cache is empty, in a forward pass, or a bypass")
    if any(layer.sliding_window is not None for layer in cache.folded_layers):
        raise CacheError(
            "a cache with sliding='folded' cannot be saved: its sliding layers hold the pages of "
            "their window alone; sliding='exact' can be"
        )
    model = cache.model
    timeline, numbers = cache.timeline.to_json()
    artefact = cache.config.artefact
    tensors: dict[str, Tensor] = {}
    exact: dict[str, dict[str, Any]] = {}
    folded = {layer.info.index: layer for layer in cache.folded_layers}
    for index, layer in enumerate(cache.layers):
        if index in folded:
            parts = {} if layer.store is None else layer.store.saved(numbers)
        else:
            parts, exact[str(index)] = _states(index, layer)
        tensors |= {f"layers.{index}.{name}": tensor for name, tensor in parts.items()}
    header = {
        "format": FORMAT,
        "page_format": PAGE_FORMAT,
        "model_hash": model_hash(model),
        "model": str(getattr(model.config, "name_or_path", "")),
        "dtype": str(cache.dtype).removeprefix("torch."),
        "config": cache.config.to_json(),
        "codecs": _codecs(cache.config),
        "artefact": None if artefact is None else artefact.digest,
        "timeline": timeline,
        "exact": exact,
        "tokens": None if token_ids is None else [int(t) for t in token_ids],
    }
    sealed.write(path, KIND, header, tensors)


def load(
    cls: "type[FoldedCache]", model: nn.Module, path: Path, artefact: Artefact | str | None
) -> "FoldedCache":
    """`FoldedCache.load`."""
    header, tensors = sealed.read(path, KIND)
    missing = sorted(_HEADER - set(header))
    if missing:
        raise CacheError(f"the header of {path} lacks {missing}")
    _check(header, model, path)
    config = CacheConfig.from_json(header["config"], _artefact(header, model, path, artefact))
    for name, saved in header["codecs"].items():
        for side, knobs in saved.items():
            codec_from_json(knobs)  # says which version is wanted
            if _codecs(config).get(name, {}).get(side) != knobs:
                raise CacheError(f"{path} has {side} of {knobs}; its preset is another one here")
    cache = cls(model, config)
    rows = len(header["timeline"]["lengths"])
    cache.fit(rows)
    cache.timeline.restore(header["timeline"])
    devices = {info.index: _device(info.module, model) for info in describe(model)}
    for index, layer in enumerate(cache.layers):
        prefix = f"layers.{index}."
        parts = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if str(index) in header["exact"]:
            _put_states(layer, parts, header["exact"][str(index)], devices.get(index))
        elif parts:
            layer.dtype, layer.device, layer.is_initialized = cache.dtype, devices[index], True
            layer.store = layer.bind(devices[index], cache.dtype)
            layer.store.restore(parts, cache.dtype)
    return cache


def _codecs(config: CacheConfig) -> dict[str, dict[str, Any]]:
    """The codecs of all layers ("all") and of those that have their own."""
    named = {str(layer): config.preset_of(layer) for layer in config.overrides}
    named["all"] = config.preset_of(None)
    return {
        name: {"keys": preset.keys.to_json(), "values": preset.values.to_json()}
        for name, preset in named.items()
    }


def _check(header: dict[str, Any], model: nn.Module, path: Path) -> None:
    """Raise `CacheError` unless the file is of this page format and model."""
    if header["page_format"] != PAGE_FORMAT:
        raise CacheError(
            f"{path} has pages of format {header['page_format']}; this kvfold reads format "
            f"{PAGE_FORMAT}: fold the prompt again"
        )
    here, dtype = model_hash(model), str(next(model.parameters()).dtype).removeprefix("torch.")
    if header["model_hash"] != here:
        raise CacheError(
            f"{path} was saved with model {header['model']!r} (hash {header['model_hash']}); this "
            f"model has hash {here}"
        )
    if header["dtype"] != dtype:
        raise CacheError(
            f"{path} was saved from a model in {header['dtype']}; this one is in {dtype}: load the "
            f"model with dtype={header['dtype']}"
        )


def _artefact(
    header: dict[str, Any], model: nn.Module, path: Path, given: Artefact | str | None
) -> Artefact | None:
    """The calibration that the pages were coded with, by its digest."""
    wanted = header["artefact"]
    if wanted is None:
        return None
    if given is not None:
        candidates = [given if isinstance(given, Artefact) else Artefact.load(given)]
    else:
        candidates = list(found(model))
    for artefact in candidates:
        if artefact.digest == wanted:
            return artefact
    raise CalibrationError(
        f"{path} was coded with the calibration of sha256 {wanted[:16]}…; "
        f"{'the artefact given is another' if given is not None else 'none here is that one'}: "
        "pass it as artefact="
    )


def _states(index: int, layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and counters of a layer that keeps transformers' own states."""
    if type(layer) not in _PLAIN:
        raise UnsupportedError(
            f"layer {index} is a {type(layer).__name__}; saved are compressed layers and "
            f"{', '.join(kind.__name__ for kind in _PLAIN)}"
        )
    about = {"class": type(layer).__name__, "length": getattr(layer, "cumulative_length", 0)}
    if not layer.is_initialized:
        return {}, about
    return {"keys": layer.keys.cpu(), "values": layer.values.cpu()}, about


def _put_states(
    layer: Any, parts: dict[str, Tensor], about: dict[str, Any], device: torch.device | None
) -> None:
    """The inverse of `_states`."""
    if type(layer).__name__ != about["class"]:
        raise CacheError(
            f"a layer was saved as {about['class']}; this model has {type(layer).__name__} there"
        )
    if parts:
        keys, values = parts["keys"].to(device), parts["values"].to(device)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = about["length"]


def _device(module: nn.Module, model: nn.Module) -> torch.device:
    """Where a layer's states will be."""
    return next(iter(module.parameters()), next(model.parameters())).device
