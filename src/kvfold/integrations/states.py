"""The keys and values that each layer of a model sees for some tokens, before and after RoPE."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kvfold.integrations.collect import Visitor
from kvfold.integrations.describe import (
    ATTENTION_KINDS,
    LayerInfo,
    UnsupportedError,
    decoder,
    describe,
    text_config,
)


@dataclass(frozen=True)
class LayerStates:
    """What one attention layer caches.

    Args:
        layer: the layer's index.
        kind: as in `config.layer_types`.
        keys: `[rows, kv_heads, tokens, key_dim]` after RoPE, as the cache gets them.
        keys_before_rope: the same without their rotation, in float32; equal to `keys` where the
            layer does not rotate.
        values: `[rows, kv_heads, tokens, value_dim]`.
        positions: `[rows, tokens]` that RoPE saw.
    """

    layer: int
    kind: str
    keys: Tensor
    keys_before_rope: Tensor
    values: Tensor
    positions: Tensor


@torch.no_grad()
def collect_kv(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    layers: Iterable[int] | None = None,
) -> list[LayerStates]:
    """Run one pass and give what each attention layer would cache; nothing of the model changes.

    Args:
        model: a decoder model.
        input_ids: `[rows, tokens]`.
        attention_mask: `[rows, tokens]`, for a padded batch; positions then count tokens.
        layers: which layers; None for every one that attends to cached keys.

    Raises:
        UnsupportedError: an encoder (ViT, BERT, ESM, ...) or another model without keys and
            values; a layer whose rotation is unknown.
    """
    wanted = None if layers is None else set(layers)
    infos = {
        info.index: info
        for info in describe(model)
        if info.kind in ATTENTION_KINDS and (wanted is None or info.index in wanted)
    }
    missing = (wanted or set()) - set(infos)
    if missing:
        raise UnsupportedError(f"layers {sorted(missing)} cache no keys and values in this model")
    unknown = [info.index for info in infos.values() if info.rope is None]
    if unknown:
        raise UnsupportedError(
            f"model type {text_config(model).model_type!r}: the rotation of layers {unknown} is "
            "unknown, so keys before RoPE cannot be given"
        )
    device = next(model.parameters()).device
    positions = torch.arange(input_ids.shape[1], device=device).expand(len(input_ids), -1)
    more = {}
    if attention_mask is not None:
        positions = (attention_mask.to(device).long().cumsum(1) - 1).clamp_min(0)
        more = {"attention_mask": attention_mask.to(device), "position_ids": positions}
    found = []

    def visit(info: LayerInfo, keys: Tensor, values: Tensor, _: Tensor) -> None:
        assert info.rope is not None
        before = info.rope.unrotate(keys.float(), positions.to(keys.device))
        found.append(LayerStates(info.index, info.kind, keys, before, values, positions))

    cache: DynamicCache = Visitor(text_config(model), infos, visit)
    was_training = model.training
    model.eval()
    try:
        decoder(model)(
            input_ids=input_ids.to(device), past_key_values=cache, use_cache=True, **more
        )
    finally:
        model.train(was_training)
    return found
