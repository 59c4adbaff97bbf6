"""Fused decode attention on CPUs: packed pages, sinks and window in one pass, in C++.

One call serves all rows and heads of a layer, 1 to 8 queries a row, on the threads that torch uses.
The instruction set is the best that the machine has; `KVFOLD_CPU=portable` (or `avx2`, `avx512`)
names another. Sums of digits are exact: queries and weights become fixed point, 24 bits for float32
queries and 16 for half precision, and everything else is float32.
"""

import os
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvfold.cache.store import LayerStore, View
from kvfold.kernels.cpu.tables import TYPES, LayerTables, tensors_of, unserved
from kvfold.transforms.rope import Rope

if TYPE_CHECKING:
    from kvfold.cache.timeline import Located

#: a page's place in its row is taken from `View.on`, so that rows may have holes.
HOLES = True


def native() -> ModuleType | None:
    """The extension, or None where it was not built."""
    try:
        from kvfold.kernels.cpu import _native  # type: ignore[attr-defined]
    except ImportError:
        return None
    return _native


def instruction_sets() -> list[str]:
    """What this machine can run, best first; empty where the extension was not built."""
    found = native()
    return [] if found is None else found.instruction_sets()


@lru_cache(maxsize=1)
def _default() -> str:
    wanted, possible = os.environ.get("KVFOLD_CPU"), instruction_sets()
    if wanted is not None and wanted not in possible:
        raise ValueError(f"KVFOLD_CPU is {wanted!r}; this machine has {', '.join(possible)}")
    return wanted or possible[0]


@lru_cache(maxsize=8)
def _entry(isa: str) -> int:
    found = native()
    assert found is not None
    return found.entry(isa)


@lru_cache(maxsize=8)
def fold_entry(isa: str | None) -> int:
    """Address of the fold of an instruction set; None for the best."""
    found = native()
    assert found is not None
    return found.fold_entry(isa or _default())


def refuses(q: Tensor, view: View) -> str | None:
    """Why the kernel cannot serve these queries and this layer; None where it does."""
    if native() is None:
        return "kvfold was installed without its C++ extension (kvfold.kernels.cpu)"
    for what, states in (("queries", q), ("keys", view.keys)):
        if states.dtype not in TYPES:
            return f"{what} are {states.dtype}, possible are {', '.join(map(str, TYPES))}"
    return None if tables_of(view.store) is not None else unserved(view.store)


def tables_of(store: LayerStore) -> "LayerTables | None":
    """What the kernel holds of a layer beside its pages; None before it attended to it."""
    return store.__dict__.get("cpu_tables")


def held_by(store: LayerStore) -> list[Tensor]:
    """What the extension will hold of a layer beside its pages, where it serves the layer."""
    from kvfold.kernels.cpu import fold

    found = [] if native() is None or unserved(store) is not None else tensors_of(store)
    return found + [t for bound in (store.key, store.value) for t in fold.held_by(bound)]


def attend(
    q: Tensor,
    view: View,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    isa: str | None = None,
) -> Tensor:
    """Attention output `[rows, query_heads, queries, value_dim]` in the dtype of `q`.

    Laid out in memory as `[rows, queries, query_heads, value_dim]`, as models go on with it.

    Args:
        q: post-RoPE queries `[rows, query_heads, queries, key_dim]`, float32 or half precision.
        view: what the queries may see; they attend causally by token index.
        scaling: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sink_logits: `[query_heads]` logits that take part in the softmax and carry no value.
        isa: instruction set; None for the best.
    """
    store, step = view.store, view.step
    tables = tables_of(store)
    if tables is None:
        tables = store.__dict__["cpu_tables"] = LayerTables.of(store)
    places = [slab.data_ptr() for slab in store.pool.slabs]
    if tables.placed != places:
        tables.layer.place(places)
        tables.placed = places
    shared = step.memo(
        ("cpu", id(view.tokens), id(view.chosen), view.folded), lambda: _Shared(view)
    )
    turns = 0
    if tables.rope is not None:
        turns = shared.turns(tables.rope)
    if q.stride(3) != 1:
        q = q.contiguous()
    rows, query_heads, queries, _ = q.shape
    out = torch.empty(rows, queries, query_heads, tables.value_dim, dtype=q.dtype)
    logits = 0
    if sink_logits is not None:
        sink_logits = sink_logits.detach().float().contiguous()
        logits = sink_logits.data_ptr()
    q_row, q_head, q_query, _ = q.stride()
    key_row, key_head, key_token, _ = view.keys.stride()
    value_row, value_head, value_token, _ = view.values.stride()
    width = query_heads * tables.value_dim
    tables.native.attend(
        tables.layer,
        shared.step,
        _entry(isa or _default()),
        turns,
        q.data_ptr(),
        out.data_ptr(),
        TYPES[q.dtype],
        query_heads,
        q_row,
        q_head,
        q_query,
        queries * width,
        tables.value_dim,
        width,
        view.keys.data_ptr(),
        view.values.data_ptr(),
        TYPES[view.keys.dtype],
        key_row,
        key_head,
        key_token,
        value_row,
        value_head,
        value_token,
        scaling,
        softcap or 0.0,
        logits,
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


class _Shared:
    """What all layers of a step read alike, made once a step."""

    def __init__(self, view: View) -> None:
        self.at: Located = view.on(torch.device("cpu"))
        self.sinks, self.block = view.store.timeline.sinks, view.store.timeline.block
        # held, because the extension keeps their addresses
        self.held = (
            view.query_tokens.long().contiguous(),
            view.tokens.long().contiguous(),
            view.tokens,
        )
        found = native()
        assert found is not None
        self.step = found.Step(
            len(self.at.folded),
            view.query_tokens.shape[1],
            self.held[0].data_ptr(),
            self.held[1].data_ptr(),
            view.tokens.shape[1],
            self.at.folded.data_ptr(),
            self.at.first.data_ptr(),
            self.at.table.data_ptr(),
            self.at.block.data_ptr(),
            self.at.table.shape[1],
        )
        self.by_rope: dict[Rope, Tensor] = {}

    def turns(self, rope: Rope) -> int:
        """Cosines and sines `[rows, pages, 2, pairs]` at the first positions of the pages."""
        if rope not in self.by_rope:
            start = self.at.first[:, None] + self.sinks + self.at.block * self.block
            self.by_rope[rope] = torch.stack(rope.cos_sin(start), -2).contiguous()
        return self.by_rope[rope].data_ptr()
