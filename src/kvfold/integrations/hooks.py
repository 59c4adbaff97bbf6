"""What happens around one forward pass of a model with a `FoldedCache`."""

import inspect
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from kvfold.integrations.describe import decoder
from kvfold.integrations.handles import SWITCH

if TYPE_CHECKING:
    from kvfold.integrations.transformers import FoldedCache


class Hooks:
    """The hooks of one cache on its model's decoder; they go when the cache goes.

    They act only for passes that carry this cache: before, they bring positions and padding and
    name kvfold's attention (not in a batch's first pass, which runs in the model's own kernel);
    after, also after an exception, they restore the user's choice.
    """

    def __init__(self, cache: "FoldedCache", model: nn.Module) -> None:
        base = decoder(model)
        self.cache = weakref.ref(cache)
        self.signature = inspect.signature(base.forward)
        self.configs = attention_configs(base)
        self.reads_codes = reads_codes(base)
        self.active: int | None = None  # thread of the pass under way
        self.switched = False
        handles = (
            base.register_forward_pre_hook(self.before, with_kwargs=True),
            base.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        )

        def close() -> None:
            for handle in handles:
                handle.remove()
            self._restore()

        weakref.finalize(cache, close)

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plan the pass and switch the attention; gives the pass's arguments where they change."""
        cache = self.cache()
        if cache is None:
            return None
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given.pop("kwargs", {}), **given}
        if given.get("past_key_values") is not cache or cache.bypass or cache.static is not None:
            return None  # passes that are recorded are planned before
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model's own error is clearer
        if self.active == threading.get_ident():
            self.abort()  # Ctrl-C left the last pass without its after-hook
        rows, queries = tokens.shape[:2]
        cache.begin(queries, rows, given.get("attention_mask"), given.get("position_ids"))
        self.active = threading.get_ident()
        if self.reads_codes and cache.step is not None and not cache.step.is_first:
            SWITCH.take(self.configs)
            self.switched = True
            # what is cached has been checked and padding is not stored: a token sees all of it.
            # transformers would make a mask, and read it back from the device to do so
            whole = len(cache.folded_layers) == len(cache.layers)
            if queries == 1 and whole and kwargs.get("position_ids") is not None:
                return args, {**kwargs, "attention_mask": None}
        return None

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Restore the attention and commit the pass."""
        # also called where `before` has refused the pass of another thread
        if self.active == threading.get_ident():
            self._end(failed=output is None)

    def abort(self) -> None:
        """Clean up after a pass that was interrupted.

        Raises:
            RuntimeError: another thread is in the middle of a pass.
        """
        alive = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        if self.active in alive:
            raise RuntimeError(
                "this FoldedCache is in the middle of a forward pass of another thread"
            )
        if self.active is not None:
            self._end(failed=True)

    def _end(self, failed: bool) -> None:
        self.active = None
        self._restore()
        cache = self.cache()
        if cache is not None:
            cache.end(failed)

    def _restore(self) -> None:
        if self.switched:
            self.switched = False
            SWITCH.give(self.configs)

    def __reduce__(self) -> Any:
        """A copied or pickled model takes inert hooks along: they belong to no cache."""
        return _inert, ()


def _inert() -> Hooks:
    hooks = Hooks.__new__(Hooks)
    hooks.cache = _no_cache  # type: ignore[assignment]
    hooks.active, hooks.switched = None, False
    return hooks


def _no_cache() -> None:
    return None


def reads_codes(base: nn.Module) -> bool:
    """Whether a decoder calls attention through transformers' interface.

    Others call torch: `F.scaled_dot_product_attention` on a handle reads codes, products decode.
    """
    return hasattr(sys.modules[type(base).__module__], "ALL_ATTENTION_FUNCTIONS")


def attention_configs(base: nn.Module) -> list[Any]:
    """The configs whose attention implementation the decoder and its layers read."""
    found: dict[int, Any] = {}
    for module in base.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
