"""Generate with a packed cache and measure it: speed, bytes, agreement with the stock cache."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from kvfold.calibration.artefact import Artefact
from kvfold.codec import Preset
from kvfold.integrations.describe import describe, text_config
from kvfold.integrations.transformers import FoldedCache


class GenerationError(ValueError):
    """A generation that cannot be run as asked: says what was found and what is possible."""


@dataclass(frozen=True)
class Generation:
    """What was generated, and what it took.

    Args:
        text: the continuation, the prompt left out.
        prompt_tokens: tokens of the prompt.
        new_tokens: tokens generated.
        prefill_seconds: until the first new token.
        tokens_per_second: of the decode steps after it; 0 where there was none.
        cache_bytes: every byte that the cache had allocated at the end.
        parts: those bytes by part.
        uncompressed_bytes: of the same tokens in bfloat16, computed from the model's shapes.
        compressed_share: share of the pairs that decode steps read from codes.
        compared: the run with the stock cache, if it was asked for.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    tokens_per_second: float
    cache_bytes: int
    parts: dict[str, int]
    uncompressed_bytes: int
    compressed_share: float
    compared: "Comparison | None" = None
    ids: list[int] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, token ids left out."""
        data = asdict(self)
        del data["ids"]
        return data

    def table(self) -> Table:
        """For a terminal."""
        table = Table(show_header=False)
        table.add_column()
        table.add_column(justify="right")
        ratio = self.cache_bytes / self.uncompressed_bytes
        table.add_row("tokens", f"{self.prompt_tokens} prompt + {self.new_tokens} new")
        table.add_row("prefill", f"{self.prefill_seconds:.2f} s")
        table.add_row("decode", f"{self.tokens_per_second:.1f} tokens/s")
        table.add_row("cache, measured", f"{self.cache_bytes:,} bytes")
        for name, size in self.parts.items():
            if size:
                table.add_row(f"  {name.replace('_', ' ')}", f"{size:,}")
        table.add_row("uncompressed (bf16)", f"{self.uncompressed_bytes:,} bytes")
        table.add_row("cache / uncompressed", f"{ratio:.3f}")
        table.add_row("read from codes", f"{self.compressed_share:.1%}")
        if self.compared is not None:
            c = self.compared
            at = "none" if c.first_difference is None else f"token {c.first_difference + 1}"
            table.add_row("tokens as uncompressed", f"{c.agreement:.1%}")
            table.add_row("first difference", at)
            table.add_row("uncompressed decode", f"{c.tokens_per_second:.1f} tokens/s")
        return table


@dataclass(frozen=True)
class Comparison:
    """The same prompt with transformers' own cache.

    Args:
        text: its continuation.
        tokens_per_second: of its decode steps.
        agreement: share of token places at which both runs have the same token.
        first_difference: index of the first new token that differs, None if none does.
    """

    text: str
    tokens_per_second: float
    agreement: float
    first_difference: int | None


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    preset: str | Preset,
    *,
    max_new_tokens: int = 128,
    sinks: int = 4,
    window: int = 64,
    block: int = 128,
    artefact: Artefact | None = None,
    compare: bool = False,
) -> Generation:
    """Continue a prompt greedily with a packed cache.

    Raises:
        GenerationError: an empty prompt, or more tokens than the model has positions for.
        CodecError, UnsupportedError, CalibrationError: as `FoldedCache` does.
    """
    ids = tokenizer(prompt, return_tensors="pt", verbose=False)["input_ids"] if prompt else None
    if ids is None or not ids.numel():
        raise GenerationError("the prompt is empty; give at least one token of text")
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise GenerationError(
            f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones are past the model's "
            f"limit of {limit} positions; at most {max(0, limit - ids.shape[1])} new tokens fit"
        )
    cache = FoldedCache(model, preset, sinks=sinks, window=window, block=block, artefact=artefact)
    _run(model, tokenizer, ids[:, :16], 2)  # what a first run sets up is not timed
    new, clock = _run(model, tokenizer, ids, max_new_tokens, past_key_values=cache)
    parts = {name: int(size) for name, size in cache.nbytes().items()}
    compared = None
    if compare:
        stock, stock_clock = _run(model, tokenizer, ids, max_new_tokens)
        compared = Comparison(
            tokenizer.decode(stock, skip_special_tokens=True),
            stock_clock.tokens_per_second,
            *_agreement(new, stock),
        )
    return Generation(
        tokenizer.decode(new, skip_special_tokens=True),
        ids.shape[1],
        len(new),
        clock.prefill_seconds,
        clock.tokens_per_second,
        sum(parts.values()),
        parts,
        uncompressed_bytes(model, ids.shape[1] + len(new) - 1),
        cache.compressed_share(),
        compared,
        new,
    )


def uncompressed_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes in bfloat16 of the keys and values of `tokens` tokens of one row."""
    window = getattr(text_config(model), "sliding_window", None) or tokens
    total = 0
    for layer in describe(model):
        kept = min(tokens, window - 1) if layer.kind == "sliding_attention" else tokens
        total += kept * layer.num_kv_heads * (layer.key_dim + layer.value_dim)
    return total * torch.bfloat16.itemsize


class _Clock:
    """A streamer that notes when the prompt and each token arrived."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    @property
    def prefill_seconds(self) -> float:
        return self.times[1] - self.times[0]

    @property
    def tokens_per_second(self) -> float:
        steps = len(self.times) - 2
        return steps / (self.times[-1] - self.times[1]) if steps > 0 else 0.0


def _run(
    model: Any, tokenizer: Any, ids: Tensor, count: int, **more: Any
) -> tuple[list[int], _Clock]:
    clock = _Clock()
    ids = ids.to(next(model.parameters()).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=pad,
        streamer=clock,
        **more,
    )
    return out[0, ids.shape[1] :].tolist(), clock


def _agreement(found: list[int], stock: list[int]) -> tuple[float, int | None]:
    places = max(len(found), len(stock))
    same = [a == b for a, b in zip(found, stock, strict=False)]
    first = same.index(False) if False in same else (len(same) if places > len(same) else None)
    return sum(same) / places, first
