"""Run a model over calibration text and hand every layer's keys and values to a callback.

Nothing is hooked or patched: the model writes into a cache that keeps nothing.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvfold.calibration.artefact import Artefact, CalibrationError
from kvfold.calibration.fit import Fit
from kvfold.codec import Preset, Side, Site, get
from kvfold.codecs.fisher import Fisher
from kvfold.integrations.describe import (
    LayerInfo,
    UnsupportedError,
    describe,
    model_hash,
    text_config,
)

Visit = Callable[[LayerInfo, Tensor, Tensor, Tensor], None]


class Visitor(DynamicCache):
    """A cache that shows each full-attention layer's states to `visit` and keeps none of them."""

    def __init__(self, config: Any, layers: dict[int, LayerInfo], visit: Visit) -> None:
        super().__init__(config=config)
        self.visited, self.visit = layers, visit

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Show the states of a layer and give them back as they are."""
        info = self.visited.get(layer_idx)
        if info is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        positions = torch.arange(key_states.shape[2], device=key_states.device)
        self.visit(info, key_states, value_states, positions.expand(len(key_states), -1))
        return key_states, value_states


@torch.no_grad()
def visit_states(
    model: nn.Module,
    windows: Tensor,
    visit: Visit,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Call `visit(layer, keys, values, positions)` for each window and full-attention layer.

    Keys are `[1, kv_heads, tokens, key_dim]` after RoPE (`layer.rope.unrotate` undoes it), values
    likewise; they live no longer than the call, so that memory is bounded by one window's forward.

    Args:
        model: a decoder model.
        windows: token ids `[windows, tokens]`; every window starts at position 0.
        visit: called on the layer's device.
        progress: called with windows done and windows in all.
    """
    layers = {info.index: info for info in describe(model) if info.kind == "full_attention"}
    if not layers:
        raise UnsupportedError(
            f"model type {text_config(model).model_type!r} has no full-attention layer to calibrate"
        )
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        for done, window in enumerate(windows, 1):
            cache = Visitor(text_config(model), layers, visit)
            # the logits of one token only: calibration has no use for them
            model(
                input_ids=window[None].to(device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            if progress is not None:
                progress(done, len(windows))
    finally:
        model.train(was_training)


def calibrate(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    preset: str | Preset,
    *,
    tokens: int = 32_768,
    context: int = 2048,
    sinks: int = 4,
    statistics: str | Path | None = None,
    model_name: str | None = None,
    data_name: str = "text",
    progress: Callable[[int, int], None] | None = None,
) -> Artefact:
    """Fit a preset to a model on a text.

    Args:
        model: a decoder model.
        tokenizer: its tokenizer.
        text: what to read, tokenised without special tokens; several are read one after another
            (`fisher` takes windows from them in turn).
        preset: name or preset.
        tokens: how many to read at most, in whole windows.
        context: tokens of a window, cut to the model's limit and to `tokens`.
        sinks: first tokens of each window that are left out.
        statistics: for `fisher`, a file to keep what was collected, and to continue from.
        model_name: for the header, by default the config's.
        data_name: for the header.
        progress: called with windows done and windows in all.

    Raises:
        CalibrationError: nothing to calibrate, or too short a text.
    """
    preset = get(preset)
    if any(isinstance(codec, Fisher) for codec in (preset.keys, preset.values)):
        from kvfold.integrations import collect_fisher  # it builds on this module

        return collect_fisher.calibrate(
            model,
            tokenizer,
            text,
            preset,
            tokens=tokens,
            context=context,
            sinks=sinks,
            statistics=statistics,
            model_name=model_name,
            data_name=data_name,
            progress=progress,
        )
    text = text if isinstance(text, str) else "\n\n".join(text)
    limit = getattr(text_config(model), "max_position_embeddings", None) or context
    context = min(context, limit, tokens)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = min(tokens, len(ids)) // context
    if count < 1 or context <= sinks + 1:
        raise CalibrationError(
            f"the text has {len(ids)} tokens; calibration reads whole windows of {context} and "
            f"needs one at least, longer than {sinks + 1}"
        )
    windows = ids[: count * context].view(count, context)
    device = next(model.parameters()).device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    sites = [
        Site(side, i.num_kv_heads, dim, 128, i.index, dtype, device, i.rope)
        for i in describe(model)
        if i.kind == "full_attention"
        for side, dim in _sides(i)
    ]
    fit = Fit(preset, sites, sinks)

    def visit(info: LayerInfo, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        fit.add(info.index, "key", keys, positions)
        fit.add(info.index, "value", values, positions)

    visit_states(model, windows, visit, progress)
    return fit.artefact(
        {
            "model": model_name or getattr(model.config, "_name_or_path", "") or "model",
            "model_hash": model_hash(model),
            "tokens": count * context,
            "context": context,
            "sinks": sinks,
            "data": data_name,
            "data_sha256": hashlib.sha256(text.encode()).hexdigest(),
        }
    )


def _sides(info: LayerInfo) -> tuple[tuple[Side, int], tuple[Side, int]]:
    return ("key", info.key_dim), ("value", info.value_dim)
