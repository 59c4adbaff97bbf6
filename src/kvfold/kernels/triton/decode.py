"""Decode attention on packed pages for CUDA devices: three launches a layer, replayable as a graph.

    prepare   addresses of pages; queries in the units of the columns, once or once a page
    decode    splits of pages and of the exact tokens: scores, softmax, sums over columns
    merge     splits by their log-sum-exp, sums over columns back to states

All that changes between steps lies in device tensors (`Located`, token numbers): no launch depends
on a length, and programs without pages leave at once. Where `kvfold.kernels.cuda` reads a layer,
`kvfold.kernels.cuda.decode` takes its place.
"""

# launches take options that the kernels' signatures do not name
# pyright: reportCallIssue=false

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from kvfold.cache.pool import Pool
from kvfold.cache.store import LayerStore, View
from kvfold.cache.timeline import Located
from kvfold.kernels import cuda
from kvfold.kernels.cuda import before_rope
from kvfold.kernels.cuda import decode as cuda_decode
from kvfold.kernels.lowering import NotLoweredError, Operand, lower_keys, lower_values
from kvfold.kernels.triton import unpack
from kvfold.kernels.triton.loop import LOG2E, decode_kernel
from kvfold.kernels.triton.merge import merge_kernel
from kvfold.kernels.triton.prepare import power_of_two, prepare
from kvfold.packing import CHUNK, SECTIONS

#: each page's place in its row is read from `Located.block`.
HOLES = True
HEAD_DIMS = (64, 80, 96, 128, 256)
BLOCKS = (128, 256)
MAX_GROUP = 16
MAX_QUERIES = 8
#: queries of a program: the second axis of its products.
TILE = 8
#: exact tokens of a program.
EXACT_TOKENS = 64
DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float16}


@dataclass(frozen=True)
class Tuning:
    """How a launch is cut; none of it changes what is computed beyond rounding.

    Args:
        programs: programs of the decode launch for each multiprocessor.
        least_pages: fewest pages of a split.
        stages: pages in flight in a program.
        merge_warps: warps of a program of the merge.
    """

    programs: int = 6
    least_pages: int = 2
    stages: int = 3
    merge_warps: int = 4


@dataclass
class Side:
    """One side of a layer as the kernels take it: columns in slots of 16, section after section.

    Args:
        operand: what it was made from.
        chunks: slots of 16 columns of each section (4, 2, 1 bits): the widest head's.
        whole: 1 where every head's sections are multiples of 16 columns, 2 where besides all heads
            have the same counts; else 0.
        matrix: float16 keys `[heads, dim, slots]`, values `[heads, slots, dim]`, times 2^exponent.
        exponent: power of two that keeps the matrix within float16.
        levels: `[16]` values of the digits, None where they are the digits.
        center: `[heads, slots]` minus the middle of each column's digits, where there is a gain
            term that it can be taken out of; else zeros.
        gain: `[heads, dim]` the gain term of centred digits.
    """

    operand: Operand
    chunks: tuple[int, int, int]
    whole: int
    matrix: Tensor
    exponent: int
    levels: Tensor | None
    center: Tensor
    gain: Tensor

    @property
    def columns(self) -> int:
        """Slots of columns."""
        return CHUNK * sum(self.chunks)

    @property
    def gain_bytes(self) -> int:
        """Bytes of a gain, 0 where there is none."""
        name = self.operand.stored.gain
        return 0 if name is None else self.operand.sizes[name]

    @classmethod
    def of(cls, operand: Operand, keys: bool) -> "Side":
        """The slots of an operand."""
        counts = operand.counts
        chunks = tuple(max(-(-row[i] // CHUNK) for row in counts) for i in range(3))
        whole = int(all(count % CHUNK == 0 for row in counts for count in row))
        whole += whole and len(set(counts)) == 1
        matrix = operand.matrix if keys else operand.matrix.mT  # [heads, dim, columns]
        slots = matrix.new_zeros(*matrix.shape[:2], max(CHUNK * sum(chunks), CHUNK))
        for h, row in enumerate(counts):
            source = 0
            for i, count in enumerate(row):
                to = CHUNK * sum(chunks[:i])
                slots[h, :, to : to + count] = matrix[h, :, source : source + count]
                source += count
        largest = float(slots.abs().max())
        exponent = 0 if largest == 0 else int(4 - torch.tensor(largest).log2().ceil())
        scaled = (slots * 2.0**exponent).to(torch.float16)
        center = slots.new_zeros(slots.shape[0], slots.shape[2])
        if bool(operand.gain.any()):
            for h, row in enumerate(counts):
                for i, (w, count) in enumerate(zip(SECTIONS, row, strict=True)):
                    to = CHUNK * sum(chunks[:i])
                    center[h, to : to + count] = -(2**w - 1) / 2
        # in float64, as the two nearly cancel
        gain = operand.gain.double() - (slots.double() @ center.double()[..., None])[..., 0]
        levels = operand.stored.levels
        levels = None if levels is None else levels.float().flatten()
        if levels is not None:
            levels = torch.nn.functional.pad(levels, (0, 16 - len(levels)))
        if not any(chunks):  # no coordinate of any head has bits: one empty slot
            chunks = (0, 0, 1)
        return cls(
            operand,
            chunks,  # type: ignore[arg-type]
            whole,
            (scaled if keys else scaled.mT).contiguous(),
            exponent,
            levels,
            center,
            gain.float(),
        )


@dataclass
class Layer:
    """The operands of one `LayerStore`, made once; see `lowered`."""

    key: Side
    value: Side
    heads: int
    key_dim: int
    value_dim: int
    block: int
    sinks: int
    page_bytes: int
    table: Tensor  #: [heads, 16] int32, what `decode_kernel` reads of each head
    rope: Tensor | None  #: [3, dim] frequency, sign and partner of each channel
    mean: Tensor | None  #: float16 [heads, block, dim]
    constants: dict[str, object]  #: compile-time arguments of the decode kernel
    store: "weakref.ref[LayerStore]"
    cost: tuple[int, ...] = ()  #: how long a page of each head takes, relative to the others
    native: cuda.Native | None = None  #: tables of the CUDA kernels; None where Triton's are used
    decoder: before_rope.Decoder | None = None  #: tables of keys that were coded before RoPE
    served: "Layer | None" = None  #: for many pages, where the CUDA kernels differ; `cuda.served`

    @property
    def pool(self) -> Pool:
        """The layer's pages."""
        store = self.store()
        assert store is not None
        return store.pool


_LAYERS: "weakref.WeakKeyDictionary[LayerStore, Layer]" = weakref.WeakKeyDictionary()


def tables_of(store: LayerStore) -> Layer | None:
    """What the kernels hold of a layer beside its pages; None before they attended to it."""
    return _LAYERS.get(store)


def lowered(store: LayerStore) -> Layer:
    """The operands of a layer, made at the first call.

    Raises:
        NotLoweredError: a kernel cannot read this layer; the message says why.
    """
    if store not in _LAYERS:
        _LAYERS[store] = _lower(store)
    return _LAYERS[store]


def _lower(store: LayerStore) -> Layer:
    site = store.key.site
    key = lower_keys(store.key, per_token=cuda.runs_on(site.device))
    value = lower_values(store.value, store.layout.keys.nbytes)
    _check(store, key, value)
    k, v = Side.of(key, True), Side.of(value, False)
    heads, block = site.num_kv_heads, site.block_len
    device = store.key.site.device

    def at(operand: Operand, name: str | None, h: int) -> int:
        """First byte of a head's part of a field."""
        if name is None:
            return 0
        bound = store.key if operand is key else store.value
        shape = next(f.shape for f in bound.layout.fields if f.name == name)
        return operand.bytes[name] + h * operand.sizes[name] * torch.Size(shape[1:]).numel()

    rows = []
    for h in range(heads):
        row = [first // 2 for side in (key, value) for first in side.sections[h]]
        row += [count for side in (key, value) for count in side.counts[h]]
        row += [at(key, key.stored.gain, h), at(value, value.stored.gain, h)]
        row += [at(value, value.stored.offset, h), at(key, key.stored.page_scale, h)]
        rows.append(row)
    mean, rope = key.mean, key.rope
    if mean is not None and not bool(mean.any()):
        mean = None
    if key.stored.turns == "token":  # `before_rope` has both
        mean = rope = None
    if mean is None and key.stored.turns == "mean":
        rope = None
    groups = 1 if value.offset is None else value.offset.shape[1]
    if value.stored.gain is not None:
        shape = next(f.shape for f in store.value.layout.fields if f.name == value.stored.gain)
        groups = shape[2] if len(shape) == 3 else 1
    segments = 1
    if key.stored.page_scale is not None:
        fields = {f.name: f.shape for f in store.key.layout.fields}
        segments = fields[key.stored.page_scale][1]
    words = {w: block * w // 16 for w in SECTIONS}
    constants: dict[str, object] = {"HEADS": heads, "B": block, "W": block // 64}
    for name, side, which in (("K", k, "key"), ("V", v, "value")):
        levels = None if side.levels is None else side.levels.tolist()
        for w, chunks in zip(SECTIONS, side.chunks, strict=True):
            constants[f"{name}{w}"] = chunks
            text = unpack.assembly(w, words[w], which, levels) if chunks else tl.constexpr("")
            constants[f"ASM_{name}{w}"] = tl.constexpr("") if interpreted() else text
        constants |= {f"{name}_WHOLE": side.whole, f"{name}_LEVELS": side.levels is not None}
        constants[f"{name}_GAIN"] = side.gain_bytes
    constants |= {
        "D_K": store.key.site.head_dim,
        "D_V": store.value.site.head_dim,
        "V_GROUPS": groups,
        "V_GAIN_SUM": bool(value.gain.any()),
        "V_OFFSET": value.stored.offset is not None,
        "PAGED": key.stored.turns == "all" and rope is not None,
        "SEGMENTS": segments,
        "Z": bool(key.gain.any()) or segments > 1,
        "MEAN": mean is not None,
    }
    decoder = before_rope.decoder(key) if key.stored.turns == "token" else None
    layer = Layer(
        k,
        v,
        heads,
        store.key.site.head_dim,
        store.value.site.head_dim,
        block,
        store.timeline.sinks,
        store.layout.nbytes,
        torch.tensor(rows, dtype=torch.int32).to(device),
        None if rope is None else _rope_table(rope, site.head_dim).to(device),
        None if mean is None else mean.to(torch.float16).contiguous(),
        constants,
        weakref.ref(store),
        decoder=decoder,
    )
    if cuda.runs_on(device):
        layer.native = cuda.native(layer)
        if layer.native is not None:
            layer.cost, layer.served = cuda.costs(layer), cuda.served(layer)
    if layer.native is None:
        columns = [150.0 + sum(key.counts[h]) + sum(value.counts[h]) for h in range(heads)]
        layer.cost = tuple(round(32 * heads * c / sum(columns)) for c in columns)
    if layer.native is None and decoder is not None:
        raise NotLoweredError(cuda.refuses(layer) or "keys coded before RoPE are decoded on sm_90")
    if layer.native is None and v.chunks[2] and block == 128 and not interpreted():
        # their operands' registers lie otherwise than `unpack.assembly` takes them to
        raise NotLoweredError("values with columns of one bit are read on sm_90 and newer only")
    return layer


def _check(store: LayerStore, key: Operand, value: Operand) -> None:
    """Raise `NotLoweredError` for what this kernel does not read."""
    site = store.key.site
    if site.block_len not in BLOCKS:
        raise NotLoweredError(
            f"pages of {site.block_len} tokens; the CUDA kernel reads pages of 128 or 256"
        )
    for bound in (store.key, store.value):
        if bound.site.head_dim not in HEAD_DIMS:
            raise NotLoweredError(
                f"head_dim {bound.site.head_dim}; the CUDA kernel is made for "
                f"{', '.join(map(str, HEAD_DIMS))}"
            )
    if key.stored.offset is not None:
        raise NotLoweredError("keys with an offset a token are not read by the CUDA kernel")
    name = key.stored.gain
    fields = {f.name: f.shape for f in store.key.layout.fields}
    if name is not None and len(fields[name]) != 2 and fields[name][2] != 1:
        raise NotLoweredError("keys with several gains a token are not read by the CUDA kernel")
    fields = {f.name: f.shape for f in store.value.layout.fields}
    name = value.stored.gain
    if name is not None and len(fields[name]) == 3 and fields[name][2] > 1:
        groups = fields[name][2]
        counts = set(value.counts)
        one = len(counts) == 1 and sum(c > 0 for c in next(iter(counts))) == 1
        if not one or sum(next(iter(counts))) % (CHUNK * groups):
            raise NotLoweredError(
                f"values with {groups} gains a token whose groups are not runs of a multiple of "
                f"{CHUNK} columns of one width"
            )
    if key.stored.page_scale is not None:
        segments = {f.name: f.shape for f in store.key.layout.fields}[key.stored.page_scale][1]
        if site.block_len // segments % 16:
            raise NotLoweredError("key groups of a length that is no multiple of 16 tokens")
    for operand in (key, value):
        if operand.stored.levels is not None and operand.stored.levels.shape[0] > 1:
            raise NotLoweredError("codebooks that differ between heads")
    rope = key.rope
    if rope is not None and rope.scaling != 1.0:
        raise NotLoweredError(f"a rope with attention scaling {rope.scaling} in the query's turn")


def _rope_table(rope, dim: int) -> Tensor:
    """`[3, power of two]` frequency, sign of the partner in R^-1, partner's index; per channel."""
    padded = power_of_two(dim)
    table = torch.zeros(3, padded)
    table[2] = torch.arange(padded)
    freq = torch.tensor(rope.inv_freq, dtype=torch.float32)
    n = len(freq)
    a = torch.arange(n) if rope.pairs == "half" else 2 * torch.arange(n)
    b = a + n if rope.pairs == "half" else a + 1
    table[0, a], table[0, b] = freq, freq
    # R^-1 (x, y) = (x cos + y sin, y cos - x sin)
    table[1, a], table[1, b] = 1.0, -1.0
    table[2, a], table[2, b] = b.float(), a.float()
    return table


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return not hasattr(decode_kernel, "warmup") or "Interpreted" in type(decode_kernel).__name__


# --- workspaces ------------------------------------------------------------------------------


@dataclass
class Work:
    """Device memory of the launches, shared by all layers that need the same."""

    items: Tensor  #: [items, 4] kind, head, split, splits of the head
    parts: Tensor  #: [heads] splits of each head
    splits: int
    exact_splits: int
    sms: int  #: multiprocessors
    addresses: Tensor
    query: Tensor
    z: Tensor
    scores: Tensor
    sums: Tensor
    state: Tensor
    exact: Tensor
    exact_state: Tensor


_WORK: dict[tuple[object, ...], Work] = {}


def _plan(
    layer: Layer, rows: int, tiles: int, capacity: int, exact: int, tuning: Tuning, sms: int
) -> tuple[list[int], list[list[int]]]:
    """Splits of each head, in proportion to its columns, and the items of the grid."""
    total = max(1, tuning.programs * sms // (rows * tiles))
    most = max(1, capacity // tuning.least_pages)
    parts = [
        min(most, max(1, round(total * cost / sum(layer.cost)))) if capacity else 0
        for cost in layer.cost
    ]
    items = [[1, h, s, 0] for h in range(layer.heads) for s in range(-(-exact // EXACT_TOKENS))]
    for s in range(max(parts)):
        items += [[0, h, s, parts[h]] for h in range(layer.heads) if s < parts[h]]
    return parts, items


def _work(
    layer: Layer, rows: int, tiles: int, m: int, mean_n: int, capacity: int, exact: int,
    device: torch.device, tuning: Tuning,
) -> Work:  # fmt: skip
    c = layer.constants
    capacity = power_of_two(max(capacity, 1)) if capacity else 0  # few sizes, not one a page
    key = (
        device, rows, tiles, m, capacity, exact, tuning, layer.heads, layer.block, layer.value_dim,
        layer.cost, layer.key.columns, layer.value.columns, c["V_GROUPS"], c["PAGED"],
        c["SEGMENTS"], c["MEAN"],
    )  # fmt: skip
    if key in _WORK:
        return _WORK[key]
    sms = _multiprocessors(device)
    parts, items = _plan(layer, rows, tiles, capacity, exact, tuning, sms)
    splits, exact_splits = max(parts), -(-exact // EXACT_TOKENS)
    places = rows * tiles * layer.heads
    pages = max(capacity, 1)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def numbers(x: Sequence[object]) -> Tensor:
        made = torch.tensor(x, dtype=torch.int32)
        if device.type == "cuda":  # nothing waits
            return made.pin_memory().to(device, non_blocking=True)
        return made

    half = torch.float16
    paged, segments = bool(c["PAGED"]), int(c["SEGMENTS"])  # type: ignore[call-overload]
    groups = int(c["V_GROUPS"])  # type: ignore[call-overload]
    with torch.inference_mode(False):
        _WORK[key] = Work(
            numbers(items),
            numbers(parts),
            splits,
            exact_splits,
            sms,
            empty(rows, pages, dtype=torch.int64),
            empty(places, pages if paged else 1, m, layer.key.columns, dtype=half),
            empty(places, pages if paged or segments > 1 else 1, 2 * segments, m),
            empty(places, pages if c["MEAN"] else 0, layer.block, mean_n, dtype=half),
            empty(places, splits, m, layer.value.columns),
            empty(places, splits, 2 + 2 * groups, m),
            empty(places, exact_splits, m, layer.value_dim),
            empty(places, exact_splits, 2, m),
        )
    return _WORK[key]


# --- launches --------------------------------------------------------------------------------


def decode(
    q: Tensor,
    layer: Layer,
    exact_keys: Tensor,
    exact_values: Tensor,
    tokens: Tensor,
    query_tokens: Tensor,
    located: Located,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    out: Tensor | None = None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Attention of a few queries a row over packed pages and exact states; no host sync.

    All queries see all of a row's `located.folded` pages; of the exact tokens they see those up to
    their own. Products are in float16 (the exact part's in the model's dtype, float32 models' in
    float16), sums in float32. The same inputs give the same bits.

    Args:
        q: post-RoPE queries `[rows, query_heads, queries, key_dim]`, contiguous.
        layer: `lowered(store)`.
        exact_keys: `[rows, kv_heads, exact, key_dim]`, contiguous.
        exact_values: `[rows, kv_heads, exact, value_dim]`, contiguous.
        tokens: int32 `[rows, exact]` token index of each exact slot, -1 where it is empty.
        query_tokens: int32 `[rows, queries]` token index of each query, -1 for padding.
        located: pages of each row; `table`'s width is the capacity that launches are cut for.
        scaling: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sink_logits: `[query_heads]` logits that take part in the softmax and carry no value.
        out: where the result goes, `[rows, query_heads, queries, value_dim]`.
        tuning: how launches are cut.

    Returns:
        `[rows, query_heads, queries, value_dim]` in the dtype of `q`; zeros for padding queries.
    """
    rows, query_heads, queries, _ = q.shape
    if out is None:
        out = torch.empty(
            rows, query_heads, queries, layer.value_dim, dtype=q.dtype, device=q.device
        )
    if layer.native is not None:
        return cuda_decode.decode(
            q, layer, exact_keys, exact_values, tokens, query_tokens, located,
            scaling=scaling, softcap=softcap, sink_logits=sink_logits, out=out,
        )  # fmt: skip
    group = query_heads // layer.heads
    m = min(TILE, group * queries)
    tiles = -(-group * queries // m)
    mean_n = max(2, power_of_two(m))
    exact = exact_keys.shape[2]
    capacity = located.table.shape[1]
    tuning = tuning or Tuning()
    work = _work(layer, rows, tiles, m, mean_n, capacity, exact, q.device, tuning)
    c = layer.constants
    places = rows * tiles * layer.heads
    none = layer.table
    scale = float(scaling) * LOG2E.value
    key, value = layer.key, layer.value
    if capacity:
        into = work.addresses, work.query, work.z, work.scores
        prepare(
            q, layer, located, into, m=m, mean_n=mean_n, scale=scale,
            plain=interpreted(),
        )  # fmt: skip
    grid = (len(work.items), rows * tiles)
    decode_kernel[grid](
        work.items, layer.table, located.folded, work.addresses, capacity,
        work.query, work.z, work.scores,
        key.levels if key.levels is not None else none,
        value.levels if value.levels is not None else none,
        q, exact_keys, exact_values, tokens, query_tokens, exact,
        query_heads, queries, group, tiles, scale, (softcap or 0.0) * LOG2E.value,
        work.sums, work.state, work.exact, work.exact_state, work.splits, work.exact_splits,
        N=TILE, M=m, MEAN_N=mean_n, CAP=softcap is not None, EXACT_TOKENS=EXACT_TOKENS,
        DTYPE=DTYPES[q.dtype], STAGES=tuning.stages, **c, num_warps=layer.block // 64,
    )  # fmt: skip
    per = 1 if places * m <= 512 else m
    per = power_of_two(per)
    merge_kernel[(places, -(-m // per))](
        work.sums, work.state, work.exact, work.exact_state, work.parts, located.folded,
        value.matrix, value.gain, value.center,
        value.operand.offset if value.operand.offset is not None else none,
        value.operand.mean if value.operand.mean is not None else none,
        sink_logits if sink_logits is not None else none, query_tokens, out,
        work.splits, work.exact_splits, query_heads, queries, group, tiles,
        2.0**-value.exponent,
        HEADS=layer.heads, M=m, PER=per, D=layer.value_dim, C=value.columns,
        GROUPS=c["V_GROUPS"], GAIN_SUM=c["V_GAIN_SUM"], OFFSET=c["V_OFFSET"],
        MEAN=value.operand.mean is not None, SINK_LOGITS=sink_logits is not None,
        BLOCK=8 if per > 1 else 16, num_warps=tuning.merge_warps,
    )  # fmt: skip
    return out


def _multiprocessors(device: torch.device) -> int:
    """Of a device; of an H100 where kernels are interpreted."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- the dispatcher's contract ---------------------------------------------------------------


def refuses(q: Tensor, view: View) -> str | None:
    """Why this kernel cannot serve these queries and this layer; None where it does."""
    _, query_heads, queries, _ = q.shape
    if q.dtype not in DTYPES:
        return f"queries in {q.dtype}"
    if queries > MAX_QUERIES:
        return f"{queries} queries a row, the CUDA kernel takes up to {MAX_QUERIES}"
    if query_heads // view.keys.shape[1] > MAX_GROUP:
        return f"{query_heads // view.keys.shape[1]} query heads a KV head, {MAX_GROUP} at most"
    try:
        lowered(view.store)
    except NotLoweredError as error:
        return str(error)
    return None


def attend(
    q: Tensor,
    view: View,
    *,
    scaling: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """What `kvfold.attention.paged.attend` computes, in the dtype of `q`."""
    numbers = view.step.memo(
        ("int32 tokens", q.device, view.folded, view.tokens.data_ptr()),
        lambda: (view.tokens.int().contiguous(), view.query_tokens.int().contiguous()),
    )
    return decode(
        q.contiguous(),
        lowered(view.store),
        view.keys.contiguous(),
        view.values.contiguous(),
        *numbers,
        view.on(q.device),
        scaling=scaling,
        softcap=softcap,
        sink_logits=sink_logits,
    )
