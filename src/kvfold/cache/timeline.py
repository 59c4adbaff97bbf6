"""Which tokens of each row are sinks, hot and cold, and which page holds them: host integers only.

Words: a *slot* is a place of the model's padded sequence axis; a *token* k is the k-th real token
of its row (padding is not stored); its *position* is what RoPE sees, `first[row] + k`.
With S sinks, window W and block B, a row of n tokens keeps tokens `< S` and the last ones exact and
has folded the others in pages of B tokens, page m holding tokens `S + B m .. S + B (m + 1) - 1`:

    folded(n) = max(0, (n - W - S) // B)      hot: tokens S + B * folded .. n - 1

A page may be dropped (trim, prune): its block stays counted, its tokens keep their indices, slots
and positions, and no query sees them any more. A row's table has `DROPPED` in its place.

All layers share one timeline: their pages have the same numbers in pools of their own.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
#: page number of a block that is no longer held.
DROPPED = -1


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on a device, without waiting for what the device has yet to do."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)  # the pinned copy outlives the transfer


class CacheError(ValueError):
    """A cache cannot take what it was given: says what was given and what it expects."""


@dataclass(frozen=True)
class Budget:
    """How many pages are kept and read, None for all; and where they lie.

    Args:
        trim: pages of a row, the newest (StreamingLLM).
        prune: pages of a row, those that got most attention; the newest is never judged.
        top_k: pages of a row that a one-token step reads.
        total: pages of all rows together, shared ones counted once; those with the least attention
            go first where it is known, else the oldest.
        offload: whether pages lie in CPU memory and are brought when they are read.
    """

    trim: int | None = None
    prune: int | None = None
    top_k: int | None = None
    total: int | None = None
    offload: bool = False


@dataclass(frozen=True)
class Step:
    """What one forward pass adds, the same for every layer.

    Args:
        queries: slots of this pass, padding included.
        slots: slots before it.
        start: tokens of each row before it.
        count: new tokens of each row.
        folded_before: folded blocks of each row before it, dropped ones included.
        folded: folded blocks of each row after it, likewise.
        first: position of each row's token 0.
        source: `[rows, max count]` slot of each new token within the pass; None when every slot of
            every row is a token.
        pages: for each newly folded block, (row, block, page number).
        num_pages: page numbers in use or free after it, the size to which pools grow.
        slab_pages: pages of a slab.
        table: each row's page numbers by block, `DROPPED` where the page is gone; it grows in
            place, so readers keep to `folded` entries.
        generation: the timeline's when the step was planned.
    """

    queries: int
    slots: int
    start: tuple[int, ...]
    count: tuple[int, ...]
    folded_before: tuple[int, ...]
    folded: tuple[int, ...]
    first: tuple[int, ...]
    source: Tensor | None
    pages: tuple[tuple[int, int, int], ...]
    num_pages: int
    slab_pages: int
    table: Sequence[Sequence[int]]
    generation: int
    made: dict[Hashable, object] = field(default_factory=dict, repr=False, compare=False)

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once a step: all layers read the same numbers."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]  # type: ignore[return-value]

    def on(self, device: torch.device, folded: tuple[int, ...]) -> "Located":
        """The step's numbers on a device, for queries that come after `folded` blocks a row."""
        return self.memo(("on", device, folded), lambda: Located.of(self, folded, device))

    def dropped(self, folded: tuple[int, ...]) -> bool:
        """Whether any of the first `folded` blocks of a row has been dropped."""
        return self.memo(
            ("dropped", folded),
            lambda: any(DROPPED in row[:n] for row, n in zip(self.table, folded, strict=True)),
        )

    def query_tokens(self) -> Tensor:
        """`[rows, queries]` token index of each slot of the pass, -1 for padding."""
        start = torch.tensor(self.start)[:, None]
        if self.source is None:
            return start + torch.arange(self.queries)
        out = torch.full((self.rows, self.queries), -1)
        for r in range(self.rows):
            out[r, self.source[r, : self.count[r]]] = torch.arange(self.count[r]) + self.start[r]
        return out

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.start)

    @property
    def length(self) -> tuple[int, ...]:
        """Tokens of each row after the pass."""
        return tuple(s + c for s, c in zip(self.start, self.count, strict=True))

    @property
    def is_first(self) -> bool:
        """Whether the cache was empty before."""
        return not any(self.start)

    @property
    def reads_folded_now(self) -> bool:
        """Whether its queries read the blocks that it folds: decoding one token a row does.

        A longer pass attends to its own tokens exactly, and to what was hot before it.
        """
        return self.queries == 1


@dataclass(frozen=True)
class Located:
    """Which pages a step's queries read, as int32 tensors on a device.

    Args:
        length: `[rows]` tokens of each row after the pass.
        folded: `[rows]` pages of each row that its queries read.
        first: `[rows]` position of each row's token 0.
        table: `[rows, most pages of a row]` page numbers, 0 behind a row's last page.
        block: like `table`, which block of its row each page is, rising: it holds tokens
            `sinks + block * B` and on, at positions `first + sinks + block * B` and on. Where no
            block is left out it counts 0, 1, 2, ...
    """

    length: Tensor
    folded: Tensor
    first: Tensor
    table: Tensor
    block: Tensor

    @staticmethod
    def of(step: Step, folded: tuple[int, ...], device: torch.device) -> "Located":
        """The pages held of the first `folded` blocks of each row."""
        rows = [torch.tensor(step.table[r][:n], dtype=torch.int32) for r, n in enumerate(folded)]
        held = [(row != DROPPED).nonzero()[:, 0] for row in rows]
        counts = tuple(map(len, held))
        table = torch.zeros(step.rows, max(counts, default=0), dtype=torch.int32)
        block = torch.zeros_like(table)
        for r, blocks in enumerate(held):
            table[r, : counts[r]] = rows[r][blocks]
            block[r, : counts[r]] = blocks

        def numbers(x: tuple[int, ...]) -> Tensor:
            return upload(torch.tensor(x, dtype=torch.int32), device)

        return Located(
            numbers(step.length),
            numbers(counts),
            numbers(step.first),
            upload(table, device),
            upload(block, device),
        )

    @cached_property
    def pages(self) -> list[list[tuple[int, int]]]:
        """(block, page number) of each row's pages, on the host."""
        counts, block, table = self.folded.tolist(), self.block.tolist(), self.table.tolist()
        return [list(zip(block[r][:n], table[r][:n], strict=True)) for r, n in enumerate(counts)]


class PageNumbers:
    """Which page numbers are free: of one timeline, or of several that share pages (forks).

    A page is written once, when its number is taken, and its number comes free when no row of any
    timeline holds it. So rows and forks share pages without counting references.
    """

    def __init__(self, slab_pages: int) -> None:
        self.slab_pages, self.num_pages = slab_pages, 0
        self.free: list[int] = []
        self.timelines: weakref.WeakSet[Timeline] = weakref.WeakSet()
        #: held from taking numbers until they stand in a table; forks may run in several threads
        self.lock = threading.Lock()

    @property
    def held(self) -> set[int]:
        """Numbers of the pages that some row of some timeline holds."""
        return set().union(*(timeline.held for timeline in self.timelines))

    def take(self, count: int) -> list[int]:
        """Free numbers, of pages that were let go of first, then of a new slab."""
        if count > len(self.free) and self.num_pages:
            held = self.held
            self.free = [n for n in range(self.num_pages) if n not in held]
        while count > len(self.free):
            self.free += range(self.num_pages, self.num_pages + self.slab_pages)
            self.num_pages += self.slab_pages
        taken, self.free = self.free[:count], self.free[count:]
        return taken


#: what of a timeline is plain values and saved as it is.
_PLAIN = ("slots", "lengths", "first", "runs", "pairs_read", "pairs_cold")


class _Candidate(NamedTuple):
    """A page that may be kept; sorted, the one to drop first comes first."""

    worth: float
    block: int
    row: int
    number: int  #: `DROPPED` while it is not made


def _last(items: list[T], count: int | None) -> list[T]:
    return items if count is None else items[max(0, len(items) - count) :]


class Timeline:
    """The lengths and page tables of a batch of rows."""

    def __init__(
        self,
        sinks: int,
        window: int,
        block: int,
        slab_blocks: int = 4,
        max_tokens: int | None = None,
        budget: Budget = Budget(),
    ) -> None:
        self.sinks, self.window, self.block = sinks, window, block
        self.slab_blocks, self.max_tokens, self.budget = slab_blocks, max_tokens, budget
        #: tokens that a query sees, where no layer sees more (sliding windows)
        self.reach: int | None = None
        self.reset()

    def reset(self) -> None:
        """Forget every row."""
        #: changes where tokens go or move, so that what was read before can be told to be stale
        self.generation = getattr(self, "generation", 0) + 1
        self.slots = 0
        self.lengths: list[int] = []
        self.first: list[int] = []
        self.table: list[list[int]] = []
        # per row, (slot, token) where a run of tokens without padding between them starts
        self.runs: list[list[tuple[int, int]]] = []
        self._number(PageNumbers(0))
        self.pairs_read = self.pairs_cold = 0

    def _number(self, numbers: PageNumbers) -> None:
        """Take page numbers from these from now on."""
        if hasattr(self, "numbers"):
            self.numbers.timelines.discard(self)
        self.numbers = numbers
        numbers.timelines.add(self)

    @property
    def num_pages(self) -> int:
        """Page numbers in use or free."""
        return self.numbers.num_pages

    @property
    def slab_pages(self) -> int:
        """Pages of a slab."""
        return self.numbers.slab_pages

    @property
    def rows(self) -> int:
        """Rows of the batch; 0 while empty."""
        return len(self.lengths)

    @property
    def unpadded(self) -> bool:
        """Whether every slot of every row is a token."""
        return all(n == self.slots for n in self.lengths)

    @property
    def folded(self) -> list[int]:
        """Folded blocks of each row, dropped ones included."""
        return [len(pages) for pages in self.table]

    @property
    def held(self) -> set[int]:
        """Numbers of the pages that some row holds."""
        return {n for row in self.table for n in row} - {DROPPED}

    def folded_at(self, length: int) -> int:
        """Pages of a row of `length` tokens that was never cropped."""
        return max(0, (length - self.window - self.sinks) // self.block)

    def exact_tokens(self, folded: Sequence[int], length: Sequence[int]) -> Tensor:
        """`[rows, sinks + ring]` token index held by each sink and ring slot, -1 where it is free.

        A ring slot holds the latest token k < length with (k - sinks) % ring == slot, if it is hot.
        """
        size = self.window + self.block
        lengths = torch.tensor(length)[:, None]
        sink = torch.arange(self.sinks).expand(len(length), -1)
        sink = torch.where(sink < lengths, sink, -1)
        newest = lengths - 1 - self.sinks
        k = newest - (newest - torch.arange(size)) % size + self.sinks
        hot_from = torch.tensor(folded)[:, None] * self.block + self.sinks
        return torch.cat((sink, torch.where((k >= hot_from) & (newest >= 0), k, -1)), 1)

    def plan(
        self,
        rows: int,
        queries: int,
        valid: Tensor | None,
        positions: Tensor | None,
        worth: Callable[[], Sequence[float]] | None = None,
    ) -> Step:
        """The step that adds `queries` slots to `rows` rows, with pages reserved for what it folds.

        Where a budget would be passed, pages are dropped first, or never made.

        Args:
            rows: rows of the batch.
            queries: slots of the pass.
            valid: bool `[rows, queries]`, False where a slot is padding; None for no padding.
            positions: `[rows or 1, queries]` RoPE positions; None counts slots from 0.
            worth: attention that each page number has got, infinite where none has been seen.

        Raises:
            CacheError: another number of rows than before, positions with gaps within a row, or
                more than `max_tokens`.
        """
        if not rows or not queries:
            raise CacheError(
                f"a pass of {rows} rows and {queries} tokens; at least 1 of each is needed"
            )
        if self.rows and rows != self.rows:
            raise CacheError(
                f"the cache holds {self.rows} rows and was given {rows}; reset() it or make "
                "another cache for another batch"
            )
        start = tuple(self.lengths) or (0,) * rows
        source, count = None, (queries,) * rows
        if valid is not None and not bool(valid.all()):
            mask = valid.cpu()
            count = tuple(mask.sum(1).tolist())
            source = torch.zeros(rows, max(count), dtype=torch.int64)
            for r in range(rows):
                source[r, : count[r]] = mask[r].nonzero()[:, 0]
        first = self._first(start, count, queries, source, positions)
        before = tuple(self.folded) if self.rows else (0,) * rows
        after = tuple(
            max(b, self.folded_at(s + c)) for b, s, c in zip(before, start, count, strict=True)
        )
        longest = max(s + c for s, c in zip(start, count, strict=True))
        if self.max_tokens is not None and longest > self.max_tokens:
            raise CacheError(
                f"a row would reach {longest} tokens; this cache holds at most {self.max_tokens} "
                "(max_tokens=, by default the model's own limit)"
            )
        if not self.rows:  # also after a first pass that failed before any layer was reached
            slab_pages = self.slab_blocks * rows
            if self.budget.total is not None:
                slab_pages = min(slab_pages, self.budget.total)
            self._number(PageNumbers(slab_pages))
            self.table = [[] for _ in range(rows)]
        # block by block, so that the pages of a walk over blocks lie side by side
        due = sorted((m, r) for r in range(rows) for m in range(before[r], after[r]))
        due = self._make_room(due, queries == 1, worth)
        with self.numbers.lock:
            numbers = self.numbers.take(len(due))
            pages = tuple((r, m, n) for (m, r), n in zip(due, numbers, strict=True))
            for r in range(rows):
                self.table[r] += [DROPPED] * (after[r] - before[r])
            for r, m, n in pages:
                self.table[r][m] = n
        return Step(
            queries,
            self.slots,
            start,
            count,
            before,
            after,
            first,
            source,
            pages,
            self.num_pages,
            self.slab_pages,
            self.table,
            self.generation,
        )

    def now(self) -> Step:
        """A step that adds nothing: the state as it is."""
        lengths, folded = tuple(self.lengths), tuple(self.folded)
        none = (0,) * self.rows
        return Step(
            0,
            self.slots,
            lengths,
            none,
            folded,
            folded,
            tuple(self.first),
            None,
            (),
            self.num_pages,
            self.slab_pages,
            self.table,
            self.generation,
        )

    def commit(self, step: Step) -> None:
        """Make a step's state the current one, once every layer has applied it."""
        if not self.rows:
            self.runs = [[] for _ in range(step.rows)]
        for r in range(step.rows):
            slots = (
                range(step.queries)
                if step.source is None
                else step.source[r, : step.count[r]].tolist()
            )
            for i, slot in enumerate(slots):
                at, token = step.slots + slot, step.start[r] + i
                if not self.runs[r] or at - self.runs[r][-1][0] != token - self.runs[r][-1][1]:
                    self.runs[r].append((at, token))
                if step.source is None:
                    break  # one run, wherever it started
        self.slots = step.slots + step.queries
        self.lengths, self.first = list(step.length), list(step.first)
        if not step.is_first:
            self._count_pairs(step)

    def compressed_share(self) -> float:
        """Share of the causal pairs of all queries that read the cache that came from codes."""
        return self.pairs_cold / self.pairs_read if self.pairs_read else 0.0

    # --- files -----------------------------------------------------------------------------

    def to_json(self) -> tuple[dict[str, Any], list[int]]:
        """The state as plain values, its pages numbered from 0, and the numbers they had."""
        numbers = sorted(self.held)
        renamed = {DROPPED: DROPPED, **{old: new for new, old in enumerate(numbers)}}
        plain = {name: getattr(self, name) for name in _PLAIN}
        plain["table"] = [[renamed[n] for n in row] for row in self.table]
        return {**plain, "slab_pages": self.slab_pages}, numbers

    def restore(self, data: Mapping[str, Any]) -> None:
        """Take the state that `to_json` gave, into an empty timeline.

        Raises:
            CacheError: the values do not describe rows of pages.
        """
        for name in _PLAIN:
            setattr(self, name, data[name])
        self.runs = [[(at, token) for at, token in row] for row in data["runs"]]
        self.table = [list(row) for row in data["table"]]
        sizes = {len(x) for x in (self.lengths, self.first, self.runs, self.table)}
        held = self.held
        if sizes != {self.rows} or held != set(range(len(held))) or data["slab_pages"] < 1:
            raise CacheError("the saved lengths, runs and page tables do not fit each other")
        self._number(PageNumbers(data["slab_pages"]))
        self.numbers.take(len(held))

    # --- operations on rows ----------------------------------------------------------------

    def select(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was; pages are shared, never copied."""
        wrong = [r for r in rows if not 0 <= r < self.rows]
        if wrong:
            raise CacheError(f"no rows {wrong}; the cache holds rows 0 to {self.rows - 1}")
        self.generation += 1
        self.lengths = [self.lengths[r] for r in rows]
        self.first = [self.first[r] for r in rows]
        self.table = [list(self.table[r]) for r in rows]
        self.runs = [list(self.runs[r]) for r in rows]

    def forked(self, rows: Sequence[int]) -> "Timeline":
        """A timeline that goes on from here, row i from row `rows[i]`, and shares the pages."""
        new = copy.copy(self)
        del new.numbers  # of the copied attributes: `new` is not among its timelines yet
        new._number(self.numbers)
        new.select(rows)
        return new

    def copied(self) -> "Timeline":
        """The same rows with page numbers of their own, for a pool that is a copy too."""
        new = self.forked(range(self.rows))
        numbers = PageNumbers(self.slab_pages)
        numbers.num_pages = self.num_pages
        new._number(numbers)  # it finds the free ones when it needs them
        return new

    def crop(self, slots: int) -> list[tuple[int, int]]:
        """Keep the first `slots` slots; gives (row, block) of blocks to decode into the window.

        A block that is cut is decoded once, back into the hot window; blocks behind it are dropped.

        Raises:
            CacheError: the cut goes through a block that was dropped; nothing is changed then.
        """
        reopened = []
        left = self._left(slots)
        self.generation += 1
        for r, kept in enumerate(left):
            self.runs[r] = [(at, token) for at, token in self.runs[r] if at < slots]
            self.lengths[r] = kept
            whole = max(0, (kept - self.sinks) // self.block)
            if whole < len(self.table[r]):
                if kept > self.sinks + self.block * whole:
                    reopened.append((r, whole))
                self.table[r] = self.table[r][:whole]
        self.slots = min(self.slots, slots)
        return reopened

    def check_crop(self, slots: int) -> list[int]:
        """Tokens of each row that a crop leaves.

        Raises:
            CacheError: it would cut a block that was dropped.
        """
        return self._left(slots)

    def trim(self, pages: int) -> None:
        """Keep the newest `pages` pages of each row."""
        for r in range(self.rows):
            self.drop(r, set(self.blocks(r)) - set(_last(self.blocks(r), pages)))

    def prune(self, pages: int, worth: Sequence[float]) -> None:
        """Keep the `pages` pages of each row that got most attention, as `plan` takes it."""
        for r in range(self.rows):
            ranked = sorted((worth[self.table[r][m]], m) for m in self.blocks(r))
            self.drop(r, {m for _, m in ranked} - {m for _, m in _last(ranked, pages)})

    def blocks(self, row: int) -> list[int]:
        """The blocks of a row whose pages are held."""
        return [m for m, n in enumerate(self.table[row]) if n != DROPPED]

    def drop(self, row: int, blocks: Iterable[int]) -> None:
        """Let go of a row's pages of these blocks; what was read before is stale then."""
        self.generation += 1
        for block in blocks:
            self.table[row][block] = DROPPED

    def check_mask(self, mask: Tensor, *, thorough: bool) -> None:
        """Raise `CacheError` unless `mask` `[rows, slots]` marks exactly the cached tokens.

        A padded batch is compared slot by slot only where `thorough`, by counts elsewhere.
        """
        if self.rows and self.unpadded:
            same = bool(mask.all())
        elif thorough and self.rows:
            held = torch.zeros(mask.shape, dtype=torch.bool)
            for r in range(self.rows):
                held[r, self.slots_of(r)] = True
            same = torch.equal(mask.cpu(), held)
        else:
            same = not self.rows or mask.sum(1).tolist() == self.lengths
        if not same:
            raise CacheError(
                f"attention_mask marks {mask.sum(1).tolist()} cached tokens a row, or others than "
                f"when they were cached; the cache holds {self.lengths}: cached tokens cannot be "
                "masked later"
            )

    def slots_of(self, row: int) -> Tensor:
        """`[tokens]` slot of each token of a row."""
        parts = [
            torch.arange(self._run_length(row, i)) + at for i, (at, _) in enumerate(self.runs[row])
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    # --- inside ----------------------------------------------------------------------------

    def _left(self, slots: int) -> list[int]:
        """Tokens of each row among the first `slots` slots."""
        left = [
            sum(
                min(max(slots - at, 0), self._run_length(r, i))
                for i, (at, _) in enumerate(self.runs[r])
            )
            for r in range(self.rows)
        ]
        for r, kept in enumerate(left):
            block, inside = divmod(kept - self.sinks, self.block)
            if inside and 0 <= block < len(self.table[r]) and self.table[r][block] == DROPPED:
                raise CacheError(
                    f"a crop to {slots} slots needs tokens {kept - inside} to {kept - 1} of row "
                    f"{r}, which were dropped (trim, prune or max_bytes); {kept - inside} tokens "
                    "are possible"
                )
        return left

    def _run_length(self, row: int, i: int) -> int:
        runs = self.runs[row]
        end = runs[i + 1][1] if i + 1 < len(runs) else self.lengths[row]
        return end - runs[i][1]

    def _first(
        self,
        start: tuple[int, ...],
        count: tuple[int, ...],
        queries: int,
        source: Tensor | None,
        positions: Tensor | None,
    ) -> tuple[int, ...]:
        """Position of each row's token 0, checked against the positions of this pass."""
        rows = len(start)
        if positions is None:
            positions = torch.arange(self.slots, self.slots + queries)[None]
        if positions.ndim != 2 or positions.shape[0] not in (1, rows):
            raise CacheError(
                f"position_ids have shape {tuple(positions.shape)}; [{rows}, {queries}] or "
                f"[1, {queries}] is possible (multi-axis positions are not supported)"
            )
        host = positions.cpu().expand(rows, -1)
        first = []
        for r in range(rows):
            at = host[r] if source is None else host[r, source[r, : count[r]]]
            if not count[r]:
                first.append(self.first[r] if self.rows else 0)
                continue
            begin = int(at[0]) - start[r]
            if start[r] and begin != self.first[r]:
                raise CacheError(
                    f"row {r} continues at position {int(at[0])}, expected "
                    f"{self.first[r] + start[r]}: positions within a row rise by one"
                )
            if int(at[-1]) - int(at[0]) != count[r] - 1 or bool((at.diff() != 1).any()):
                raise CacheError(
                    f"the positions of row {r} do not rise by one ({at[:8].tolist()}…); packed or "
                    "reordered sequences are not supported"
                )
            first.append(begin)
        return tuple(first)

    def _make_room(
        self,
        due: list[tuple[int, int]],
        decoding: bool,
        worth: Callable[[], Sequence[float]] | None,
    ) -> list[tuple[int, int]]:
        """Drop pages until the budgets hold with `due` (block, row); gives what is still due.

        A pass of many tokens says little before it has read the pages: only decoding prunes.
        """
        budget = self.budget
        prune = budget.prune if decoding else None
        if not due or (budget.trim, prune, budget.total) == (None, None, None):
            return due
        value = dict(enumerate(worth())) if worth is not None and self.held else {}
        kept: list[_Candidate] = []
        for r, row in enumerate(self.table):
            mine = [_Candidate(value.get(n, inf), m, r, n) for m, n in enumerate(row)]
            mine = [page for page in mine if page.number != DROPPED]
            mine += [_Candidate(inf, m, r, DROPPED) for m, to in due if to == r]  # by age
            kept += _last(sorted(_last(mine, budget.trim)), prune)
        if budget.total is not None:
            by_page: dict[object, list[_Candidate]] = {}  # rows that share a page lose it together
            for page in sorted(kept):
                name = (page.block, page.row) if page.number == DROPPED else page.number
                by_page.setdefault(name, []).append(page)
            capacity = budget.total // self.slab_pages * self.slab_pages
            kept = [page for pages in _last(list(by_page.values()), capacity) for page in pages]
        stays = {(page.block, page.row) for page in kept}
        for r in range(len(self.table)):
            gone = [m for m in self.blocks(r) if (m, r) not in stays]
            if gone:
                self.drop(r, gone)
        return [page for page in due if page in stays]

    def _count_pairs(self, step: Step) -> None:
        folded = step.folded if step.reads_folded_now else step.folded_before
        for r, (start, count) in enumerate(zip(step.start, step.count, strict=True)):
            if self.reach is not None:
                cold = self.sinks + folded[r] * self.block if folded[r] else 0
                for token in range(start, start + count):
                    oldest = max(0, token + 1 - self.reach)
                    self.pairs_read += token + 1 - oldest
                    self.pairs_cold += max(0, cold - max(oldest, self.sinks))
                continue
            gone = step.table[r][: folded[r]].count(DROPPED)
            seen = start - gone * self.block
            self.pairs_read += count * seen + count * (count + 1) // 2
            self.pairs_cold += count * (folded[r] - gone) * self.block
