"""What happens around one forward pass of a model with a `FoldedCache`."""

import functools
import inspect
import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvfold.integrations.describe import decoder
from kvfold.integrations.handles import SWITCH

if TYPE_CHECKING:
    from kvfold.integrations.transformers import FoldedCache


class Hooks:
    """What one cache does around its model's passes.

    It acts only for passes that carry the cache: before, positions and padding are taken and
    kvfold's attention is named (not in a batch's first pass, which runs in the model's own kernel);
    after, also after an exception, the user's choice is restored.
    """

    def __init__(self, cache: "FoldedCache", model: nn.Module) -> None:
        base = decoder(model)
        self.cache, self.base = weakref.ref(cache), weakref.ref(base)
        self.configs = attention_configs(base)
        self.reads_codes = reads_codes(base)
        self.active: int | None = None  # thread of the pass under way
        self.switched = False
        place(base, cache)
        weakref.finalize(cache, self._restore)

    def before(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        """Plan the pass and switch the attention; gives the pass's arguments where they change."""
        cache = self.cache()
        if cache is None or cache.bypass or cache.static is not None:
            return None  # passes that are recorded are planned before
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            return None  # the model's own error is clearer
        rows, queries = tokens.shape[:2]
        self.begin(cache, rows, queries, given.get("attention_mask"), given.get("position_ids"))
        if self.reads_codes and cache.step is not None and not cache.step.is_first:
            SWITCH.take(self.configs)
            self.switched = True
            # what is cached has been checked and padding is not stored: a token sees all of it.
            # transformers would make a mask, and read it back from the device to do so
            whole = len(cache.folded_layers) == len(cache.layers)
            if queries == 1 and whole and kwargs.get("position_ids") is not None:
                return args, {**kwargs, "attention_mask": None}
        return None

    def begin(
        self,
        cache: "FoldedCache",
        rows: int,
        queries: int,
        mask: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """Plan a pass of this thread."""
        if self.active == threading.get_ident():
            self.abort()  # Ctrl-C left the last pass without its end
        cache.begin(queries, rows, mask, positions)
        self.active = threading.get_ident()

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
            self._close(failed=True)

    def end(self, failed: bool) -> None:
        """Commit this thread's pass; nothing where `begin` has refused it to another thread's."""
        if self.active == threading.get_ident():
            self._close(failed)

    def _close(self, failed: bool) -> None:
        self.active = None
        self._restore()
        cache = self.cache()
        if cache is not None:
            cache.end(failed)

    def _restore(self) -> None:
        if self.switched:
            self.switched = False
            SWITCH.give(self.configs)


# --- the hooks of a decoder, one pair for all caches ---------------------------------------------


def _hooks_of(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Hooks | None, dict[str, Any]]:
    """The hooks of the cache that a pass carries, None where it belongs to another model."""
    given = _signature(type(module)).bind_partial(module, *args, **kwargs).arguments
    given = {**given.pop("kwargs", {}), **given}
    hooks = getattr(given.get("past_key_values"), "_hooks", None)
    ours = isinstance(hooks, Hooks) and hooks.base() is module
    return (hooks if ours else None), given


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch.compiler.is_compiling():
        return None  # `compiled.attend` plans when the pass runs
    hooks, given = _hooks_of(module, args, kwargs)
    return hooks and hooks.before(args, kwargs, given)


def _after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        hooks, _ = _hooks_of(module, args, kwargs)
        if hooks is not None:
            hooks.end(failed=output is None)


class _Placed:
    """The pair on one decoder, and how many caches (and routes) need it."""

    def __init__(self) -> None:
        self.count, self.handles = 0, ()

    def hold(self, base: nn.Module) -> None:
        """Count one more, which needs the hooks."""
        self.count += 1
        # a copied model has taken its hooks along
        if not self.handles and _before not in base._forward_pre_hooks.values():
            self.handles = (
                base.register_forward_pre_hook(_before, with_kwargs=True),
                base.register_forward_hook(_after, with_kwargs=True, always_call=True),
            )

    def leave(self) -> None:
        """Count one less; the last one takes the hooks along."""
        with _PLACING:
            self.count -= 1
            if not self.count:
                for handle in self.handles:
                    handle.remove()
                self.handles = ()


_PLACED: "weakref.WeakKeyDictionary[nn.Module, _Placed]" = weakref.WeakKeyDictionary()
#: of threads; one that makes a cache may collect another one meanwhile
_PLACING = threading.RLock()


def place(base: nn.Module, owner: Any) -> None:
    """Keep a decoder's hooks in place while `owner` lives: they stay the same from cache to cache.

    Passes compiled by torch are guarded by the hooks that they were traced with.
    """
    with _PLACING:
        placed = _PLACED.setdefault(base, _Placed())
        placed.hold(base)
    weakref.finalize(owner, placed.leave)


def reads_codes(base: nn.Module) -> bool:
    """Whether a decoder calls attention through transformers' interface.

    Others call torch: `F.scaled_dot_product_attention` on a handle reads codes, products decode.
    """
    return hasattr(sys.modules[type(base).__module__], "ALL_ATTENTION_FUNCTIONS")


def attention_configs(base: nn.Module) -> list[Any]:
    """The configs whose attention implementation the decoder and its layers read."""
    found: dict[int, Any] = {}
    for module in base.modules():
        config = vars(module).get("config")
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found[id(config)] = config
    return list(found.values())
