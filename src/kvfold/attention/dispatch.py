"""Which code attends: a kernel of the device, or the page walk in torch; and why."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Protocol, runtime_checkable

from torch import Tensor

from kvfold.attention import paged, sparse
from kvfold.cache.store import LayerStore, View

#: modules with a kernel, by device type; imported when a device first needs them.
KERNELS: dict[str, str] = {
    "cpu": "kvfold.kernels.cpu",
    "cuda": "kvfold.kernels.triton.decode",
}
#: queries of a row from which a pass over packed history is the page walk's work, not a kernel's.
MAX_QUERIES = 8


#: with `prune=`, one-token steps in which the page walk notes what pages are looked at.
OBSERVE_EVERY = 16
OBSERVED = "the attention mass of pages is observed"
OFFLOADED = "pages lie in CPU memory"
WINDOWED = "the window of a folded sliding-window layer is walked"
#: reasons that the user's own options give: nothing to warn of.
CHOSEN = (OBSERVED, OFFLOADED, WINDOWED)


@runtime_checkable
class Kernel(Protocol):
    """What a module of `kvfold.kernels` that attends offers.

    `tables_of(store)` is what it holds of a layer beside its pages, None before it attended to it.
    One that takes each page's place in its row from `view.on(device).block` says `HOLES = True`;
    views with dropped or unchosen pages go to no other.
    """

    def refuses(self, q: Tensor, view: View) -> str | None:
        """Why the kernel cannot serve these queries and this layer; None where it does."""
        ...

    def attend(
        self,
        q: Tensor,
        view: View,
        *,
        scaling: float,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """What `paged.attend` computes, in float32 or in the dtype of `q`."""
        ...

    def tables_of(self, store: LayerStore) -> object | None:
        """Tables held beside the pages."""
        ...


def tables_of(store: LayerStore) -> object | None:
    """What the device's kernel holds of a layer beside its pages; None where it holds nothing."""
    kernel = sys.modules.get(KERNELS.get(store.key.site.device.type, ""))
    return None if kernel is None else kernel.tables_of(store)  # not loaded: never used


def observes(view: View) -> bool:
    """Whether this pass adds to the running attention mass, which kernels do not report."""
    if view.store.mass is None:
        return False
    return view.step.queries > 1 or view.step.slots % OBSERVE_EVERY == 0


def path(q: Tensor, view: View) -> tuple[Kernel | None, str]:
    """The kernel for these queries, or None and why the page walk in torch takes them."""
    if q.shape[2] > MAX_QUERIES:
        return None, f"{q.shape[2]} queries a row, kernels take up to {MAX_QUERIES}"
    if not any(view.folded):
        return None, "nothing is packed yet"
    name = KERNELS.get(q.device.type)
    if name is None:
        return None, f"no kernel for {q.device.type}"
    if view.store.pool.is_offloaded:
        return None, OFFLOADED
    if observes(view):
        return None, OBSERVED
    if view.store.sliding_window is not None:
        return None, WINDOWED
    try:
        kernel: Kernel = import_module(name)  # type: ignore[assignment]
    except ImportError as error:
        return None, f"{name} needs a package that is missing: {error}"
    if view.has_holes and not getattr(kernel, "HOLES", False):
        return None, f"{name} reads no rows with dropped pages"
    reason = kernel.refuses(q, view)
    return (None, reason) if reason is not None else (kernel, name)


def attend(
    q: Tensor,
    view: View,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    say: Callable[[str, str], None] | None = None,
) -> Tensor:
    """Attention output `[rows, query_heads, queries, value_dim]`, on the fastest path there is.

    Args:
        q: post-RoPE queries `[rows, query_heads, queries, key_dim]`.
        view: what the queries may see; they attend causally by token index.
        scaling: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)` (Gemma 2).
        sink_logits: `[query_heads]` logits that take part in the softmax and carry no value
            (GPT-OSS).
        say: told (topic, message) where a kernel exists for the device and refuses.
    """
    view = sparse.chosen(q, view, scaling)
    kernel, reason = path(q, view)
    if kernel is not None:
        return kernel.attend(q, view, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
    fast_device = q.device.type in KERNELS and q.shape[2] <= MAX_QUERIES and any(view.folded)
    if say is not None and fast_device and reason not in CHOSEN:
        say("slow path", f"attention on packed pages runs in plain torch: {reason}")
    return paged.attend(q, view, scaling=scaling, softcap=softcap, sink_logits=sink_logits)
