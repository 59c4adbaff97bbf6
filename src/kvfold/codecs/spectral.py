"""SpectralQuant: a calibrated eigenbasis for each head, bits where the variance is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    Codec,
    CodecError,
    ExampleTables,
    Fields,
    Query,
    Reading,
    Site,
    Tabled,
    Total,
    float16_field,
    register,
)
from kvfold.layout import Field, Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import lloyd_max, sign_sketch
from kvfold.quantizers.gain import gain_byte, gain_table
from kvfold.quantizers.uniform import to_float16
from kvfold.transforms.orthogonal import apply_tiles, random_rotation

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact

MAX_BITS = 6
#: error of the best b-bit quantiser of N(0, 1) (Max 1960).
_DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644)


@dataclass(frozen=True)
class Spectral(Codec):
    """Codes in the eigenbasis of each head's covariance (SpectralQuant, 2026).

        y = V^T (x - mean) / sigma,   c_i = nearest level of width b_i to y_i / g
        x^ = mean + V (sigma * g * level[c])

    with V and sigma^2 the eigenvectors and eigenvalues of the centred covariance of keys after
    RoPE, or of values, one head at a time. Widths are integers by water-filling within the head:
    each next bit goes where sigma_i^2 D(b_i) falls most. Levels are Lloyd-Max for the pooled
    unit-variance coordinates of the layer, one codebook a width. Stored are the codes, and with
    `gain` one byte a token and head for g = 2^(j/16), the RMS of the coordinates that have bits or
    the byte near it that leaves the least error; without it g is 1.

    With `qjl` (selective, for the record) one bit of each effective coordinate is a sign of a
    Gaussian sketch of the residual there, whose RMS is stored in float16.

    Args:
        bits: stored per element; 16 / head_dim of it are the residual's RMS with `qjl`, and
            8 / head_dim the gain with `gain`.
        effective: how the effective dimension is counted: `"coverage"`, the fewest coordinates
            that hold `coverage` of the variance, or `"participation"`, (sum s)^2 / sum s^2 of the
            variances s; in steps of head_dim / 8.
        coverage: share of the variance.
        noise_bits: width of the keys' coordinates beyond the effective dimension; None leaves
            them to water-filling.
        value_noise_bits: the same for values.
        scope: what shares a layer's bits: each head has its own, or all heads one budget.
        gain: store a gain.
        search: gain bytes tried on either side of the RMS.
        qjl: spend a bit of each effective coordinate on a sketch.
        seed: of the sketch.

    Raises:
        CodecError: knobs out of range; no artefact, or one of another shape.

    Departs from the paper: the covariance is centred, sigma is not rounded, the tail has no noise
    floor, codes are packed, and widths come in groups of head_dim / 8 coordinates. The gain is not
    the paper's: coordinates of unit variance over all tokens are far from it within one.
    """

    bits: float = 3.0
    effective: Literal["coverage", "participation"] = "coverage"
    coverage: float = 0.99
    noise_bits: int | None = None
    value_noise_bits: int | None = None
    scope: Literal["head", "layer"] = "head"
    gain: bool = False
    search: int = 8
    qjl: bool = False
    seed: int = 0

    paper = "SpectralQuant, 2026"
    keeps_zeros = False

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MAX_BITS:
            raise CodecError(
                f"spectral has more than 0 and at most {MAX_BITS} bits, not {self.bits}"
            )
        if self.effective not in ("coverage", "participation"):
            raise CodecError(f"effective is 'coverage' or 'participation', not {self.effective!r}")
        if not 0 < self.coverage <= 1:
            raise CodecError(f"coverage ({self.coverage}) must be above 0 and at most 1")
        for name in ("noise_bits", "value_noise_bits"):
            noise = getattr(self, name)
            if noise is not None and not 0 <= noise <= MAX_BITS:
                raise CodecError(f"{name} is 0 to {MAX_BITS} or None, not {noise}")

        if self.scope not in ("head", "layer"):
            raise CodecError(f"scope is 'head' or 'layer', not {self.scope!r}")
        if not 0 <= self.search <= 16:
            raise CodecError(f"search ({self.search}) is 0 to 16 gain bytes")
        if self.gain and self.qjl:
            raise CodecError("gain and qjl exclude each other; give one of them")

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """Bases, widths and codebooks are learned."""
        return "required"

    def calibrator(self, site: Site) -> "Spectrum":
        """What finds the eigenbasis of a layer's keys or values."""
        return Spectrum(self, site)

    def calibrated_knobs(self) -> dict[str, Any]:
        """All but the sketch's seed and the search, which the tables do not depend on."""
        return {k: v for k, v in asdict(self).items() if k not in ("seed", "search")}

    def bind(
        self, site: Site, artefact: "Artefact | ExampleTables | None" = None
    ) -> "BoundSpectral":
        """The code of one layer's keys or values."""
        if artefact is None:
            raise CodecError(
                f"{self} needs a calibration artefact and none was given; make one with: "
                f"kvfold calibrate --model M --preset spectral{self.bits:g} --text FILE"
            )
        tables = artefact.at(site.layer, site.side)
        shape = (site.num_kv_heads, site.head_dim)
        if "widths" not in tables or tuple(tables["widths"].shape) != shape:
            found = tuple(tables["widths"].shape) if "widths" in tables else "nothing"
            raise CodecError(
                f"the artefact's tables for the {site.side}s of layer {site.layer} are for "
                f"{found}; the layer has [heads, dim] {shape}"
            )
        return BoundSpectral(self, site, tables)

    def example(self, site: Site) -> ExampleTables:
        """White states in a random basis: every head the same widths, Gaussian codebooks."""
        heads, dim = site.num_kv_heads, site.head_dim
        variances = torch.logspace(0, -0.01, dim).expand(heads, -1)
        widths, signs = self.widths(variances, site.side)
        return ExampleTables(
            {
                "mean": torch.zeros(heads, dim),
                "basis": random_rotation(dim, 20_261 + site.layer).expand(heads, -1, -1),
                "sigma": torch.ones(heads, dim),
                "widths": widths.to(torch.uint8),
                "signs": signs.to(torch.uint8),
                "levels": _codebooks({b: lloyd_max.gaussian_levels(b) for b in range(1, 7)}),
            }
        )

    def effective_dim(self, variances: Tensor) -> Tensor:
        """`[heads]` coordinates that count, from variances `[heads, dim]` that fall along dim."""
        s = variances.double().clamp_min(0)
        group = _group_len(s.shape[-1])
        if self.effective == "participation":
            count = s.sum(-1).square() / s.square().sum(-1).clamp_min(1e-300)
        else:
            held = s.cumsum(-1) / s.sum(-1, keepdim=True).clamp_min(1e-300)
            count = (held < self.coverage).sum(-1) + 1.0
        return ((count / group).ceil() * group).long().clamp(group, s.shape[-1])

    def widths(self, variances: Tensor, side: str) -> tuple[Tensor, Tensor]:
        """Integer widths `[heads, dim]` by water-filling, and 0 or 1 sign of a sketch beside each.

        Args:
            variances: `[heads, dim]`, falling along dim.
            side: `"key"` or `"value"`.
        """
        heads, dim = variances.shape
        group = _group_len(dim)
        noise = self.noise_bits if side == "key" else self.value_noise_bits
        inside = torch.arange(dim) < self.effective_dim(variances).cpu()[:, None]
        signs = (inside & self.qjl).long()
        left = torch.tensor(_DISTORTION, dtype=torch.float64)
        loss = variances.double().cpu().unflatten(-1, (-1, group)).sum(-1)  # [heads, groups]
        more = 16 if self.qjl else 8 if self.gain else 0
        budget = (self.bits * dim - more) / group  # of a head, in groups' bits
        spent = signs.sum(-1) // group
        wide = torch.zeros(loss.shape, dtype=torch.int64)
        free = torch.ones(loss.shape, dtype=torch.bool)
        if noise is not None:
            free = inside[:, ::group]
            wide[~free] = noise
            spent = spent + noise * (~free).sum(-1)
        together = heads if self.scope == "layer" else 1
        for h in range(0, heads, together):
            part = slice(h, h + together)
            for _ in range(int(budget * together + 1e-9) - int(spent[part].sum())):
                saved = left[wide[part]] - left[(wide[part] + 1).clamp(max=MAX_BITS)]
                # a coordinate without variance still takes a bit that nobody else can
                saved = torch.where(free[part] & (wide[part] < MAX_BITS), loss[part] * saved, -1.0)
                best = int(saved.argmax())
                if saved.view(-1)[best] < 0:
                    break
                wide[part].view(-1)[best] += 1
        widths = wide.repeat_interleave(group, -1)
        return widths, signs


class BoundSpectral(BoundCodec):
    """Fields: `digitsN`; `gain` `[heads, block_len]` uint8, or `signs1` and float16 `residual`."""

    def __init__(self, codec: Spectral, site: Site, tables: Mapping[str, Tensor]) -> None:
        self.codec, self.site = codec, site
        widths = tables["widths"].long()
        self.plan = DigitPlan(tuple(map(tuple, widths.tolist())), site.block_len, site.axis)
        fields = self.plan.fields()
        has_bits = widths > 0
        sigma = tables["sigma"].float()
        basis = tables["basis"].float()  # rows are eigenvectors
        # as the basis is kept in float16, its inverse is not quite its transpose
        inverse = torch.linalg.inv(basis.double()).float()
        safe = torch.where(sigma > 0, sigma, 1.0)
        self.forward = (basis / safe[..., None]).mT.contiguous().to(site.device)
        self.inverse = (inverse * sigma[:, None]).mT.contiguous().to(site.device)
        self.mean = tables["mean"].float().to(site.device)[:, None]
        self.levels = tables["levels"].float().to(site.device)
        # where each coordinate's codebook starts in the table of all
        self.start = (2**widths - 1)[:, None].to(site.device)
        self.has_bits = has_bits[:, None].to(site.device)
        # widths in use, and the coordinates among which some head has them
        self.books: list[tuple[int, slice]] = []
        for b in range(1, MAX_BITS + 1):
            found = (widths == b).any(0).nonzero().flatten().tolist()
            if found:
                self.books.append((b, slice(found[0], found[-1] + 1)))
        self.gains = gain_table().to(site.device)
        active = has_bits.float()
        share = active / active.sum(-1, keepdim=True).clamp_min(1)
        self.share = share[:, None].to(site.device)
        # what an error of a coordinate costs; sigma may be tiny, so in units of the largest
        cost = (sigma / sigma.amax(-1, keepdim=True).clamp_min(1e-30)).square() * active
        self.cost = cost[:, None].to(site.device)
        if codec.gain:
            fields.append(Field("gain", (site.num_kv_heads, site.block_len), torch.uint8))
        if codec.qjl:
            signs = tables["signs"].long()
            self.sign_plan = DigitPlan(tuple(map(tuple, signs.tolist())), site.block_len, site.axis)
            fields += self.sign_plan.fields("signs")
            fields.append(float16_field("residual", site.num_kv_heads, site.block_len))
            self.sketch, self.expansion, self.sketched = self._sketch_tables(signs)
        self.layout = Layout(tuple(fields))
        if not codec.qjl:
            start = torch.where(has_bits, 2**widths - 1, -1)
            gains = ("gain",) if codec.gain else ()
            self.decoded = Tabled((("digits", self.plan),), gains, self.levels, start)

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """The nearest level of each coordinate of unit variance, in units of the gain."""
        y = self.whitened(x, positions)
        if not self.codec.gain:
            codes, gain = self._nearest(y), None
        else:
            codes, gain = self._with_gain(y)
        fields = self.plan.pack(codes)
        if gain is not None:
            fields["gain"] = gain
        if self.codec.qjl:
            rest = (y - self._levels(codes)) * self.sketched
            fields |= self.sign_plan.pack(
                (apply_tiles(rest, self.sketch) >= 0).to(torch.uint8), "signs"
            )
            size = rest.square().sum(-1) / self.sketched.sum(-1).clamp_min(1)
            fields["residual"] = to_float16(size.sqrt())
        return fields

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Levels times sigma in the eigenbasis, and the mean, in float32."""
        columns, gain = self._columns(fields)
        y = columns[..., : self.site.head_dim]
        if gain is not None and self.codec.gain:
            y = y * gain
        elif gain is not None:
            y = y + (columns[..., self.site.head_dim :] * gain[..., 1:]) @ self.expansion
        return y @ self.inverse + self.mean

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the levels of the codes; a sketch adds a second group, of signs."""
        return Reading(*self._columns(fields))

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """The query in the eigenbasis, and its product with the mean; the same for all pages."""
        turned = q @ self.inverse.mT
        columns = [turned]
        if self.codec.qjl:
            columns.append(turned @ self.expansion.mT)
        mean = (q @ self.mean.mT).expand(-1, -1, -1, self.site.block_len)
        return Query(torch.cat(columns, -1)[:, :, None], mean=mean)

    def output(self, total: Total) -> Tensor:
        """The sums turned back once, and the mean added."""
        y = total.columns[..., : self.site.head_dim]
        if self.codec.qjl:
            y = y + total.columns[..., self.site.head_dim :] @ self.expansion
        return y @ self.inverse + total.one * self.mean

    def whitened(self, x: Tensor, positions: Tensor) -> Tensor:
        """States in the eigenbasis, in units of sigma, float32."""
        return apply_tiles(x.float().contiguous() - self.mean, self.forward)

    def _nearest(self, y: Tensor) -> Tensor:
        codes = torch.zeros_like(y, dtype=torch.uint8)
        for b, part in self.books:
            levels = self.levels[2**b - 1 : 2 ** (b + 1) - 1]
            here = self.start[..., part] == 2**b - 1
            nearest = lloyd_max.quantise(y[..., part], levels)
            codes[..., part] = torch.where(here, nearest, codes[..., part])
        return codes

    def _with_gain(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and the gain byte: of those around the RMS, the one that leaves least error."""
        byte = gain_byte((y.square() * self.share).sum(-1).sqrt())
        best = byte
        codes, least = self._coded(y, byte)
        for move in sorted(range(-self.codec.search, self.codec.search + 1), key=abs)[1:]:
            tried = torch.where(byte > 0, (byte + move).clamp(1, 255), 0)
            other, cost = self._coded(y, tried)
            better = cost < least
            best = torch.where(better, tried, best)
            codes = torch.where(better[..., None], other, codes)
            least = torch.minimum(cost, least)
        return codes, best.to(torch.uint8)

    def _coded(self, y: Tensor, byte: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in units of a gain, and the squared error of the states."""
        gain = self.gains[byte.int()][..., None]
        codes = self._nearest(y / torch.where(gain > 0, gain, 1.0))
        rest = y - self._levels(codes) * gain
        return codes, (rest.square() * self.cost).sum(-1)

    def _levels(self, codes: Tensor) -> Tensor:
        levels = self.levels[self.start + codes.long()]
        return torch.where(self.has_bits, levels, 0.0)

    def _columns(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        columns = self._levels(self.plan.unpack(fields))
        if self.codec.gain:
            return columns, self.gains[fields["gain"].int()][..., None]
        if not self.codec.qjl:
            return columns, None
        signs = (2.0 * self.sign_plan.unpack(fields, "signs").float() - 1.0) * self.sketched
        gain = fields["residual"].float()
        return torch.cat((columns, signs), -1), torch.stack((torch.ones_like(gain), gain), -1)

    def _sketch_tables(self, signs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """S^T of each head's effective coordinates, the expansion, and which those are."""
        dim, device = self.site.head_dim, self.site.device
        sketches, expansions = [], []
        for h, kept in enumerate(signs.bool()):
            n = int(kept.sum())
            small = sign_sketch.sketch_matrix(n, self.codec.seed + 1 + h)
            sketch, expansion = torch.zeros(dim, dim), torch.zeros(dim, dim)
            sketch[:n, :n], expansion[:n, :n] = small, sign_sketch.expansion(small)
            sketches.append(sketch)
            expansions.append(expansion)
        kept = signs.float()[:, None].to(device)
        return torch.stack(sketches).to(device), torch.stack(expansions).to(device), kept


class Spectrum:
    """Moments of a layer's keys or values, and a sample of tokens for codebooks.

    Every `stride`-th token is kept; when there are more than `LIMIT`, every second one stays.
    """

    LIMIT = 4096

    def __init__(self, codec: Spectral, site: Site) -> None:
        self.codec, self.site, self.stride, self.phase = codec, site, 1, 0
        self.tokens = 0
        self.sum: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0
        self.shift: Tensor | None = None
        self.kept: list[Tensor] = []

    def add(self, x: Tensor, positions: Tensor) -> None:
        """Add states `[rows, heads, tokens, dim]`."""
        x = x.float().transpose(0, 1).flatten(1, 2)  # [heads, tokens, dim]
        if self.shift is None:  # close to the mean, so that centring loses no digits
            self.shift = x.mean(1, keepdim=True)
        away = x - self.shift
        self.sum = self.sum + away.sum(1, keepdim=True)
        self.gram = self.gram + away.mT @ away
        self.tokens += x.shape[1]
        self.kept.append(away[:, self.phase :: self.stride].cpu())
        self.phase = (self.phase - x.shape[1]) % self.stride
        while sum(part.shape[1] for part in self.kept) > self.LIMIT:
            self.kept, self.stride = [torch.cat(self.kept, 1)[:, ::2]], 2 * self.stride

    def tables(self) -> dict[str, Tensor]:
        """`mean`, `basis`, `sigma`, `widths`, `signs` and `levels`; empty if no token was seen."""
        if self.shift is None:
            return {}
        offset = self.sum / self.tokens + torch.zeros_like(self.shift)
        covariance = (self.gram / self.tokens - offset.mT @ offset).double().cpu()
        variances, vectors = torch.linalg.eigh(covariance)
        variances, basis = variances.flip(-1).clamp_min(0), vectors.flip(-1).mT
        widths, signs = self.codec.widths(variances, self.site.side)
        sigma = variances.sqrt().float()
        basis = basis.to(torch.float16)
        tokens = torch.cat(self.kept, 1) - offset.cpu()
        y = tokens @ basis.float().mT / sigma.clamp_min(1e-20)[:, None]
        y = torch.where(sigma[:, None] > 0, y, 0.0)
        if self.codec.gain:  # the codes' units; the search around the RMS is left to encoding
            active = (widths > 0).float()
            share = active / active.sum(-1, keepdim=True).clamp_min(1)
            byte = gain_byte((y.square() * share[:, None]).sum(-1).sqrt())
            gain = gain_table()[byte.int()][..., None]
            y = y / torch.where(gain > 0, gain, 1.0)
        books = {}
        for b in range(1, MAX_BITS + 1):
            pool = y.transpose(0, 1)[:, widths == b].flatten()
            books[b] = lloyd_max.gaussian_levels(b)
            if len(pool) >= 64 * 2**b:
                sample = pool[:: -(-len(pool) // (1 << 18))]
                books[b] = lloyd_max.fit_samples(sample, 2**b, start=books[b])
        return {
            "mean": (self.shift + offset)[:, 0],
            "basis": basis,
            "sigma": sigma,
            "widths": widths.to(torch.uint8),
            "signs": signs.to(torch.uint8),
            "levels": _codebooks(books),
        }


def _codebooks(books: Mapping[int, Tensor]) -> Tensor:
    """Levels of widths 1 to 6 behind one another; width b starts at 2^b - 1, entry 0 is unused."""
    return torch.cat([torch.zeros(1), *(books[b] for b in range(1, MAX_BITS + 1))])


def _group_len(dim: int) -> int:
    return dim // next(parts for parts in range(min(8, dim), 0, -1) if dim % parts == 0)


#: bits of the presets are totals: the gain's are taken from the codes'
for _bits, _nmse in ((2, 0.155), (3, 0.043), (4, 0.0115)):
    _codec = Spectral(float(_bits), scope="layer", gain=True)
    register(
        f"spectral{_bits}",
        keys=_codec,
        values=_codec,
        gaussian_nmse=(_nmse, _nmse),
        summary="eigenbasis of each head, water-filled widths, fitted codebooks, a gain a token",
    )
