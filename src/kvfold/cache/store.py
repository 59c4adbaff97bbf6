"""One layer's keys and values: sinks and hot window exact, the rest packed in pages.

Appending costs the same at any length: a token goes into the ring of `window + block` slots (token
k in slot `(k - sinks) % size`), and when a block leaves the window it is coded once into a page.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kvfold.cache.numbers import Numbers
from kvfold.cache.pool import Pool, WindowPool
from kvfold.cache.timeline import DROPPED, CacheError, Located, Step, Timeline, upload
from kvfold.codec import BoundCodec, CodecError, check_states, exact_math, page_layout

#: elements of keys that one group of pages may decode to: the most extra memory of a walk.
GROUP_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23, "mps": 1 << 21}

#: modules that encode blocks of some codecs (`serves`) in fewer passes, by device type; the bytes
#: are those of `BoundCodec.encode` but for ties. Imported when a device first needs them.
ENCODERS = {"cpu": "kvfold.kernels.cpu.fold"}
if find_spec("triton"):
    ENCODERS["cuda"] = "kvfold.kernels.triton.fold"


@dataclass(frozen=True)
class Pages:
    """A group of pages on their way to attention; `n = rows * blocks` pages, row after row."""

    keys: dict[str, Tensor]  #: fields [n, ...]
    values: dict[str, Tensor]
    positions: Tensor  #: [n, block] RoPE positions
    valid: Tensor  #: [rows, blocks] bool; False where a row has fewer pages


@dataclass(frozen=True)
class Sources:
    """Where the tokens of some blocks lie, as index tensors `[blocks, block]`.

    Args:
        row: `[blocks]` row of each block.
        ring: slot of the ring, None where no token is there.
        fresh: slot of the pass, None where no token is there.
        old: `[blocks, block, 1, 1]` which of the two holds a token.
        positions: RoPE positions.
        run: rows, slots and blocks a row where blocks lie in a row in the pass, those of all rows
            one after the other; else None.
    """

    row: Tensor
    ring: Tensor | None
    fresh: Tensor | None
    old: Tensor
    positions: Tensor
    run: tuple[slice, slice, int] | None = None

    def on(self, device: torch.device) -> "Sources":
        """The same on a device."""
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        if self.run is not None:
            tensors = {"positions": self.positions}
        return replace(self, **{name: upload(x, device) for name, x in tensors.items()})

    def gather(self, ring: Tensor, fresh: Tensor | None) -> Tensor:
        """The blocks `[blocks, heads, block, dim]` out of `[rows, heads, slots, dim]` states."""
        if self.run is not None:  # a view of one row, else one plain copy
            assert fresh is not None
            rows, slots, blocks = self.run
            tiles = fresh[rows, :, slots].unflatten(2, (blocks, -1))
            return tiles.permute(2, 0, 1, 3, 4).flatten(0, 1)
        row = self.row[:, None]
        if self.fresh is None:
            return ring[row, :, self.ring].transpose(1, 2)
        assert fresh is not None
        new = fresh[row, :, self.fresh]  # [blocks, block, heads, dim]
        if self.ring is not None:
            new = torch.where(self.old, ring[row, :, self.ring], new)
        return new.transpose(1, 2)


def _run(row: Tensor, slots: Tensor) -> tuple[slice, slice, int] | None:
    """`Sources.run` of blocks `[blocks, block]` in rows `[blocks]`."""
    first, count = int(row[0]), len(row.unique())
    blocks, block = len(row) // count, slots.shape[1]
    begin = int(slots[0, 0])
    rows = torch.arange(first, first + count).repeat(blocks)
    wanted = torch.arange(begin, begin + blocks * block).view(blocks, block)
    if not torch.equal(row, rows) or not torch.equal(slots, wanted.repeat_interleave(count, 0)):
        return None
    return slice(first, first + count), slice(begin, begin + blocks * block), blocks


class Watch:
    """Refuses states that no code can hold; on an accelerator without waiting for it.

    There the largest magnitude is copied to the host when it is known, and the error comes at the
    first `check` after that: at the next pass, mostly.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[str, Tensor, torch.cuda.Event]] = []

    def add(self, x: Tensor, what: str) -> None:
        """Look at states that are being folded."""
        if x.device.type != "cuda":
            check_states(x, what)
            return
        top = torch.empty((), dtype=x.dtype, pin_memory=True)
        # one pass over strided states, by tiles that lie in a row; NaN comes through
        most = torch.linalg.vector_norm(x, float("inf"), dim=(2, 3)).amax()
        top.copy_(most, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.pending.append((what, top, event))

    def check(self) -> None:
        """Raise `CodecError` for states that are known to be bad by now."""
        while self.pending and self.pending[0][2].query():
            what, top, _ = self.pending.pop(0)
            check_states(top, what)


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which first passes are folded."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class View:
    """What the queries of one step see of a layer: exact states, then pages.

    Where the step is one token a row, the exact states are the store's own (sinks, then the ring)
    and hold until the next append; elsewhere they are a copy.

    Args:
        keys: exact keys `[rows, heads, exact, key_dim]`: sinks, window, and this step's tokens.
        values: exact values, likewise.
        tokens: `[rows, exact]` token index of each, -1 where a slot is empty.
        query_tokens: `[rows, queries]` token index of each query, -1 for padding.
        folded: blocks of each row that are folded for these queries, dropped ones included.
        store: the layer.
        step: the step.
        chosen: the pages that the queries read; None for all that are held (`on`).
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor
    query_tokens: Tensor
    folded: tuple[int, ...]
    store: "LayerStore"
    step: Step
    chosen: Located | None = None

    def on(self, device: torch.device) -> Located:
        """The pages that the queries read, for kernels and for the page walk."""
        return self.chosen or self.step.on(device, self.folded)

    @property
    def has_holes(self) -> bool:
        """Whether blocks are left out: page i of a row is not block i there."""
        return self.chosen is not None or self.step.dropped(self.folded)


class LayerStore:
    """The packed cache of one layer, for all rows of a batch; allocated by its first states."""

    pool: Pool
    exact_keys: Tensor  #: [rows, heads, sinks + window + block, key_dim]: sinks, then the ring
    exact_values: Tensor
    mass: Tensor | None  #: [page numbers, 2] attention that each got, and queries that read it

    def __init__(
        self,
        key: BoundCodec,
        value: BoundCodec,
        timeline: Timeline,
        sliding_window: int | None = None,
    ) -> None:
        self.key, self.value, self.timeline = key, value, timeline
        #: tokens that a query sees, itself included; None for all
        self.sliding_window = sliding_window
        self.layout = page_layout(key, value)
        self.ring_len = timeline.window + timeline.block
        self.is_allocated = False
        self.watch = Watch()
        #: when what is folded on another stream will be there
        self.folding: Any = None
        self.mass = None

    @property
    def sink_keys(self) -> Tensor:
        """`[rows, heads, sinks, key_dim]`."""
        return self.exact_keys[:, :, : self.timeline.sinks]

    @property
    def sink_values(self) -> Tensor:
        """`[rows, heads, sinks, value_dim]`."""
        return self.exact_values[:, :, : self.timeline.sinks]

    @property
    def ring_keys(self) -> Tensor:
        """`[rows, heads, window + block, key_dim]`."""
        return self.exact_keys[:, :, self.timeline.sinks :]

    @property
    def ring_values(self) -> Tensor:
        """`[rows, heads, window + block, value_dim]`."""
        return self.exact_values[:, :, self.timeline.sinks :]

    # --- writing ---------------------------------------------------------------------------

    @exact_math
    def append(self, keys: Tensor, values: Tensor, step: Step) -> View | None:
        """Add the step's tokens, `[rows, heads, queries, dim]`, and fold what leaves the window.

        Gives what the step's queries are to attend to. One token a row reads what was just folded;
        a longer pass sees its own tokens and what was hot before it exactly; the first pass of a
        batch sees nothing but its own states (None).
        """
        self._check(keys, values, step)
        self.settle()
        if not self.is_allocated:
            self._allocate(keys, values, step)
        self.pool.reserve(step.num_pages)
        self._reserve_mass(step)
        if step.reads_folded_now:
            self._write_exact(keys, values, step, (0,) * step.rows)
            self._fold(None, None, step)
            self._let_go(step)
            return None if step.is_first else self._view(step, step.folded, step.length)
        view = None
        if not step.is_first:
            view = self._view(step, step.folded_before, step.start, (keys, values))
        with self._beside(keys, values, step):
            self._fold(keys, values, step)
        self._write_exact(keys, values, step, step.folded)
        self._let_go(step)
        return view

    @contextmanager
    def _beside(self, keys: Tensor, values: Tensor, step: Step) -> Iterator[None]:
        """Fold a batch's first pass on a stream of its own: nothing in that pass reads pages.

        The stream waits for all that came before, so it takes no memory that is still read.
        """
        if not (step.is_first and keys.is_cuda):
            yield
            return
        stream = _side_stream(keys.device)
        stream.wait_stream(torch.cuda.current_stream(keys.device))
        with torch.cuda.stream(stream):
            yield
        for states in (keys, values):
            states.record_stream(stream)
        self.folding = stream.record_event()

    def settle(self) -> None:
        """Let the current stream wait for what is folded beside it."""
        if self.folding is not None:
            torch.cuda.current_stream(self.ring_keys.device).wait_event(self.folding)
            self.folding = None

    def fold_due(self, step: Step) -> None:
        """Fold a step's due blocks before its token is written, where passes are replayed."""
        self.settle()
        self.pool.reserve(step.num_pages)
        self._fold(None, None, step)

    def append_in_place(self, keys: Tensor, values: Tensor, numbers: Numbers, step: Step) -> View:
        """Write one token a row where the device's numbers say, and view what they say.

        Nothing here depends on a length that the host knows, so that a graph may replay it.
        """
        rows = keys.shape[0]
        for states, exact in ((keys, self.exact_keys), (values, self.exact_values)):
            slot = numbers.slot.long().view(rows, 1, 1, 1).expand(-1, *exact.shape[1:2], 1, 1)
            exact.scatter_(2, slot.expand(-1, -1, -1, exact.shape[3]), states)
        return View(
            self.exact_keys,
            self.exact_values,
            numbers.tokens,
            numbers.query_tokens,
            step.folded,
            self,
            step,
            numbers.located,
        )

    def _check(self, keys: Tensor, values: Tensor, step: Step) -> None:
        for states, bound in ((keys, self.key), (values, self.value)):
            site = bound.site
            wanted = (step.rows, site.num_kv_heads, step.queries, site.head_dim)
            if tuple(states.shape) != wanted:
                raise CodecError(
                    f"layer {site.layer}: {site.side}_states have shape {tuple(states.shape)}; "
                    f"[rows, kv_heads, tokens, head_dim] = {wanted} is expected"
                )

    def _allocate(self, keys: Tensor, values: Tensor, step: Step) -> None:
        def empty(like: Tensor) -> Tensor:
            shape = (step.rows, like.shape[1], self.timeline.sinks + self.ring_len, like.shape[3])
            return torch.zeros(shape, dtype=like.dtype, device=like.device)

        # not inference tensors: a prefix folded under inference_mode is continued elsewhere
        with torch.inference_mode(False):
            self.exact_keys, self.exact_values = empty(keys), empty(values)
        kind = Pool if self.sliding_window is None else WindowPool
        self.pool = kind(
            self.layout.nbytes, step.slab_pages, keys.device, self.timeline.budget.offload
        )
        self.is_allocated = True

    def _reserve_mass(self, step: Step) -> None:
        """Room for the attention mass of all pages where the budget prunes; new ones have none."""
        if self.timeline.budget.prune is None:
            return
        held = 0 if self.mass is None else len(self.mass)
        if held < step.num_pages:
            with torch.inference_mode(False):
                more = self.exact_keys.new_zeros(step.num_pages - held, 2, dtype=torch.float32)
                self.mass = more if self.mass is None else torch.cat((self.mass, more))
        if step.pages and self.mass is not None:
            self.mass[torch.tensor([n for _, _, n in step.pages], device=self.mass.device)] = 0.0

    def observe(self, view: View, mass: Tensor) -> None:
        """Add to the running attention mass what queries gave to pages.

        Args:
            view: what the queries read.
            mass: `[rows, pages, 2]` share of a query's weight that the page got, summed over
                queries, and queries.
        """
        if self.mass is not None:
            located = view.on(self.mass.device)
            valid = torch.arange(located.table.shape[1], device=self.mass.device)
            valid = valid < located.folded[:, None]
            self.mass.index_add_(
                0, located.table.flatten(), (mass * valid[..., None]).flatten(0, 1)
            )

    def _write_exact(self, keys: Tensor, values: Tensor, step: Step, folded: Sequence[int]) -> None:
        """Put the step's tokens that stay exact into the sinks and the ring."""
        sinks = self.timeline.sinks
        if step.reads_folded_now and step.source is None:
            slots = [k if k < sinks else sinks + (k - sinks) % self.ring_len for k in step.start]
            if len(set(slots)) == 1:  # decoding with rows of one length: one slot for all
                self.exact_keys[:, :, slots[0]] = keys[:, :, 0]
                self.exact_values[:, :, slots[0]] = values[:, :, 0]
                return
            device = keys.device
            row, at = step.memo(
                ("slots", device),
                lambda: upload(torch.tensor([list(range(step.rows)), slots]), device),
            )
            self.exact_keys[row, :, at] = keys[:, :, 0]
            self.exact_values[row, :, at] = values[:, :, 0]
            return
        kept = step.memo(
            ("kept", keys.device, tuple(folded)), lambda: self._kept(step, folded, keys.device)
        )
        for r, slots, to in kept:
            self.exact_keys[r, :, to] = keys[r, :, slots]
            self.exact_values[r, :, to] = values[r, :, slots]

    def _kept(
        self, step: Step, folded: Sequence[int], device: torch.device
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Of each row the pass's slots that stay exact, and where they go among the exact ones."""
        sinks, found = self.timeline.sinks, []
        for r in range(step.rows):
            new = torch.arange(step.start[r], step.start[r] + step.count[r])
            first_hot = sinks + self.timeline.block * folded[r]
            new = new[(new < sinks) | (new >= first_hot)]
            to = torch.where(new < sinks, new, sinks + (new - sinks) % self.ring_len)
            if len(new):
                slots = self._slots(step, r, new - step.start[r])
                found.append((r, upload(slots, device), upload(to, device)))
        return found

    def _slots(self, step: Step, row: int, nth: Tensor) -> Tensor:
        """Slots within the pass of a row's nth new tokens."""
        return nth if step.source is None else step.source[row, nth]

    def _fold(self, keys: Tensor | None, values: Tensor | None, step: Step) -> None:
        """Code the step's due blocks into pages, a bounded number at a time."""
        self.watch.check()
        if not step.pages:
            return
        group = self.group_blocks(1)
        group = group // step.rows * step.rows or group  # the same blocks of all rows
        device = self.ring_keys.device
        # of a long first pass, what a sliding window has left behind is not coded at all
        first = [self.first_seen(n, self.timeline.block) for n in step.length]
        pages = [page for page in step.pages if page[1] >= first[page[0]]]
        for i in range(0, len(pages), group):
            due = pages[i : i + group]
            where = step.memo(
                ("fold", device, i, self.sliding_window),
                lambda due=due: self._sources(step, due).on(device),
            )
            fields = []
            for bound, fresh, ring in (
                (self.key, keys, self.ring_keys),
                (self.value, values, self.ring_values),
            ):
                x = where.gather(ring, fresh)
                self.watch.add(x, f"layer {bound.site.layer}: {bound.site.side}_states")
                fields.append(self.encoded(bound, x, where.positions))
            self.pool.write([n for _, _, n in due], torch.cat(fields, 1))

    def first_seen(self, length: int, slack: int = 0) -> int:
        """First block that a row's next query may see, and one `slack` tokens before it."""
        if self.sliding_window is None:
            return 0
        timeline = self.timeline
        behind = length - self.sliding_window - slack - timeline.sinks + 1
        return max(0, behind // timeline.block)

    def _let_go(self, step: Step) -> None:
        """Free the pages that no row of any fork will see again, but for a crop of one block."""
        if not isinstance(self.pool, WindowPool) or not step.pages:
            return
        timeline, kept = self.timeline, set()
        for other in timeline.numbers.timelines:
            # this step's own queries have yet to read what they see
            lengths = step.start if other is timeline else other.lengths
            for row, length in zip(other.table, lengths, strict=True):
                kept.update(row[self.first_seen(length, timeline.block) :])
        self.pool.keep(kept)

    def check_crop(self, left: Sequence[int]) -> None:
        """Raise `CacheError` where rows of these lengths would need pages that were let go of."""
        if not self.is_allocated or not isinstance(self.pool, WindowPool):
            return
        for r, length in enumerate(left):
            blocks = -(-max(0, length - self.timeline.sinks) // self.timeline.block)
            needed = self.timeline.table[r][self.first_seen(length) : blocks]
            if any(n not in self.pool.places for n in needed):
                raise CacheError(
                    f"a crop of row {r} from {self.timeline.lengths[r]} to {length} tokens reaches "
                    f"behind the window of {self.sliding_window} tokens of layer "
                    f"{self.key.site.layer}, whose older pages are let go of; "
                    f"{self.timeline.block} tokens back are always possible"
                )

    @staticmethod
    @exact_math
    def encoded(bound: BoundCodec, x: Tensor, positions: Tensor) -> Tensor:
        """Bytes `[blocks, nbytes]` of blocks `[blocks, heads, block, dim]`."""
        if x.device.type in ENCODERS:
            fast = import_module(ENCODERS[x.device.type])
            if fast.serves(bound):
                return fast.encoded(bound, x, positions)
        return bound.layout.join(bound.encode(x, positions))

    def _sources(self, step: Step, due: Sequence[tuple[int, int, int]]) -> "Sources":
        """Where the tokens of blocks lie: in the ring what came before this pass, else in it."""
        timeline = self.timeline
        row = torch.tensor([r for r, _, _ in due])
        inside = torch.tensor([m for _, m, _ in due])[:, None] * timeline.block
        inside = inside + torch.arange(timeline.block)  # [blocks, block], counted behind the sinks
        token = inside + timeline.sinks
        start = torch.tensor(step.start)[row][:, None]
        nth = (token - start).clamp_min(0)
        if step.source is not None:
            nth = step.source[row[:, None], nth.clamp_max(max(step.source.shape[1] - 1, 0))]
        old = token < start
        return Sources(
            row,
            None if not bool(old.any()) else inside % self.ring_len,
            None if bool(old.all()) else nth,
            old[:, :, None, None],
            token + torch.tensor(step.first)[row][:, None],
            None if bool(old.any()) else _run(row, nth),
        )

    # --- reading ---------------------------------------------------------------------------

    def _view(
        self,
        step: Step,
        folded: tuple[int, ...],
        length: tuple[int, ...],
        fresh: tuple[Tensor, Tensor] | None = None,
    ) -> View:
        """The exact states of rows of these lengths and page counts, then the fresh ones."""
        device = self.exact_keys.device
        keys, values = self.exact_keys, self.exact_values
        tokens = step.memo(
            ("exact tokens", device, folded, length),
            lambda: upload(self.timeline.exact_tokens(folded, length), device),
        )
        query_tokens = step.memo(
            ("query tokens", device), lambda: upload(step.query_tokens(), device)
        )
        if fresh is not None:  # a copy: the ring is overwritten before the view is read
            keys, values = torch.cat((keys, fresh[0]), 2), torch.cat((values, fresh[1]), 2)
            tokens = torch.cat((tokens, query_tokens), 1)
        chosen = None
        if self.sliding_window is not None and any(folded):
            chosen = step.memo(
                ("sliding", device, folded, self.sliding_window),
                lambda: self._in_window(step, folded, device),
            )
        return View(keys, values, tokens, query_tokens, folded, self, step, chosen)

    def _in_window(self, step: Step, folded: tuple[int, ...], device: torch.device) -> Located:
        """The pages that some query of a step sees through the sliding window."""
        table = [
            [DROPPED if m < self.first_seen(start) else n for m, n in enumerate(row)]
            for start, row in zip(step.start, step.table, strict=False)
        ]
        return Located.of(replace(step, table=table), folded, device)

    def view_now(self) -> View:
        """All that the layer holds, for no query; a copy."""
        self.settle()
        step = self.timeline.now()
        view = self._view(step, step.folded, step.start)
        return replace(view, keys=view.keys.clone(), values=view.values.clone())

    def group_blocks(self, rows: int) -> int:
        """Blocks of `rows` rows that are read together."""
        page = self.key.site.num_kv_heads * self.key.site.block_len * self.key.site.head_dim
        limit = GROUP_ELEMENTS.get(self.ring_keys.device.type, 1 << 21)
        if self.pool.is_offloaded:
            limit //= 4  # groups enough that one is read while the next is on its way
        return max(1, limit // (page * rows))

    def pages(
        self, view: View, count: int, low: int = 0, high: int | None = None
    ) -> Iterator[Pages]:
        """Pages `low` to `high - 1` of a view, `count` of every row at a time, as fields."""
        device = self.ring_keys.device
        found = view.on(device).pages
        most = max(map(len, found)) if high is None else high
        filler = max(found, key=len)[:1] * count  # stands where a row has fewer pages
        groups = [
            [(row[at : at + count] + filler)[: min(count, most - at)] for row in found]
            for at in range(low, most, count)
        ]
        numbers = [[n for row in group for _, n in row] for group in groups]
        for at, group, pages in zip(
            range(low, most, count), groups, self.pool.stream(numbers), strict=True
        ):
            has = [[at + i < len(row) for i in range(len(group[0]))] for row in found]
            keys, values = self.layout.split(pages)
            positions = torch.cat(
                [
                    self._positions(first, torch.tensor([m for m, _ in row]))
                    for first, row in zip(view.step.first, group, strict=True)
                ]
            )
            yield Pages(keys, values, upload(positions, device), upload(torch.tensor(has), device))

    def _positions(self, first: int, blocks: Tensor) -> Tensor:
        """`[blocks, block]` RoPE positions of a row whose token 0 stands at `first`."""
        start = first + self.timeline.sinks + blocks * self.timeline.block
        return start[:, None] + torch.arange(self.timeline.block)

    @exact_math
    def decoded(self, view: View, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """All keys and values `[rows, heads, slots, dim]` of a view, in `dtype` or the model's own.

        For other attention implementations and for the oracle: this is the whole history at once.
        Padding slots and tokens that the view leaves out (`reads`) are zeros.
        """
        step = view.step
        slots = step.slots + step.queries
        shape = (*view.keys.shape[:2], slots)
        keys = view.keys.new_zeros(*shape, view.keys.shape[3], dtype=dtype)
        values = view.values.new_zeros(*shape, view.values.shape[3], dtype=dtype)
        out = (keys, values)
        for r in range(step.rows):
            place = self.slots_of(step, r).to(view.keys.device)
            exact = (view.tokens[r] >= 0).nonzero()[:, 0]
            to = place[view.tokens[r][exact]]
            out[0][r][:, to] = view.keys[r][:, exact].to(out[0].dtype)
            out[1][r][:, to] = view.values[r][:, exact].to(out[1].dtype)
            for m, number in view.on(view.keys.device).pages[r]:
                page = self.pool.gather([number])
                at = self._positions(step.first[r], torch.tensor([m]))
                to = place[(at[0] - step.first[r]).to(place.device)]
                for x, bound, fields in zip(
                    out, (self.key, self.value), self.layout.split(page), strict=True
                ):
                    x[r][:, to] = bound.decode(fields, at.to(x.device))[0].to(x.dtype)
        return out

    def reads(self, view: View, row: int) -> Tensor:
        """`[tokens]` bool: which tokens of a row the view's queries may read."""
        held = torch.ones(view.step.length[row], dtype=torch.bool)
        sinks, block = self.timeline.sinks, self.timeline.block
        held[sinks : sinks + block * view.folded[row]] = False
        for m, _ in view.on(view.keys.device).pages[row]:
            held[sinks + block * m : sinks + block * (m + 1)] = True
        return held

    def slots_of(self, step: Step, row: int) -> Tensor:
        """Slot of each token of a row after a step that may not be committed yet."""
        before = self.timeline.slots_of(row)[: step.start[row]] if self.timeline.rows else None
        new = self._slots(step, row, torch.arange(step.count[row])) + step.slots
        return new if before is None else torch.cat((before, new))

    # --- operations on rows ----------------------------------------------------------------

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was."""
        if self.is_allocated:
            rows = rows.to(self.exact_keys.device)
            for name in ("exact_keys", "exact_values"):
                held = getattr(self, name)
                chosen = held.index_select(0, rows)
                if chosen.shape == held.shape:
                    held.copy_(chosen)  # in place, so that recorded graphs stay valid
                else:
                    setattr(self, name, chosen)

    def saved(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What the layer holds, with these pages, on the CPU; nothing where it holds nothing."""
        if not self.is_allocated:
            return {}
        pages = torch.zeros(0, self.layout.nbytes, dtype=torch.uint8)
        if numbers:
            pages = self.pool.gather(numbers).cpu()
        parts = {"pages": pages, "keys": self.exact_keys.cpu(), "values": self.exact_values.cpu()}
        if self.timeline.budget.prune is not None:
            mass = torch.zeros(0, 2) if self.mass is None else self.mass[list(numbers)]
            parts["mass"] = mass.cpu()
        return parts

    def restore(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Take what `saved` gave, once the timeline has been restored.

        Raises:
            CacheError: shapes or dtypes are not those of this layer and timeline.
        """
        step, device = self.timeline.now(), self.key.site.device
        held = len(self.timeline.held)
        slots = self.timeline.sinks + self.ring_len
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "pages": ((held, self.layout.nbytes), torch.uint8)
        }
        for name, site in (("keys", self.key.site), ("values", self.value.site)):
            wanted[name] = ((step.rows, site.num_kv_heads, slots, site.head_dim), dtype)
        if self.timeline.budget.prune is not None:
            wanted["mass"] = ((held, 2), torch.float32)
        found = {name: (tuple(t.shape), t.dtype) for name, t in parts.items()}
        if found != wanted:
            raise CacheError(
                f"layer {self.key.site.layer} was saved as {found}; this model, preset and page "
                f"format have {wanted}"
            )
        keys, values = parts["keys"].to(device), parts["values"].to(device)
        self._allocate(keys, values, step)
        self.exact_keys.copy_(keys)
        self.exact_values.copy_(values)
        self.pool.reserve(step.num_pages)
        if held:
            self.pool.write(range(held), parts["pages"].to(device))
        self._reserve_mass(step)
        if self.mass is not None:
            self.mass[:held] = parts["mass"].to(device)

    def copied(self, timeline: Timeline) -> "LayerStore":
        """The same content with storage of its own, under another timeline; tables are shared."""
        new = self.forked(timeline, torch.arange(timeline.rows))
        if self.is_allocated:
            new.pool = self.pool.copied()
        return new

    def forked(self, timeline: Timeline, rows: Tensor) -> "LayerStore":
        """Row i from row `rows[i]`, with exact states of its own and the same pool of pages."""
        new = LayerStore(self.key, self.value, timeline, self.sliding_window)
        if self.is_allocated:
            rows = rows.to(self.exact_keys.device)
            new.exact_keys = self.exact_keys.index_select(0, rows)
            new.exact_values = self.exact_values.index_select(0, rows)
            new.pool, new.is_allocated = self.pool, True
            new.mass = None if self.mass is None else self.mass.clone()
        return new

    @exact_math
    def reopen(self, row: int, block: int, number: int) -> None:
        """Decode one page back into the ring, where a crop has cut it."""
        page = self.pool.gather([number])
        at = self._positions(self.timeline.first[row], torch.tensor([block]))
        device = self.ring_keys.device
        to = ((torch.arange(self.timeline.block) + block * self.timeline.block) % self.ring_len).to(
            device
        )
        for ring, bound, fields in zip(
            (self.ring_keys, self.ring_values),
            (self.key, self.value),
            self.layout.split(page),
            strict=True,
        ):
            ring[row, :, to] = bound.decode(fields, at.to(device))[0].to(ring.dtype)

    def exact_nbytes(self, rows: int, dtype: torch.dtype) -> int:
        """Bytes of sinks and hot window of so many rows."""
        slots = self.timeline.sinks + self.ring_len
        sites = (self.key.site, self.value.site)
        return rows * slots * sum(s.num_kv_heads * s.head_dim for s in sites) * dtype.itemsize

    @property
    def mass_nbytes(self) -> int:
        """Bytes of the attention mass of one page."""
        return 0 if self.timeline.budget.prune is None else 8

    def nbytes(self, used_pages: int) -> dict[str, int]:
        """Allocated bytes: pages in use, unused pool space, window, sinks, mass (tables not)."""
        if not self.is_allocated:
            return dict.fromkeys(("pages", "pool_unused", "window", "sinks", "mass"), 0)
        used = self.pool.used(used_pages) * self.layout.nbytes
        return {
            "pages": used,
            "pool_unused": sum(slab.nbytes for slab in self.pool.slabs)
            + self.pool.addresses.nbytes
            - used,
            "window": self.ring_keys.nbytes + self.ring_values.nbytes,
            "sinks": self.sink_keys.nbytes + self.sink_values.nbytes,
            "mass": 0 if self.mass is None else self.mass.nbytes,
        }
