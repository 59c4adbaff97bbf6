"""Ways to run a model on packed caches without passing one: each is undone without trace.

    kvfold.enable(model, "kivi4-g64")  # a fresh cache for every generate(): pipelines, servers
    kvfold.apply(model, "kivi4-g64")   # and for every forward pass that is given none
    with kvfold.fused(model): ...      # kvfold's attention is the model's own while the block runs

transformers' continuous batching (`generate_batch`) keeps pages of its own and is left alone.
"""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from kvfold.cache.config import CacheConfig
from kvfold.codec import Preset
from kvfold.integrations.describe import UnsupportedError, decoder, text_config
from kvfold.integrations.handles import SWITCH
from kvfold.integrations.hooks import attention_configs, place, reads_codes
from kvfold.integrations.transformers import FoldedCache


class RouteError(ValueError):
    """A route that cannot be opened or closed: says what was found and what is possible."""


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While open, the model's attention implementation is kvfold's, for caches of any kind.

    Without it a `FoldedCache` names kvfold's attention for each of its passes and restores the
    user's choice after each; in the block that happens once. Ordinary keys and values still go to
    the implementation that the user chose.

    Raises:
        UnsupportedError: a model that does not call attention through transformers' interface.
    """
    base = decoder(model)
    if not reads_codes(base):
        raise UnsupportedError(
            f"model type {text_config(model).model_type!r} does not call attention through "
            "transformers' interface, so no implementation can be named; it runs with a "
            "FoldedCache all the same"
        )
    configs = attention_configs(base)
    SWITCH.take(configs)
    try:
        yield
    finally:
        SWITCH.give(configs)


# --- a fresh cache for each call of generate -------------------------------------------------


def enable(model: nn.Module, preset: str | Preset | CacheConfig = "turboquant4", **options: Any):
    """Give every `model.generate()` that is passed no cache a fresh `FoldedCache`.

    For pipelines and servers, which call `generate` themselves. Calls with a cache, a
    `cache_implementation` or `use_cache=False` run as they are. Enabling again replaces the preset.

    Args:
        model: the model whose `generate` is wrapped; no other instance is touched.
        preset: as for `FoldedCache`.
        options: as for `FoldedCache`, which is tried out at once and says what does not fit.

    Raises:
        RouteError: the model has no `generate`.
    """
    if not hasattr(model, "generate"):
        raise RouteError(f"{type(model).__name__} has no generate(); enable() wraps that method")
    if _enabled(model):
        disable(model)
    options = {**options, "preset": preset}
    sample = FoldedCache(model, **options)
    options["preset"] = sample.config  # what it found once (an artefact) is not searched again
    for name in CacheConfig.__dataclass_fields__:
        if name != "preset":
            options.pop(name, None)
    before = vars(model).get("generate")
    # nn.Module keeps an attribute of this name in the instance; a partial is copied with the model
    cast(Any, model).generate = functools.partial(_generate, model, options, before)


def disable(model: nn.Module) -> None:
    """Undo `enable`: `model.generate` is again what it was.

    Raises:
        RouteError: the model is not enabled.
    """
    if not _enabled(model):
        raise RouteError(f"kvfold is not enabled on this {type(model).__name__}")
    before = vars(model)["generate"].args[2]
    del vars(model)["generate"]
    if before is not None:
        vars(model)["generate"] = before


def _enabled(model: nn.Module) -> bool:
    return getattr(vars(model).get("generate"), "func", None) is _generate


def _generate(
    model: nn.Module, options: dict[str, Any], before: Any, /, *args: Any, **kwargs: Any
) -> Any:
    """`model.generate` with a fresh cache, where the call does not say otherwise."""
    run = functools.partial(type(model).generate, model) if before is None else before  # type: ignore[attr-defined]
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def asked(name: str) -> Any:
        return kwargs[name] if name in kwargs else getattr(config, name, None)

    own = kwargs.get("past_key_values") is not None or asked("cache_implementation")
    if not own and asked("use_cache") is not False:
        kwargs["past_key_values"] = FoldedCache(model, **options)
    return run(*args, **kwargs)


# --- a fresh cache for each forward pass that starts a sequence ------------------------------


class _Apply:
    """The hook of `apply`: acts on passes that would make transformers' own cache."""

    def __init__(self, model: nn.Module, options: dict[str, Any]) -> None:
        self.model, self.options = model, options
        self.signature = inspect.signature(decoder(model).forward)
        self.handle: Any = None

    def __call__(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        use = given.get("use_cache")
        if use is None:
            use = base.config.use_cache and not base.training
        if not use or given.get("past_key_values") is not None:
            return None
        return args, {**kwargs, "past_key_values": FoldedCache(self.model, **self.options)}


def apply(model: nn.Module, preset: str | Preset | CacheConfig = "turboquant4", **options: Any):
    """Give every `generate()` and every forward pass that is passed no cache a fresh `FoldedCache`.

    For loops written by hand: the first `model(ids)` makes the cache and returns it as
    `past_key_values`, later passes carry it on. Passes with `use_cache=False`, and passes in
    training mode that do not ask for a cache, run as they are.

    Args:
        model: the model; no other instance is touched.
        preset: as for `FoldedCache`.
        options: as for `FoldedCache`.
    """
    if _applied(model):
        remove(model)
    if hasattr(model, "generate"):
        enable(model, preset, **options)
    FoldedCache(model, preset, **options)  # says now what does not fit
    hook = _Apply(model, {**options, "preset": preset})
    place(decoder(model), hook)
    # before the caches' own hooks, which it keeps in place: they see the cache that it makes
    hook.handle = decoder(model).register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def remove(model: nn.Module) -> None:
    """Undo `apply`.

    Raises:
        RouteError: nothing is applied to the model.
    """
    hooks = _applied(model)
    if not hooks:
        raise RouteError(f"kvfold is not applied to this {type(model).__name__}")
    for hook in hooks:
        hook.handle.remove()
    if _enabled(model):
        disable(model)


def _applied(model: nn.Module) -> list[_Apply]:
    return [h for h in decoder(model)._forward_pre_hooks.values() if isinstance(h, _Apply)]


# --- one call --------------------------------------------------------------------------------


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[str] | Sequence[Mapping[str, str]],
    preset: str | Preset | CacheConfig = "turboquant4",
    *,
    cache: FoldedCache | None = None,
    max_new_tokens: int = 128,
    **options: Any,
) -> Any:
    """Continue a prompt with a packed cache: `kvfold.generate(model, tokenizer, "Once upon")`.

    Args:
        model: a decoder model with `generate`.
        tokenizer: its tokenizer.
        prompt: a text, several texts (padded on the left to one batch), or the messages of a chat
            (`[{"role": "user", "content": ...}]`), which the tokenizer's chat template renders.
        preset: as for `FoldedCache`.
        cache: a cache of your own in place of a fresh one, to look at afterwards.
        max_new_tokens: most tokens of a continuation.
        options: for `model.generate`: `do_sample`, `num_beams`, `streamer`, ...

    Returns:
        The continuation without the prompt and special tokens; a list of them for several texts.

    Raises:
        RouteError: an empty prompt, or several prompts and a tokenizer without a padding token.
    """
    if not prompt:
        raise RouteError("the prompt is empty; give a text, a list of texts or of chat messages")
    texts: Any = prompt
    if not isinstance(prompt, str) and isinstance(prompt[0], Mapping):
        texts = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    several = not isinstance(texts, str)
    if several and len(texts) > 1 and tokenizer.pad_token_id is None:
        raise RouteError(
            f"{len(texts)} prompts need padding and the tokenizer has no padding token; set one, "
            "for instance tokenizer.pad_token = tokenizer.eos_token"
        )
    inputs = tokenizer(
        list(texts) if several else [texts],
        return_tensors="pt",
        padding=several and len(texts) > 1,
        padding_side="left",
        return_token_type_ids=False,
        add_special_tokens=texts is prompt,  # a chat template writes them itself
    ).to(next(model.parameters()).device)
    if not inputs["input_ids"].shape[1]:
        raise RouteError("the prompt holds no token; give at least one token of text")
    if tokenizer.pad_token_id is not None:
        options.setdefault("pad_token_id", tokenizer.pad_token_id)
    with torch.no_grad():
        out = cast(Any, model).generate(
            **inputs,
            past_key_values=cache or FoldedCache(model, preset),
            max_new_tokens=max_new_tokens,
            **options,
        )
    ids = out if isinstance(out, torch.Tensor) else out.sequences
    new = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return new if several else new[0]
