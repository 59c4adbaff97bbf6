"""The codec contract, presets and their catalogue.

A `Codec` is a frozen dataclass of knobs. Bound to a `Site` (one layer's keys or values) it becomes
a `BoundCodec`, which encodes blocks to the fields of its `layout` and decodes them. Attention need
not decode: every code here can be read as

    x_n  =  W^T [ g_n * y_n ;  g_n ;  o_n ;  1 ]                                           (read)

with y_n the columns that are stored (small digits, or the levels of a table), g_n a gain and o_n
an offset per token, and W a matrix that no token owns. `read` gives y, g and o of a page;
W works on the other side of the product and is applied once per page and query, not per token:

    score(q, n)  =  g_n * (q_page . y_n + q_gain) + o_n * q_offset + mean_n                (query)
    sum_n p_n x_n  =  W^T [ sum p_n g_n y_n ; sum p_n g_n ; sum p_n o_n ; sum p_n ]        (output)

A code for which no such W exists (pre-RoPE keys) reads as its decoded states.
"""

import contextlib
import difflib
import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, Protocol, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kvfold.layout import Field, Layout, PageLayout
from kvfold.transforms.rope import Rope

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact
    from kvfold.packing import DigitPlan

P = ParamSpec("P")
R = TypeVar("R")
Side = Literal["key", "value"]
Fields = dict[str, Tensor]


class CodecError(ValueError):
    """A codec cannot do what was asked: says what was asked, what was found, what is possible."""


@dataclass(frozen=True)
class Site:
    """Where a codec works: the keys or the values of one layer.

    Args:
        side: `"key"` or `"value"`.
        num_kv_heads: key/value heads of the layer.
        head_dim: channels of a head on this side.
        block_len: tokens of a block.
        layer: index of the layer in its model.
        dtype: the model's dtype, stored by `identity`, given back by the cache's exact parts.
        device: where the tables of the bound codec live.
        rope: the layer's rotary embedding, None where it has none or it is unknown.
    """

    side: Side
    num_kv_heads: int
    head_dim: int
    block_len: int = 128
    layer: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    rope: Rope | None = None

    @property
    def axis(self) -> Literal["channel", "token"]:
        """The contraction axis of attention, along which digits are packed."""
        return "channel" if self.side == "key" else "token"


@dataclass(frozen=True)
class Reading:
    """What attention reads of a page in place of decoded states; shapes with N pages.

    `gain` and `offset` have one entry for each of `groups` equal runs of columns (groups = 1
    mostly); None stands for ones and for zeros.
    """

    columns: Float[Tensor, "pages heads block_len columns"]
    gain: Float[Tensor, "pages heads block_len groups"] | None = None
    offset: Float[Tensor, "pages heads block_len groups"] | None = None


@dataclass(frozen=True)
class Query:
    """A query prepared for the pages it will read, the counterpart of `Reading` for scores.

    `segments` runs of `block_len / segments` tokens each have a query of their own (KIVI's key
    groups); it is 1 elsewhere. `pages` may be 1 where every page takes the same query.
    """

    columns: Float[Tensor, "pages heads segments queries columns"]
    gain: Float[Tensor, "pages heads segments queries groups"] | None = None
    offset: Float[Tensor, "pages heads queries groups"] | None = None
    mean: Float[Tensor, "pages heads queries block_len"] | None = None


@dataclass(frozen=True)
class Total:
    """Weighted sums over tokens, the counterpart of `Reading` for values; linear in the weights."""

    columns: Float[Tensor, "*batch heads queries columns"]
    gain: Float[Tensor, "*batch heads queries groups"]
    offset: Float[Tensor, "*batch heads queries groups"]
    one: Float[Tensor, "*batch heads queries 1"]


@dataclass(frozen=True)
class Stored:
    """How the columns that `read` gives lie in the fields, for kernels that read the bytes.

    With d the digits of `plan`, a column is y = d, or `levels[d]`. Per token and head there may be
    gains and offsets (`groups` equal runs of columns share one, as in `Reading`).

    Args:
        plan: the digit columns; their fields are named `digits4`, `digits2`, `digits1`.
        gain: field `[heads, block_len(, groups)]`: float16, or uint8 for 2^((byte - 128) / 16)
            with byte 0 for 0; None for ones.
        offset: field `[heads, block_len(, groups)]` float16, None for zeros.
        levels: `[heads or 1, 16]` values of the digits where they are not affine; all columns are
            of one width then.
        page_scale: field `[heads, segments, columns]` float16 that multiplies the prepared query
            of each page's segments of tokens (keys); with it comes `page_zero`.
        page_zero: field like `page_scale` whose product with the query is the query's gain term.
        turns: what takes the query turned back by RoPE (keys): nothing; the mean's table alone, or
            the columns and the mean, to the page's first position; or all of it to each token's
            own position (keys coded before RoPE), as `BoundCodec.token_query` prepares it.
        share: heads whose columns, side by side, make each of these heads' keys (`turns="token"`);
            each of them has gains and offsets of its own.
    """

    plan: "DigitPlan"
    gain: str | None = None
    offset: str | None = None
    levels: Tensor | None = None
    page_scale: str | None = None
    page_zero: str | None = None
    turns: Literal["nothing", "mean", "all", "token"] = "nothing"
    share: int = 1


@dataclass(frozen=True)
class Tabled:
    """How columns that are no digits lie in the fields: entries of a table, at codes from digits.

    Column c of head h is `table[start[h, c] + code]` with the code of the plans' coordinate c
    (coordinates of several plans side by side). Polar columns come in pairs, from coordinate i of
    the first plan and of the second:

        (y_2i, y_2i+1)  =  table[radius_i] * (table[cos_at + angle_i], table[sin_at + angle_i])

    Args:
        plans: (prefix of its fields, plan).
        gains: fields `[heads, block_len]`, one for each equal run of columns: float16, or uint8 as
            in `Stored`; empty for ones.
        table: the tables behind one another.
        start: `[heads, columns]` where a column's table starts, -1 where the column is zeros; None
            for polar columns.
        cos_at: where the angles' cosines start in the table (polar).
        sin_at: their sines.
    """

    plans: tuple[tuple[str, "DigitPlan"], ...]
    gains: tuple[str, ...]
    table: Tensor
    start: Tensor | None = None
    cos_at: int = -1
    sin_at: int = -1


@dataclass(frozen=True)
class States:
    """Columns that are floats: a field `states` `[heads, block_len, head_dim]` of any dtype.

    Args:
        gain: field as in `Stored`; None for ones.
    """

    gain: str | None = None


class BoundCodec:
    """A codec at its site. Pure and deterministic; one block never looks at another.

    Subclasses set `site` and `layout`, and implement `encode` and `decode`; they override `read`,
    `query` (keys) and `output` (values) where attention can work on the codes. Tensors held as
    attributes are the tables shared by all pages.
    """

    site: Site
    layout: Layout
    #: whether a prepared query depends on the page; else it is prepared once for all pages.
    page_query: bool = False
    #: how the fields hold what `read` gives as digits; None where there are no such columns.
    stored: Stored | None = None
    #: the same for columns that are no digits; None where `stored` says it, or only torch can read.
    decoded: Tabled | States | None = None

    def encode(
        self,
        x: Float[Tensor, "blocks heads block_len head_dim"],
        positions: Int[Tensor, "blocks block_len"],
    ) -> Fields:
        """States (post-RoPE keys, or values) at absolute token positions to the layout's fields."""
        raise NotImplementedError

    def decode(
        self, fields: Mapping[str, Tensor], positions: Int[Tensor, "blocks block_len"]
    ) -> Float[Tensor, "blocks heads block_len head_dim"]:
        """Fields to states (float32), the best approximation that the code holds."""
        raise NotImplementedError

    def read(
        self, fields: Mapping[str, Tensor], positions: Int[Tensor, "blocks block_len"]
    ) -> Reading:
        """What attention multiplies with; by default the decoded states."""
        return Reading(self.decode(fields, positions))

    def query(
        self,
        q: Float[Tensor, "rows heads queries head_dim"],
        fields: Mapping[str, Tensor],
        positions: Int[Tensor, "pages block_len"],
    ) -> Query:
        """Prepare post-RoPE queries (float32, scaled) for pages of keys, `rows` = pages or 1."""
        return Query(q[:, :, None])

    def token_query(self, q: Float[Tensor, "rows heads queries head_dim"]) -> Query:
        """Prepare queries turned back to a token's own position, for its columns.

        Only codes with `stored.turns == "token"` have it: score = q_token . read columns.
        """
        raise NotImplementedError

    def output(self, total: Total) -> Float[Tensor, "*batch heads queries head_dim"]:
        """Weighted sums of `read` values to the weighted sum of decoded values."""
        return total.columns

    def tables(self) -> dict[str, Tensor]:
        """Tensors shared by all pages, which do not grow with the context."""
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}


class Calibrator(Protocol):
    """Accumulates what a codec learns about one layer's keys or values; never the states."""

    def add(
        self,
        x: Float[Tensor, "rows heads tokens head_dim"],
        positions: Int[Tensor, "rows tokens"],
    ) -> None:
        """Take in states as `BoundCodec.encode` gets them (float32), sinks left out."""
        ...

    def tables(self) -> dict[str, Tensor]:
        """The tables by name, as `Codec.bind` finds them at the artefact."""
        ...


@dataclass(frozen=True)
class ExampleTables:
    """Made-up tables that stand for an artefact where sizes or contracts matter, not quality."""

    tables: Mapping[str, Tensor] = field(repr=False)

    def at(self, layer: int, side: Side) -> dict[str, Tensor]:
        """The same tables everywhere, as `Artefact.at` gives a layer's."""
        return dict(self.tables)


@dataclass(frozen=True)
class Codec:
    """A method's knobs. Validates in `__post_init__`, compares, hashes, and prints as its call."""

    #: raised when the bytes of an encoding change; stored with artefacts and caches.
    version: ClassVar[int] = 1
    #: title and number of the paper.
    paper: ClassVar[str] = ""
    #: whether a token of zeros comes back as zeros where no mean is removed: levels without a
    #: gain or scale of the token cannot.
    keeps_zeros: ClassVar[bool] = True

    @property
    def pre_rope(self) -> bool:
        """Whether keys are coded before RoPE, so that `Site.rope` and positions matter."""
        return False

    @property
    def group_len(self) -> int:
        """Tokens that share parameters; the exact window may not be shorter."""
        return 1

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """Whether a calibration artefact is used."""
        return "none"

    def bind(self, site: Site, artefact: "Artefact | ExampleTables | None" = None) -> BoundCodec:
        """The codec at one layer's keys or values.

        Raises:
            CodecError: the site does not fit; the message says which value would.
        """
        raise NotImplementedError

    def calibrator(self, site: Site) -> Calibrator | None:
        """What fits this codec's tables at a site, None where it has none."""
        return None

    def calibrated_knobs(self) -> dict[str, Any]:
        """The knobs that an artefact's tables depend on; codecs equal in them may share one."""
        return {}

    def example(self, site: Site) -> ExampleTables | None:
        """Tables for `bind` in place of an artefact that is required, None where none is.

        They make the layout that a calibration for white states would make.
        """
        return None

    def to_json(self) -> dict[str, Any]:
        """Knobs, codec name and version, the inverse of `codec_from_json`."""
        return {"codec": type(self).__name__.lower(), "version": self.version, **asdict(self)}


def codec_from_json(data: Mapping[str, Any]) -> Codec:
    """The codec that `Codec.to_json` described.

    Raises:
        CodecError: unknown codec, knobs that it does not have, or another version of its bytes.
    """
    _load_catalogue()
    known = {cls.__name__.lower(): cls for cls in Codec.__subclasses__()}
    name = data.get("codec")
    if name not in known:
        raise CodecError(f"unknown codec {name!r}; known codecs: {', '.join(sorted(known))}")
    cls = known[name]
    if data.get("version") != cls.version:
        raise CodecError(
            f"codec {name!r} was written as version {data.get('version')}; this kvfold reads "
            f"version {cls.version}"
        )
    knobs = {k: v for k, v in data.items() if k not in ("codec", "version")}
    unknown = sorted(set(knobs) - {f.name for f in fields(cls)})
    if unknown:
        raise CodecError(f"codec {name!r} has no knobs {unknown}")
    return cls(**knobs)


# --- presets ---------------------------------------------------------------------------------

#: sizes do not depend on the frequencies, but pre-RoPE codecs want to see some.
_ANY_ROPE = Rope((1.0,))


@dataclass(frozen=True)
class Preset:
    """A named pair of a codec for keys and a codec for values.

    Args:
        name: what a user types.
        keys: the codec of the keys.
        values: the codec of the values.
        gaussian_nmse: mean squared error over power on N(0, 1) input (head_dim 128) of keys and
            of values, the budget that the conformance tests hold it to; None for exact storage.
        summary: one line for the docs' table.
    """

    name: str
    keys: Codec
    values: Codec
    gaussian_nmse: tuple[float, float] | None = None
    summary: str = ""

    def page_layout(
        self,
        *,
        num_kv_heads: int,
        head_dim: int,
        block_len: int = 128,
        dtype: torch.dtype = torch.bfloat16,
        rope: Rope | None = _ANY_ROPE,
        artefact: "Artefact | None" = None,
    ) -> PageLayout:
        """The layout of one page for a layer of this shape.

        Without the artefact that a codec requires it is the layout of the codec's example.
        """
        bound = []
        sides: tuple[tuple[Side, Codec], ...] = (("key", self.keys), ("value", self.values))
        for side, codec in sides:
            site = Site(side, num_kv_heads, head_dim, block_len, dtype=dtype, rope=rope)
            bound.append(codec.bind(site, artefact or codec.example(site)))
        return page_layout(*bound)

    def bits_per_element(self, *, num_kv_heads: int = 8, head_dim: int = 128, **more: Any) -> float:
        """Stored bits of a full page over its K and V elements, metadata and padding included."""
        layout = self.page_layout(num_kv_heads=num_kv_heads, head_dim=head_dim, **more)
        return layout.bits_per_element


def page_layout(key: BoundCodec, value: BoundCodec) -> PageLayout:
    """The page that holds a key codec's and a value codec's fields."""
    elements = sum(
        bound.site.block_len * bound.site.num_kv_heads * bound.site.head_dim
        for bound in (key, value)
    )
    return PageLayout(key.layout, value.layout, elements)


_PRESETS: dict[str, Preset] = {}
_FAMILIES: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Preset]]] = []


def register(
    name: str,
    *,
    keys: Codec,
    values: Codec,
    gaussian_nmse: tuple[float, float] | None = None,
    summary: str = "",
) -> None:
    """Add a preset to the catalogue: one plain call at the foot of a method's module."""
    if name in _PRESETS:
        raise CodecError(f"preset {name!r} is registered twice")
    _PRESETS[name] = Preset(name, keys, values, gaussian_nmse, summary)


def register_family(pattern: str, preset: Callable[[re.Match[str]], Preset]) -> None:
    """Let names that are not in the catalogue stand for presets: `fisher2.3`."""
    _FAMILIES.append((re.compile(pattern), preset))


def presets() -> dict[str, Preset]:
    """The catalogue: preset names and presets, in the order of registration."""
    _load_catalogue()
    return dict(_PRESETS)


def get(name: str | Preset) -> Preset:
    """The preset of a name.

    Raises:
        CodecError: no such preset; the message lists those that there are.
    """
    if isinstance(name, Preset):
        return name
    _load_catalogue()
    if name not in _PRESETS:
        for pattern, preset in _FAMILIES:
            if match := pattern.fullmatch(str(name)):
                return preset(match)
        near = difflib.get_close_matches(str(name), _PRESETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise CodecError(f"unknown preset {name!r}{hint}; known presets: {', '.join(_PRESETS)}")
    return _PRESETS[name]


@functools.cache
def _load_catalogue() -> None:
    from kvfold import codecs

    for module in pkgutil.iter_modules(codecs.__path__):
        importlib.import_module(f"{codecs.__name__}.{module.name}")


# --- helpers that several codecs share -------------------------------------------------------


def exact_math(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients, and without autocast, which would make float32 products bfloat16."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), contextlib.ExitStack() as off:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    off.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return run


def check_states(x: Tensor, what: str) -> None:
    """Raise `CodecError` if states are not finite or beyond what float16 parameters can scale.

    Costs one reduction and, on an accelerator, one synchronisation for each fold.
    """
    top = float(x.abs().amax()) if x.numel() else 0.0  # amax propagates NaN
    if not top <= MAX_MAGNITUDE:
        kind = "NaN or Inf" if not top < float("inf") else f"a magnitude of {top:.3g}"
        raise CodecError(
            f"{what} contain {kind}; codes need finite states of magnitude at most "
            f"{MAX_MAGNITUDE:.0f} (float16's largest)"
        )


MAX_MAGNITUDE = 65504.0


def float16_field(name: str, *shape: int) -> Field:
    """A field of float16 parameters."""
    return Field(name, shape, torch.float16)
