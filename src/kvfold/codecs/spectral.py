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
    Total,
    float16_field,
    register,
)
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import lloyd_max, sign_sketch
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

        y = V^T (x - mean) / sigma,   c_i = nearest level of width b_i to y_i
        x^ = mean + V (sigma * level[c])

    with V and sigma^2 the eigenvectors and eigenvalues of the centred covariance of keys after
    RoPE, or of values, one head at a time. Widths are integers by water-filling within the head:
    each next bit goes where sigma_i^2 D(b_i) falls most. Levels are Lloyd-Max for the pooled
    unit-variance coordinates of the layer, one codebook a width. Nothing is stored but codes.

    With `qjl` (selective, for the record) one bit of each effective coordinate is a sign of a
    Gaussian sketch of the residual there, whose RMS is stored in float16.

    Args:
        bits: stored per element; 16 / head_dim of it are the residual's RMS with `qjl`.
        effective: how the effective dimension is counted: `"coverage"`, the fewest coordinates
            that hold `coverage` of the variance, or `"participation"`, (sum s)^2 / sum s^2 of the
            variances s; in steps of head_dim / 8.
        coverage: share of the variance.
        noise_bits: width of the keys' coordinates beyond the effective dimension; None leaves
            them to water-filling.
        value_noise_bits: the same for values.
        qjl: spend a bit of each effective coordinate on a sketch.
        seed: of the sketch.

    Raises:
        CodecError: knobs out of range; no artefact, or one of another shape.

    Departs from the paper: the covariance is centred, sigma is not rounded, the tail has no noise
    floor, codes are packed, and widths come in groups of head_dim / 8 coordinates.
    """

    bits: float = 3.0
    effective: Literal["coverage", "participation"] = "coverage"
    coverage: float = 0.99
    noise_bits: int | None = None
    value_noise_bits: int | None = None
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

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """Bases, widths and codebooks are learned."""
        return "required"

    def calibrator(self, site: Site) -> "Spectrum":
        """What finds the eigenbasis of a layer's keys or values."""
        return Spectrum(self, site)

    def calibrated_knobs(self) -> dict[str, Any]:
        """All but the sketch's seed."""
        return {name: knob for name, knob in asdict(self).items() if name != "seed"}

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
        widths = torch.zeros(heads, dim, dtype=torch.int64)
        left = torch.tensor(_DISTORTION, dtype=torch.float64)
        for h in range(heads):
            units = int(self.bits * dim / group - (16 / group if self.qjl else 0) + 1e-9)
            units -= int(signs[h].sum()) // group
            loss = variances[h].double().cpu().unflatten(0, (-1, group)).sum(-1)
            wide = torch.zeros(dim // group, dtype=torch.int64)
            free = torch.ones(dim // group, dtype=torch.bool)
            if noise is not None:
                free = inside[h, ::group]
                wide[~free] = noise
                units -= noise * int((~free).sum())
            for _ in range(max(units, 0)):
                saved = loss * (left[wide] - left[(wide + 1).clamp(max=MAX_BITS)])
                # a coordinate without variance still takes a bit that nobody else can
                saved = torch.where(free & (wide < MAX_BITS), saved, -1.0)
                best = int(saved.argmax())
                if saved[best] < 0:
                    break
                wide[best] += 1
            widths[h] = wide.repeat_interleave(group)
        return widths, signs


class BoundSpectral(BoundCodec):
    """Fields: `digitsN`; sketched: `signs1`, `residual` `[heads, block_len]` float16."""

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
        if codec.qjl:
            signs = tables["signs"].long()
            self.sign_plan = DigitPlan(tuple(map(tuple, signs.tolist())), site.block_len, site.axis)
            fields += self.sign_plan.fields("signs")
            fields.append(float16_field("residual", site.num_kv_heads, site.block_len))
            self.sketch, self.expansion, self.sketched = self._sketch_tables(signs)
        self.layout = Layout(tuple(fields))

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """The nearest level of each coordinate of unit variance."""
        y = apply_tiles(x.float().contiguous() - self.mean, self.forward)
        codes = torch.zeros_like(y, dtype=torch.uint8)
        for b in range(1, MAX_BITS + 1):
            here = self.start == 2**b - 1
            if bool(here.any()):
                levels = self.levels[2**b - 1 : 2 ** (b + 1) - 1]
                codes = torch.where(here, lloyd_max.quantise(y, levels), codes)
        fields = self.plan.pack(codes)
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
        if gain is not None:
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

    def _levels(self, codes: Tensor) -> Tensor:
        levels = self.levels[self.start + codes.long()]
        return torch.where(self.has_bits, levels, 0.0)

    def _columns(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        columns = self._levels(self.plan.unpack(fields))
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


for _bits, _nmse in ((2, 0.13), (3, 0.038), (4, 0.0105)):
    register(
        f"spectral{_bits}",
        keys=Spectral(float(_bits)),
        values=Spectral(float(_bits)),
        gaussian_nmse=(_nmse, _nmse),
        summary="eigenbasis of each head, water-filled widths, fitted codebooks",
    )
