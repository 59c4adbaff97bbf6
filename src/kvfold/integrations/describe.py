"""What kvfold needs to know of a transformers model: its attention layers, their shapes and RoPE.

Works on decoder models of transformers 5.10 to 5.23. Nothing is patched, and nothing is run but the
model's own rotary embedding on a few random numbers, to see which channels it pairs.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.codec import Codec
from kvfold.transforms.rope import Rope

SUPPORTED = (
    "decoder-only models with ordinary key/value attention (llama, mistral, qwen, gemma, phi, glm, "
    "cohere, gpt-neox, gpt-2, gpt-oss and their like)"
)
#: layer kinds that hold keys and values of every token they may attend to.
ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")
#: position encodings without rotation: added to the embeddings, or to the scores (ALiBi).
_NO_ROPE = {
    *("gpt2", "gpt_bigcode", "gpt_neo", "openai-gpt", "opt", "biogpt", "xglm", "ctrl"),
    *("bloom", "mpt", "jamba", "zamba"),
}
#: models whose full-attention layers leave RoPE out while their sliding ones rotate.
_NO_ROPE_IN_FULL = {"cohere2", "cohere2_moe", "exaone4", "exaone_moe", "afmoe"}
#: inverse frequencies that depend on the length seen so far.
_LENGTH_DEPENDENT = {"dynamic", "longrope"}
_VOLATILE = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"),
    *("use_cache", "quantization_config", "output_attentions", "output_hidden_states"),
    *("return_dict", "id2label", "label2id", "problem_type", "chunk_size_feed_forward"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
}


class UnsupportedError(NotImplementedError):
    """A model that kvfold cannot serve: says which, why, and what is supported."""


class EncoderError(UnsupportedError):
    """A model that keeps no keys and values from pass to pass: there is nothing to compress."""


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a text decoder that owns a cache entry.

    Args:
        index: the layer's index in the cache.
        kind: as in `config.layer_types`: `"full_attention"`, `"sliding_attention"`, ...
        num_kv_heads: key/value heads; 0 where the layer is no attention.
        key_dim: channels of a key head.
        value_dim: channels of a value head.
        rope: the layer's rotation, one without frequencies where the model has none, None where
            it is unknown.
        module: the attention module (the token mixer of a layer that is no attention).
        rope_limit: tokens up to which `rope` holds, where frequencies change with the length
            (dynamic, longrope); None where they never do.
    """

    index: int
    kind: str
    num_kv_heads: int
    key_dim: int
    value_dim: int
    rope: Rope | None
    module: nn.Module = field(compare=False, repr=False)
    rope_limit: int | None = None

    def check_length(self, tokens: int, codec: Codec) -> None:
        """Raise where a codec of keys before RoPE meets frequencies that have changed.

        Args:
            tokens: of the longest row, positions counted.
            codec: of the layer's keys.

        Raises:
            UnsupportedError: more tokens than `rope_limit`.
        """
        if self.rope_limit is not None and codec.pre_rope and tokens > self.rope_limit:
            raise UnsupportedError(
                f"layer {self.index} has rotary frequencies that change beyond {self.rope_limit} "
                f"tokens (dynamic, longrope) and {tokens} were given; "
                f"{type(codec).__name__.lower()} codes keys before RoPE and holds no more: use a "
                "preset that codes keys as they are (turboquant, kivi, spectral), or a model with "
                "fixed frequencies (default, linear, yarn, llama3)"
            )


def decoder(model: nn.Module) -> nn.Module:
    """The text decoder, whose forward gets `attention_mask`, `position_ids` and the cache.

    Raises:
        UnsupportedError: an encoder or encoder-decoder model.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not a transformers model; supported are {SUPPORTED}"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise _unsupported(model, "is an encoder-decoder model")
    found: Any = model
    # wrappers (opt, multimodal models) nest the module that owns the layers
    while hasattr(found, "get_decoder") and (inner := found.get_decoder()) is not found:
        found = inner
    return found


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder, the one whose attention implementation its layers read."""
    config: Any = decoder(model).config
    return config.get_text_config(decoder=True)


def describe(model: nn.Module) -> list[LayerInfo]:
    """The layers of a model that own a cache entry, in order.

    Raises:
        UnsupportedError: no keys and values as kvfold needs them; the message names the model type.
    """
    base, config = decoder(model), text_config(model)
    if getattr(config, "kv_lora_rank", None):
        raise _unsupported(model, "caches latents (multi-head latent attention), not keys")
    if getattr(config, "add_cross_attention", False):
        raise _unsupported(model, "has cross-attention beside the attention of each layer")
    modules = list(base.modules())
    attention, mixers = _attention_modules(modules), _mixers(modules)
    kinds = _layer_kinds(config)
    if not attention and "use_cache" not in inspect.signature(base.forward).parameters:
        raise _unsupported(model, "is an encoder: it has no key/value cache", EncoderError)
    if not attention or not any(kind in ATTENTION_KINDS for kind in kinds):
        raise _unsupported(model, "has no attention layers with a key/value cache")
    if all(getattr(module, "is_causal", True) is False for module in attention.values()):
        raise _unsupported(model, "is an encoder: its attention is not causal", EncoderError)
    ropes: dict[Any, Rope | None] = {}
    layers = []
    for index, kind in enumerate(kinds):
        if kind not in ATTENTION_KINDS and index not in attention:
            mixer = mixers.get(index, base)
            layers.append(LayerInfo(index, kind, 0, 0, 0, None, mixer))
            continue
        if index not in attention:
            raise _unsupported(model, f"has no attention module that kvfold finds in layer {index}")
        module = attention[index]
        if "CrossAttention" in type(module).__name__:  # of mllama: the states of an image
            layers.append(LayerInfo(index, "cross_attention", 0, 0, 0, None, module))
            continue
        heads, key_dim, value_dim = _shape(module, config)
        key = (kind, key_dim, type(module), _skips_rope(module, config, kind, index))
        if key not in ropes:
            ropes[key] = _rope(base, module, config, kind, index, key_dim)
        limit = _rope_limit(base, module, config, kind) if ropes[key] else None
        layers.append(LayerInfo(index, kind, heads, key_dim, value_dim, ropes[key], module, limit))
    return layers


def rope_error(info: LayerInfo, cos: Tensor, sin: Tensor, position_ids: Tensor) -> float:
    """Largest deviation of a model's own position embeddings from `info.rope`'s; a guard.

    Infinite where the shapes differ or the rope is unknown. Rounding alone gives up to 4e-3 in
    bfloat16, 5e-4 in float16 and 1e-6 in float32 (times the attention scaling).

    Args:
        info: the layer.
        cos: the model's cosines `[batch, tokens, rotary_dim]` (or half of it).
        sin: the model's sines.
        position_ids: `[batch, tokens]`; of several axes (multimodal), the first counts.
    """
    if info.rope is None or not info.rope.inv_freq:
        return float("inf")
    if position_ids.ndim == 3:
        position_ids = position_ids[0]
    ours = info.rope.cos_sin(position_ids)
    if cos.shape[-1] == ours[0].shape[-1]:
        layouts = [ours]
    elif cos.shape[-1] == 2 * ours[0].shape[-1]:
        # which of the two a model hands out says nothing about the pairs (glm widens both ways)
        layouts = [
            tuple(torch.cat((half, half), -1) for half in ours),
            tuple(half.repeat_interleave(2, -1) for half in ours),
        ]
    else:
        return float("inf")
    errors = [
        torch.stack([(a - b.float()).abs().amax() for a, b in zip(mine, (cos, sin), strict=True)])
        for mine in layouts
    ]
    return float(torch.stack(errors).amax(1).amin())


def model_hash(model: nn.Module) -> str:
    """A stable hash of a model's config and a sample of its weights (16 hex digits).

    The same for float32, float16 and bfloat16 loads of one checkpoint stored in bfloat16, on any
    device and with any attention implementation.
    """
    config = text_config(model).to_dict()
    digest = hashlib.sha256(json.dumps(_stable(config), sort_keys=True, default=str).encode())
    parameters = {n: p for n, p in decoder(model).named_parameters() if p.ndim == 2}
    names = sorted(parameters)
    keys = [n for n in names if any(k in n for k in ("k_proj", "qkv", "query_key", "c_attn"))]
    for name in dict.fromkeys(names[:1] + names[-1:] + keys[:1] + keys[-1:]):
        weight = parameters[name].detach()
        if weight.is_meta or not weight.is_floating_point():
            continue
        step = max(1, weight.numel() // 1024)
        sample = weight.reshape(-1)[::step][:1024].float().cpu()
        # rounded, so that a bfloat16 load and a float32 load of one checkpoint agree
        digest.update(name.encode() + sample.to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


# --- finding things ----------------------------------------------------------------------------


def _unsupported(
    model: nn.Module, why: str, error: type[UnsupportedError] = UnsupportedError
) -> UnsupportedError:
    kind = getattr(model.config, "model_type", type(model).__name__)
    return error(f"model type {kind!r} {why}; supported are {SUPPORTED}")


def _attention_modules(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Attention modules by layer index."""
    found: dict[int, nn.Module] = {}
    for module in modules:
        index = vars(module).get("layer_idx")
        name = type(module).__name__
        if not isinstance(index, int) or not name.endswith("Attention") or index in found:
            continue
        if "Linear" in name or "Lightning" in name or getattr(module, "is_cross_attention", False):
            continue
        found[index] = module
    return found


def _mixers(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """Of layers that are no attention, the first module that knows its layer."""
    found: dict[int, nn.Module] = {}
    for module in modules:
        index = vars(module).get("layer_idx")
        if isinstance(index, int) and not type(module).__name__.endswith("Layer"):
            found.setdefault(index, module)
    return found


def _layer_kinds(config: Any) -> list[str]:
    """The kinds of the layers that own a cache entry, as transformers' own caches take them."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        kinds = [kind] * config.num_hidden_layers
    kinds = ["full_attention" if kind == "attention" else kind for kind in kinds]
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return kinds[: len(kinds) - shared]


def _shape(module: nn.Module, config: Any) -> tuple[int, int, int]:
    """Key/value heads, channels of a key head, channels of a value head."""
    query_heads = config.num_attention_heads
    key_dim = getattr(module, "head_dim", None) or getattr(module, "head_size", None)
    if key_dim is None:
        key_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    width = getattr(getattr(module, "k_proj", None), "out_features", None)
    if width and width % key_dim == 0:
        heads = width // key_dim
    elif getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        heads = 1
    else:
        heads = getattr(config, "num_kv_heads", None) or query_heads
        heads = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon" and not config.multi_query:
        heads = config.num_kv_heads if config.new_decoder_architecture else query_heads
    width = getattr(getattr(module, "v_proj", None), "out_features", None)
    value_dim = width // heads if width and width % heads == 0 else key_dim
    return heads, key_dim, value_dim


def _skips_rope(module: nn.Module, config: Any, kind: str, index: int) -> bool:
    """Whether this layer of a model with RoPE leaves it out."""
    if getattr(module, "force_rope", False):
        return False
    if config.model_type in _NO_ROPE_IN_FULL and kind == "full_attention":
        return getattr(config, "sliding_window", None) is not None
    use = getattr(module, "use_rope", None)
    if use is None:
        listed = getattr(config, "no_rope_layers", None)
        use = listed[index] if listed else True
    return not use


# --- rope --------------------------------------------------------------------------------------


def _rope(
    base: nn.Module, module: nn.Module, config: Any, kind: str, index: int, key_dim: int
) -> Rope | None:
    if (
        config.model_type in _NO_ROPE
        or getattr(config, "alibi", False)
        or _skips_rope(module, config, kind, index)
    ):
        return Rope(())
    rotary = getattr(module, "rotary_emb", None) or getattr(base, "rotary_emb", None)
    if rotary is None:
        return None
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    rope_type = _rope_type(rotary, kind)
    # of frequencies that change with the length, those of short sequences
    original = "original_" if rope_type in _LENGTH_DEPENDENT else ""
    inv_freq = getattr(rotary, f"{prefix}{original}inv_freq", None)
    if not isinstance(inv_freq, Tensor) or inv_freq.is_meta:
        return None
    scaling = getattr(rotary, f"{prefix}attention_scaling", 1.0)
    frequencies = tuple(inv_freq.detach().float().cpu().tolist())
    if 2 * len(frequencies) > key_dim:
        return None
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return None
    for pairs in ("half", "interleaved"):
        rope = Rope(frequencies, float(scaling), pairs)
        if _agrees(rope, apply, rotary, kind):
            return rope
    return None


def _rope_type(rotary: nn.Module, kind: str) -> str:
    found: Any = getattr(rotary, "rope_type", "default")
    return found.get(kind, "default") if isinstance(found, dict) else found


def _rope_limit(base: nn.Module, module: nn.Module, config: Any, kind: str) -> int | None:
    """Tokens up to which frequencies are those of short sequences; None if they never change."""
    rotary = getattr(module, "rotary_emb", None) or getattr(base, "rotary_emb", None)
    if rotary is None or _rope_type(rotary, kind) not in _LENGTH_DEPENDENT:
        return None
    known = getattr(config, "rope_parameters", None) or {}
    known = known.get(kind, known)
    trained = known.get("original_max_position_embeddings")
    if trained is None or _rope_type(rotary, kind) == "dynamic":
        trained = getattr(rotary, "original_max_seq_len", config.max_position_embeddings)
    return int(trained)


def _agrees(rope: Rope, apply: Callable[..., Any], rotary: nn.Module, kind: str) -> bool:
    """Whether the model's own rotation of random channels is `rope`'s."""
    inv_freq = next(b for b in rotary.buffers() if b.is_floating_point())
    positions = torch.tensor([[0, 1, 5]])
    generator = torch.Generator().manual_seed(20)
    x = torch.randn(1, 2, 3, rope.rotary_dim, generator=generator)
    expected = rope.rotate(x, positions)
    try:
        more = (kind,) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
        x, positions = x.to(inv_freq.device), positions.to(inv_freq.device)
        if hasattr(rotary, "mrope_section"):  # time, height, width; all equal for text
            positions = positions.expand(3, 1, -1)
        with torch.no_grad():
            cos, sin = rotary(x, positions, *more)
            per_head = list(inspect.signature(apply).parameters)[1] == "k"
            out = apply(x, x, cos, sin) if per_head else apply(x, cos, sin)
    except (TypeError, RuntimeError, ValueError, AttributeError, IndexError):
        return False
    found = (out[-1] if isinstance(out, tuple) else out).float().cpu()
    return found.shape == expected.shape and bool((found - expected).abs().max() < 1e-3)


def _stable(config: Any) -> Any:
    """A config without what differs between two loads of the same weights."""
    if isinstance(config, dict):
        return {
            str(k): _stable(v)
            for k, v in config.items()
            if k not in _VOLATILE and "attn_implementation" not in str(k)
        }
    if isinstance(config, (list, tuple)):
        return [_stable(v) for v in config]
    return config
