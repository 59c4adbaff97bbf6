"""Decode attention in CUDA C++ for sm_90 and newer, compiled at the first call by NVRTC.

They take the places of the kernels of `kvfold.kernels.triton` where `refuses` says nothing: a warp
walks whole pages, so that mixed widths cost what the columns of a head cost.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvfold.kernels.cuda import before_rope, build
from kvfold.packing import CHUNK, SECTIONS

FOLDER = Path(__file__).parent
#: queries of a program: with two bytes each, the eight columns of a product.
TILE = 4
#: warps of a multiprocessor: codes of one width, which are no faster with more, and others
WARPS = 8, 12
#: warps of a program: those that make most; where keys are decoded, or others make queries
WARPS_OF_PROGRAM, SERVED_WARPS = (4, 2, 1), (8, 4)
#: warps of `makers.cuh`, and steps of products that the registers of one hold operands of
MAKERS, MAKER_STEPS = 4, 48
#: warps that walk pages beside makers, by those without, from which on makers are faster than
#: another launch; and pages that each walks at least
MADE_WORTH, MADE_PAGES = 0.8, 6
BLOCK = 128
#: what a warp does whose values come where its keys have been, of one that has room for both
OVER = 0.78
#: what it takes to begin at a row and head, in pages of each warp, and where keys are decoded
START, DECODED_START = 0.9, 0.6
#: what a page takes besides its columns, in columns
OF_PAGE = 400
#: the same where keys are decoded, and what waiting for keys takes there
OF_DECODED_PAGE, DECODED_WAIT = 120, 80
#: exact tokens of an item of work, which takes half as long as a page of a head.
EXACT_TOKENS = 16
#: bytes that are read behind a page's values at most, and not used: two chunks of 4 bits
BEHIND = 2 * CHUNK * 64
#: bytes of shared memory of a multiprocessor, of a program at most, and what each costs besides.
SHARED, SHARED_OF_PROGRAM, RESERVED = 233_472, 232_448, 1024
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
#: pages that four warps of `prepare.cu` take at once, and warps of its program
PREPARE_PAGES, PREPARE_WARPS = 32, 16
#: numbers that its warps add up, of each query of the pages that they take at once
PREPARE_SUMS = PREPARE_WARPS * PREPARE_PAGES * 4
#: warps of a program of `send.cu`
SEND_WARPS = 8
MERGE_THREADS = 512


@dataclass
class Native:
    """What the kernels need of a layer, and the compiled kernels.

    Args:
        tables: `operands` of the products of `prepare.cu`; None where no page has queries or scores
            of its own.
        own: of those of `attend.cu`: `own_operands` for queries that hold for all pages,
            `made_operands` where programs make what pages have of their own; else None.
        centers: int8 `[heads, columns]` twice the middle of each column's digits, negative: of each
            head's chunks of 16 columns side by side, zeros behind them.
        about: float32 `[heads, 2]` length of the longest column of the key matrix, and the sum of
            all centers.
        kernels: by name and what else their constants depend on.
    """

    tables: Tensor | None
    own: Tensor | None
    centers: Tensor | None
    about: Tensor | None
    kernels: dict[Any, Any]


def native(layer: Any) -> "Native | None":
    """The tables of a layer that these kernels read; None where they refuse it.

    Args:
        layer: `kvfold.kernels.triton.decode.Layer`.
    """
    if refuses(layer) is not None:
        return None
    if layer.decoder is not None:
        return Native(None, None, None, None, {})
    reach = layer.key.matrix.float().norm(dim=1).amax(-1) * 2.0**-layer.key.exponent
    centers = torch.zeros_like(layer.key.center, dtype=torch.int8)
    for h, slots in enumerate(slots_of(layer)):
        centers[h, : len(slots)] = (2 * layer.key.center[h, slots]).to(torch.int8)
    about = torch.stack([reach, centers.float().sum(1)], 1).contiguous()
    tables = operands(layer) if prepares(layer) else None
    if made(layer):
        own = made_operands(layer)
    else:
        own = None if layer.constants["PAGED"] else own_operands(layer)
    return Native(tables, own, centers, about, {})


def prepares(layer: Any) -> bool:
    """Whether a launch of its own, `prepare.cu`, makes queries and the mean's scores of pages."""
    c = layer.constants
    return layer.decoder is None and bool(c["PAGED"] or c["MEAN"]) and not made(layer)


def made(layer: Any) -> bool:
    """Whether programs of `attend.cu` make what pages have of their own; see `served`."""
    return bool(layer.constants.get("MADE"))


def served(layer: Any) -> Any:
    """The layer whose programs of `attend.cu` make what pages have of their own, for many pages.

    None where their registers have no room for the tables, or the launch before, which makes it
    otherwise, leaves attention so many more warps that it is faster.
    """
    c, device = layer.constants, layer.table.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        return None  # registers do not move between warps
    if not c["PAGED"] or not whole_keys(layer) or layer.key.columns > 4 * 32 * MAKERS:
        return None
    if -(-made_tiles(layer) // MAKERS) * (layer.key_dim // 16) > MAKER_STEPS:
        return None
    found = replace(layer, constants={**c, "MADE": True})
    worth = shared(found, TILE, TILE).worth
    if not worth or worth < MADE_WORTH * shared(layer, TILE, TILE).worth:
        return None
    found.native, found.cost = native(found), costs(found)
    return found


def many(pages: int, device: torch.device) -> bool:
    """Whether warps beside makers walk `MADE_PAGES` or more, of so many pages of all heads."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return pages >= MADE_PAGES * SERVED_WARPS[0] * sms


def costs(layer: Any) -> tuple[int, ...]:
    """How long a page of each head takes, 32 on average."""
    found = columns(layer)
    return tuple(round(32 * layer.heads * c / sum(found)) for c in found)


def made_tiles(layer: Any) -> int:
    """Tiles of 16 rows that makers multiply queries with, of the head that has most."""
    columns = max(map(len, slots_of(layer))) // CHUNK
    return (0 if layer.mean is None else BLOCK // 16) + columns + 1


def slots_of(layer: Any) -> list[list[int]]:
    """The columns of each head's chunks of 16, of each section the first ones."""
    found = []
    for counts in layer.key.operand.counts:
        slots: list[int] = []
        first = 0
        for most, count in zip(layer.key.chunks, counts, strict=True):
            slots += range(16 * first, 16 * (first + -(-count // 16)))
            first += most
        found.append(slots)
    return found


def sends(layer: Any, places: int, sms: int) -> bool:
    """Whether queries that hold for all pages come from the launch before attention.

    Each program makes them where there are many rows: programs of another launch would keep those
    of attention from beginning.
    """
    if layer.decoder is not None or layer.constants["PAGED"]:
        return False
    return prepares(layer) or places <= sms // 8


def rows_of(layer: Any) -> list[Tensor]:
    """Float16 rows that queries are multiplied with for columns, of each head.

    Its chunks of 16 columns, and where keys are digits the gain term as two float16 parts.
    """
    key, found = layer.key, []
    for h, slots in enumerate(slots_of(layer)):
        rows = key.matrix[h, :, slots].mT
        if whole_keys(layer):
            gain = key.gain.new_zeros(16, layer.key_dim)
            gain[0] = key.gain[h].half()
            gain[1] = (key.gain[h] - gain[0]).half()
            rows = torch.cat([rows, gain.half()])
        found.append(rows)
    return found


def own_operands(layer: Any) -> Tensor:
    """Float16 `[heads, tiles, dim / 16, 32, 8]`: `rows_of` as `columns.cuh` multiplies with them.

    Each lane's eight numbers of a product lie together; of a tile of 16 rows, g and g + 8 are
    columns 4 (g / 2) + g % 2 and that + 2.
    """
    return fragments(layer, rows_of(layer), layer.key.columns // 16 + whole_keys(layer))


def made_operands(layer: Any) -> Tensor:
    """`page_rows` as `own_operands` lie, `made_tiles` of them."""
    return fragments(layer, page_rows(layer), made_tiles(layer))


def page_rows(layer: Any) -> list[Tensor]:
    """Float16 rows that a page's queries are multiplied with, of each head.

    Those of the mean for a page's tokens, where there is one; `rows_of` where pages have queries of
    their own.
    """
    none = layer.key.matrix.new_empty(0, layer.key_dim, dtype=torch.float16)
    found = rows_of(layer) if layer.constants["PAGED"] else [none] * layer.heads
    if layer.mean is None:
        return found
    return [torch.cat([layer.mean[h].half(), rows]) for h, rows in enumerate(found)]


def fragments(layer: Any, rows: Sequence[Tensor], tiles: int) -> Tensor:
    """Rows of each head as lanes take them for products, zeros behind them: see `own_operands`."""
    dim = layer.key_dim
    x = torch.zeros(len(rows), 16 * tiles, dim, dtype=torch.float16)
    for h, found in enumerate(rows):
        x[h, : len(found)] = found
    # tile, g / 2, which row, g % 2, step, half, channel / 2, channel % 2
    # -> tile, step, g / 2, g % 2, channel / 2, half, which row, channel % 2
    x = x.reshape(len(rows), -1, 4, 2, 2, dim // 16, 2, 4, 2).permute(0, 1, 5, 2, 4, 7, 6, 3, 8)
    return x.reshape(len(rows), -1, dim // 16, 32, 8).contiguous().to(layer.key.matrix.device)


def operands(layer: Any) -> Tensor:
    """Float16 `[heads, groups, dim / 16, 8, 2, 8, 8]`: `page_rows` as `prepare.cu` takes them.

    Four tiles of 16 rows are a group. Rows g and g + 8 of a tile are its columns
    4 (g / 2) + g % 2 and that + 2.
    """
    dim, found = layer.key_dim, page_rows(layer)
    x = torch.zeros(len(found), 64 * groups(layer), dim, dtype=torch.float16)
    for h, rows in enumerate(found):
        x[h, : len(rows)] = rows
    # group, tile, g / 2, which row, g % 2, step, half, channel
    # -> group, step, tile, which row, half, g, channel
    x = x.reshape(len(found), -1, 4, 4, 2, 2, dim // 16, 2, 8).permute(0, 1, 6, 2, 4, 7, 3, 5, 8)
    return x.reshape(len(found), -1, dim // 16, 8, 2, 8, 8).contiguous().to(layer.key.matrix.device)


def groups(layer: Any) -> int:
    """Groups of four tiles of the head that has most."""
    chunks = [sum(-(-n // 16) for n in counts) for counts in layer.key.operand.counts]
    means = 0 if layer.mean is None else BLOCK // 16
    paged = max(chunks) + 1 if layer.constants["PAGED"] else 0
    return -(-(means + paged) // 4)


def runs_on(device: torch.device) -> bool:
    """Whether a device runs these kernels and torch can compile and launch them."""
    if device.type != "cuda" or torch.version.hip:
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin < SHARED_OF_PROGRAM:  # sm_120
        return False
    try:
        build.library()
        build.driver()
    except (ImportError, AttributeError, OSError):
        return False
    return True


def whole_keys(layer: Any) -> bool:
    """Whether keys are digits whose steps hold for a page: products of bytes."""
    digits = layer.key.levels is None and layer.constants["SEGMENTS"] == 1
    return digits and layer.decoder is None


def refuses(layer: Any) -> str | None:
    """Why these kernels cannot read a layer; None where they can."""
    if layer.block != BLOCK:
        return f"pages of {layer.block} tokens"
    for side in (layer.key, layer.value):
        starts = [first for head in side.operand.sections for first in head]
        if any(start % 16 for start in starts):
            return "sections that do not begin at a multiple of 16 bytes"
        if any(count % 2 for head in side.operand.counts for count in head):
            return "an odd number of columns"
    device = layer.table.device
    if layer.decoder is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            return f"keys coded before RoPE on sm_{major}{minor}; sm_90 is possible"
    at = [*layer.table[:, 12:16].flatten().tolist(), zero_at(layer)]
    if any(byte % 16 for byte in at) or layer.page_bytes % 16:
        return "gains that do not begin at a multiple of 16 bytes"
    if not shared(layer, TILE, TILE).programs:
        return "pages too large for a multiprocessor's shared memory"
    if not prepares(layer):
        return None
    own = 0 if layer.constants["PAGED"] else query_bytes(layer, TILE) + 16 * (PREPARE_WARPS + 1)
    total = prepare_bytes(layer, TILE, PREPARE_PAGES)
    if total > SHARED_OF_PROGRAM or own > 4 * PREPARE_SUMS:
        return "tables too large for a multiprocessor's shared memory"
    return None


def macros(
    layer: Any, m: int, mean_n: int, cap: bool, dtype: torch.dtype, once: bool = True,
    sent: bool = False,
) -> dict[str, int | str]:  # fmt: skip
    """The constants that `attend.cu` is compiled with.

    Args:
        layer: `kvfold.kernels.triton.decode.Layer`.
        m: queries of a program, 1 to `TILE`.
        mean_n: queries for which the mean's scores have room.
        cap: whether scores are soft-capped.
        dtype: of the exact states and of the queries.
        once: whether one program alone reads a page of a head: there are no more than `m` queries.
        sent: whether queries that hold for all pages come from the launch before.
    """
    c, cut = layer.constants, shared(layer, m, mean_n)
    names = ("HEADS", "D_K", "D_V", "K4", "K2", "K1", "V4", "V2", "V1", "K_GAIN", "V_GAIN")
    found: dict[str, int | str] = {name: int(c[name]) for name in names}
    for name in ("V_GROUPS", "V_GAIN_SUM", "V_OFFSET", "PAGED", "SEGMENTS", "MEAN"):
        found[name] = int(c[name])
    found |= {"M": m, "MEAN_N": mean_n, "CAP": int(cap), "DTYPE": DTYPES[dtype], "ONCE": int(once)}
    found |= {"SENT": int(sent), "Q_BYTES": query_bytes(layer, m), "MADE": int(made(layer))}
    if made(layer):
        found |= {"MADE_TILES": made_tiles(layer), **turn_macros(layer)}
    found |= {
        "ZERO_AT": zero_at(layer),
        "EXACT": EXACT_TOKENS,
        "TOKEN": layer.decoder.blocks if layer.decoder else 0,
    }
    found |= {"K_WHOLE": int(layer.key.whole > 0), "FULL": int(full(layer))}
    found |= {"WARPS": cut.warps, "PROGRAMS": cut.programs}
    for name, side in (("K", layer.key), ("V", layer.value)):
        found[f"{name}_LEVELS"] = int(side.levels is not None)
        if side.levels is not None:
            halves = side.levels.to(torch.float16).cpu().view(torch.int16).tolist()
            for part, shift in (("LOW", 0), ("HIGH", 8)):
                words = [
                    sum(((halves[4 * i + j] >> shift) & 255) << 8 * j for j in range(4))
                    for i in range(4)
                ]
                found[f"{name}_TABLE_{part}"] = ",".join(f"0x{w:08x}u" for w in words)
    return found


def full(layer: Any) -> bool:
    """Whether all heads have all columns of all chunks."""
    return all(
        count == CHUNK * chunks
        for side in (layer.key, layer.value)
        for counts in side.operand.counts
        for count, chunks in zip(counts, side.chunks, strict=True)
    )


def zero_at(layer: Any) -> int:
    """First byte of the zero points of keys, 0 where they have none."""
    operand = layer.key.operand
    return operand.bytes.get(operand.stored.page_zero or "", 0)


def prepare_macros(
    layer: Any, m: int, mean_n: int, dtype: torch.dtype, turned: int
) -> dict[str, int | str]:
    """The constants that `prepare.cu` is compiled with, `turned` pages at once."""
    c = layer.constants
    return send_macros(layer, m, dtype) | {
        "GROUPS": groups(layer),
        "PASS": turned,
        "MEAN_N": mean_n,
        "PAGED": int(c["PAGED"]),
        "MEAN": int(c["MEAN"]),
        **turn_macros(layer),
    }


def turn_macros(layer: Any) -> dict[str, int | str]:
    """How queries are turned: whether, the table's row length, whether both halves alike."""
    rope = layer.rope
    return {
        "TURN": int(rope is not None),
        "ROPE_D": 0 if rope is None else rope.shape[1],
        "HALVES": int(rope is not None and torch.equal(*rope[0].chunk(2))),
    }


def send_macros(layer: Any, m: int, dtype: torch.dtype) -> dict[str, int | str]:
    """The constants that `send.cu` is compiled with."""
    found: dict[str, int | str] = {name: int(layer.constants[name]) for name in ("K4", "K2", "K1")}
    found |= {"HEADS": layer.heads, "M": m, "D_K": layer.key_dim, "DTYPE": DTYPES[dtype]}
    return found | {"WHOLE_KEYS": int(whole_keys(layer)), "Q_BYTES": query_bytes(layer, m)}


def merge_macros(
    layer: Any, m: int, per: int, sink_logits: bool, dtype: torch.dtype
) -> dict[str, int | str]:
    """The constants that `merge.cu` is compiled with, `per` queries a program."""
    c = layer.constants
    return {
        "HEADS": layer.heads,
        "M": m,
        "PER": per,
        "D": layer.value_dim,
        "C": layer.value.columns,
        "GROUPS": int(c["V_GROUPS"]),
        "DTYPE": DTYPES[dtype],
        "GAIN_SUM": int(c["V_GAIN_SUM"]),
        "OFFSET": int(c["V_OFFSET"]),
        "MEAN": int(layer.value.operand.mean is not None),
        "SINK_LOGITS": int(sink_logits),
        "STAGED": int(merge_bytes(layer, per)[1]),
    }


def merge_bytes(layer: Any, per: int) -> tuple[int, bool]:
    """Shared memory of `merge.cu`, and whether it has room for the head's matrix."""
    dim, columns = layer.value_dim, layer.value.columns
    groups, parts = MERGE_THREADS // 32 // per, 2 * MERGE_THREADS // dim
    found = max(groups * columns, parts * dim)
    state = 4 + 2 * int(layer.constants["V_GROUPS"])
    least = up(per * (columns + found + groups * dim + state), 32) * 4
    staged = least + 2 * columns * dim + 8
    room = min(SHARED // (2 if per > 2 else 1) - RESERVED, SHARED_OF_PROGRAM)
    return (staged, True) if staged <= room else (least, False)


def source(name: str) -> str:
    """The CUDA C++ of a kernel, `attend`, `merge`, `prepare` or `send`, with what it includes."""
    text = (FOLDER / f"{name}.cu").read_text(encoding="utf-8")
    return re.sub(r'#include "(.*)"', lambda found: (FOLDER / found[1]).read_text("utf-8"), text)


def options(found: dict[str, int | str]) -> list[str]:
    """They as options of a compiler."""
    return [f"-D{name}={value}" for name, value in found.items()]


@dataclass(frozen=True)
class Shared:
    """Shared memory of `attend.cu` in bytes, and how many programs have room at once.

    Args:
        warps: warps of a program; each walks pages of its own.
        programs: programs of a multiprocessor.
        total: bytes of a program.
        warp: bytes of a warp.
        sums_at: where its sums over columns begin.
        room: bytes for a page's keys and values.
        worth: warps of a multiprocessor, those of heads whose values wait in part.
    """

    warps: int
    programs: int
    total: int
    warp: int
    sums_at: int
    room: int
    worth: float


def shared(layer: Any, m: int, mean_n: int) -> Shared:
    """How a multiprocessor's shared memory is cut: the most warps with room for keys and values."""
    c = layer.constants
    q = query_bytes(layer, m)
    # a step and a zero point for each segment and channel, or a gain a token
    extra = c["SEGMENTS"] * layer.key_dim * 4 if c["SEGMENTS"] > 1 else BLOCK * c["K_GAIN"]
    of_page = q * c["PAGED"] if layer.decoder is None else 8 * layer.key_dim
    of_page += BLOCK * mean_n * 2 * c["MEAN"]
    columns_at = up(128 + extra + of_page * (1 + made(layer)), 128)
    apart, least = room_of(layer)
    ends = (2 + 2 * c["V_GROUPS"]) * TILE * 4
    exact = (layer.key_dim + layer.key_dim // 4 + EXACT_TOKENS) * TILE * 4
    gains = 4 * BLOCK * (c["K_GAIN"] == 1 or c["V_GAIN"] == 1)  # made of bytes
    rest = columns_at + max(layer.value.columns * TILE * 4 + ends + gains, exact, BEHIND)
    widths = sum(chunks > 0 for side in (layer.key, layer.value) for chunks in side.chunks)
    of_all, of_program, of_device = 0, WARPS_OF_PROGRAM, WARPS[widths > 2]
    own = layer.decoder is None and not c["PAGED"]  # queries of all pages, and what their sums take
    if layer.decoder is not None:  # four warps share a product, all share the tables
        of_all = up(before_rope.nbytes(layer.decoder.blocks, layer.key_dim, m), 128)
    if made(layer):
        of_all = up(maker_bytes(layer, m), 128)
    alone = layer.decoder is not None or made(layer)  # all warps share others
    if alone:
        of_program = SERVED_WARPS
    best = Shared(0, 0, 0, 0, 0, 0, 0.0)
    for warps in of_program:
        for programs in range(1, 2 if alone else of_device // warps + 1):
            fixed = RESERVED + (up(q + 16 * (warps + 1), 128) if own else 0) + of_all
            warp = (SHARED // programs - fixed) // warps // 128 * 128
            room = min(warp - up(rest, 128), max(apart))
            if room < least:
                continue
            share = sum(n <= room for n in apart) / len(apart)
            worth = programs * warps * (OVER + (1 - OVER) * share)
            if worth > best.worth:
                sums_at, warp = columns_at + room, up(rest, 128) + room
                total = fixed - RESERVED + warps * warp
                best = Shared(warps, programs, total, warp, sums_at, room, worth)
    return best


def room_of(layer: Any) -> tuple[list[int], int]:
    """Bytes of a page's keys and values side by side, for each head, and of the largest alone.

    Values lie behind keys, or over them. What lies behind a section is read too, up to `BEHIND`.
    """
    c = layer.constants
    keys, values = (
        [sum(n * w * 16 for n, w in zip(head, SECTIONS, strict=True)) for head in side.counts]
        for side in (layer.key.operand, layer.value.operand)
    )
    weights = BLOCK * c["V_GROUPS"] * (c["V_GAIN"] + 2 * c["V_OFFSET"])
    apart = [up(k, 128) + up(v + weights, 128) for k, v in zip(keys, values, strict=True)]
    return apart, max(up(max(k, v + weights), 128) for k, v in zip(keys, values, strict=True))


def columns(layer: Any) -> list[float]:
    """How long a page of each head takes, in columns; more where its values wait for its keys."""
    room = shared(layer, TILE, TILE).room
    waits = [n > room for n in room_of(layer)[0]]
    values = [sum(v) for v in layer.value.operand.counts]
    if layer.decoder is not None:
        about = zip(layer.decoder.counts, values, waits, strict=True)
        return [OF_DECODED_PAGE + 64 * b + 0.6 * v + DECODED_WAIT * w for b, v, w in about]
    about = zip(map(sum, layer.key.operand.counts), values, waits, strict=True)
    return [(OF_PAGE + k + v) / (OVER if w else 1) for k, v, w in about]


def query_bytes(layer: Any, m: int) -> int:
    """Bytes of the columns' queries of a page and program, and of what belongs to them.

    Whole lines of the L2 cache, which are forgotten when they have been read, where they come from
    another launch.
    """
    columns = layer.key.columns
    if made(layer):
        return 2 * TILE * max(map(len, slots_of(layer))) + 4 * (MAKERS + 2) * TILE
    return up(2 * TILE * columns + 8 * TILE if whole_keys(layer) else 2 * m * columns, 128)


def maker_bytes(layer: Any, m: int) -> int:
    """Shared memory of the warps of `makers.cuh`, where they serve most."""
    dim, most = layer.key_dim, SERVED_WARPS[0]
    words = 2 * m * (dim + 8) + 4 + 2 * most + layer.key.columns // 4
    return MAKERS * 128 + most // 2 * dim * 16 + words * 4


def prepare_bytes(layer: Any, m: int, turned: int) -> int:
    """Shared memory of `prepare.cu`."""
    dim, columns = layer.key_dim, layer.key.columns
    fixed = (2 * m * (dim + 8) + columns // 4 + 4 + 4 * turned + PREPARE_SUMS) * 4 + 8
    return groups(layer) * dim * 128 + turned * dim * 8 + fixed


def turned_at_once(layer: Any, m: int, run: int) -> int:
    """Pages for which `prepare.cu` turns queries at once."""
    fits = prepare_bytes(layer, m, 2 * PREPARE_PAGES) <= SHARED_OF_PROGRAM
    return PREPARE_PAGES * (1 + (fits and run > PREPARE_PAGES))


def up(n: int, to: int) -> int:
    """N rounded up to a multiple."""
    return -(-n // to) * to


@functools.cache
def compiled(name: str, found: tuple[tuple[str, int | str], ...], total: int, device: int) -> Any:
    """A kernel for these constants, with up to that much shared memory."""
    return build.load(source(name), name, options(dict(found)), device, total)


def cut_for(
    layer: Any, lines: int, capacity: int, exact_splits: int, cut: Shared, sms: int
) -> tuple[int, tuple[int, ...], int]:
    """Programs of `attend.cu`; what a page of each head costs, and to begin at a row and head.

    Programs get pieces that are equally expensive. As many as a device has room for, fewer where
    pages are few. Where rows are equally long each program has a part of one place, or some whole
    ones, if few are lost: one that goes on to another place adds up sums twice.

    Args:
        layer: `kvfold.kernels.triton.decode.Layer`.
        lines: rows and tiles of queries.
        capacity: of a row, in pages.
        exact_splits: items of exact tokens of a row and head.
        cut: of its shared memory.
        sms: multiprocessors of the device.
    """
    places = lines * layer.heads
    room = cut.programs * sms
    if sends(layer, places, sms) and not prepares(layer):
        room -= places  # where `send.cu` is
    programs = min(room, places * exact_splits + -(-places * capacity // cut.warps))
    programs = min(programs, (2**32 - 1) // max(places * exact_splits, 1))  # times items: 32 bits
    pages = START if layer.decoder is None else DECODED_START
    costs, start = layer.cost, round(pages * cut.warps * sum(layer.cost) / layer.heads)
    if len(set(costs)) == 1 or places * capacity <= programs * cut.warps:
        costs = (32,) * layer.heads  # pages of all heads take as long: a warp has one at most
        whole = -(-places // programs)
        aligned = (
            programs // places * places if whole == 1 else places // whole * (not places % whole)
        )
        if aligned >= 0.9 * programs:
            programs, start = aligned, 0
    else:
        shares = shares_of(costs, programs // lines)
        worst = max((c / n for c, n in zip(costs, shares, strict=False)), default=0.0)
        if shares and worst * programs <= 1.06 * lines * sum(costs):
            programs, costs, start = lines * sum(shares), shares, 0
    total = lines * (max(capacity, 1) * sum(costs) + layer.heads * start)
    if total + start + max(costs) >= 2**32:  # `is_last` looks a page further
        raise ValueError(f"{lines} rows and tiles of {capacity} pages are more than a launch takes")
    return programs, costs, start


def shares_of(costs: Sequence[int], programs: int) -> tuple[int, ...]:
    """Whole programs for each head, so that the largest cost of one is smallest; () if too few."""
    if programs < len(costs):
        return ()
    shares = [1] * len(costs)
    for _ in range(programs - len(costs)):
        shares[max(range(len(costs)), key=lambda h: costs[h] / shares[h])] += 1
    return tuple(shares)


def prepare(
    layer: Any, places: int, pages: int, sms: int, arguments: Sequence[Any],
    factors: Sequence[float], *, m: int, mean_n: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Launch `prepare.cu` for `places` rows and heads of up to `pages` pages.

    Args:
        layer: `kvfold.kernels.triton.decode.Layer`.
        places: rows x tiles x heads.
        pages: capacity of a row.
        sms: multiprocessors of the device.
        arguments: all but the pages of a run and the factors.
        factors: on queries, and on products with the matrix.
        m: queries of a program.
        mean_n: queries for which the mean's scores have room.
        dtype: of the queries.
    """
    run = up(min(-(-places * pages // sms), pages), PREPARE_PAGES)
    turned = turned_at_once(layer, m, run)
    key = ("prepare", m, dtype, turned)
    if key not in layer.native.kernels:
        total = prepare_bytes(layer, m, turned)
        found = tuple(prepare_macros(layer, m, mean_n, dtype, turned).items())
        kernel = compiled("prepare", found, total, layer.table.device.index or 0)
        layer.native.kernels[key] = kernel, total
    kernel, total = layer.native.kernels[key]
    grid = places, -(-pages // run), 1
    if 2 * places * grid[1] <= sms and layer.constants["PAGED"] and layer.constants["MEAN"]:
        grid = (*grid[:2], 2)
    kernel(grid, 32 * PREPARE_WARPS, [*arguments, run, *factors], total)


def send(
    layer: Any, places: int, arguments: Sequence[Any], factors: Sequence[float], *, m: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Launch `send.cu` for `places` rows and heads; factors on queries, and on products."""
    key = ("send", m, dtype)
    if key not in layer.native.kernels:
        found = tuple(send_macros(layer, m, dtype).items())
        layer.native.kernels[key] = compiled("send", found, 0, layer.table.device.index or 0)
    kernel = layer.native.kernels[key]
    kernel((places, 1, 1), 32 * SEND_WARPS, [*arguments, *factors], 0)


def attend(
    layer: Any, programs: int, arguments: Sequence[Any], *, m: int, mean_n: int, cap: bool,
    dtype: torch.dtype, once: bool, sent: bool,
) -> None:  # fmt: skip
    """Launch `attend.cu` with the arguments that come before its cut."""
    key = ("attend", m, dtype, cap, once, sent)
    if key not in layer.native.kernels:
        cut = shared(layer, m, mean_n)
        found = tuple(macros(layer, m, mean_n, cap, dtype, once, sent).items())
        kernel = compiled("attend", found, cut.total, layer.table.device.index or 0)
        layer.native.kernels[key] = kernel, cut
    kernel, cut = layer.native.kernels[key]
    sizes = inverse(programs), cut.warp, cut.sums_at
    warps = cut.warps
    if layer.decoder is not None:
        warps += before_rope.BRINGERS
    elif made(layer):
        warps += MAKERS
    kernel((programs, 1, 1), 32 * warps, [*arguments, *sizes], cut.total)


def exact_cost(costs: Sequence[int]) -> int:
    """What an item of exact tokens costs, half of a page: no piece begins a page later for one."""
    return min(sum(costs) // (2 * len(costs)), min(costs) - 1)


def inverse(programs: int) -> int:
    """2^32 / programs, as the 32 bits of an int."""
    found = min(2**32 // programs, 2**32 - 1)
    return found - 2**32 * (found >= 2**31)


def queries_of_merge(m: int, places: int, sms: int) -> int:
    """Queries of a program of `merge.cu`, a divisor of the `m` of a place: it reads what it has."""
    return next(n for n in (1, 2, m) if n == m or (m % n == 0 and places * m // n <= sms))


def merge(
    layer: Any, places: int, arguments: Sequence[Any], unscale: float, *, m: int, sms: int,
    sink_logits: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Launch `merge.cu` for `places` rows and heads.

    A program takes one query, or two, where that leaves multiprocessors idle otherwise.
    """
    per = queries_of_merge(m, places, sms)
    key = ("merge", m, per, dtype, sink_logits)
    if key not in layer.native.kernels:
        found = merge_macros(layer, m, per, sink_logits, dtype)
        total = merge_bytes(layer, per)[0]
        kernel = compiled("merge", tuple(found.items()), total, layer.table.device.index or 0)
        layer.native.kernels[key] = kernel, total
    kernel, total = layer.native.kernels[key]
    kernel((places, -(-m // per), 1), MERGE_THREADS, [*arguments, unscale], total)
