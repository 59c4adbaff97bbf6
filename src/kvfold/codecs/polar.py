"""Polar codes: pairs of rotated channels as a radius and an angle."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import lloyd_max, sign_sketch
from kvfold.quantizers.uniform import to_float16
from kvfold.transforms.hadamard import hadamard, random_signs
from kvfold.transforms.orthogonal import apply_tiles
from kvfold.transforms.polar import from_polar

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact

MAX_BITS = 8
MAX_ROUNDS = 3


@dataclass(frozen=True)
class Polar(Codec):
    """Radius and angle of channel pairs (WarpQuant; PolarQuant, Han et al. 2025, arXiv:2502.02617).

        y = H D x / g,   (y_2i, y_2i+1) = rho_i (cos phi_i, sin phi_i)

    with D random signs, H the Hadamard rotation and g the float16 RMS of the token's head. rho goes
    to the nearest of 2**radius_bits Lloyd-Max levels of a Rayleigh variable, phi to the centre of
    one of 2**angle_bits equal sectors; a calibrated artefact may bring codebooks for both.

    `qjl_rounds` sign sketches may follow, each of what is left in the rotated space: one bit an
    element and one float16 a token and head for each round.

    Args:
        radius_bits: width of a radius code, 1 to 8; a pair of channels has one.
        angle_bits: width of an angle code, 1 to 8; a pair of channels has one.
        qjl_rounds: sign sketches of the residual, 0 to 3. Off by default: at equal bits they cost
            more error than they save.
        sketch_gain: `"unbiased"` is QJL's estimator, whose error is pi/2 times the residual;
            `"least-squares"` shrinks it to what helps most.
        seed: of the signs and the sketches.

    Raises:
        CodecError: knobs out of range, an odd head_dim, or codebooks of another size.

    Departs from the papers: one level of pairs (PolarQuant nests angles), a gain per token in place
    of normalised radii, and sketches in the rotated space, where a query needs one product each.
    """

    radius_bits: int = 4
    angle_bits: int = 4
    qjl_rounds: int = 0
    sketch_gain: Literal["unbiased", "least-squares"] = "unbiased"
    seed: int = 0

    paper = "PolarQuant, arXiv:2502.02617 (WarpQuant's form)"

    def __post_init__(self) -> None:
        for name in ("radius_bits", "angle_bits"):
            if not 1 <= getattr(self, name) <= MAX_BITS:
                raise CodecError(f"{name} is 1 to {MAX_BITS}, not {getattr(self, name)}")
        if not 0 <= self.qjl_rounds <= MAX_ROUNDS:
            raise CodecError(f"qjl_rounds is 0 to {MAX_ROUNDS}, not {self.qjl_rounds}")
        if self.sketch_gain not in ("unbiased", "least-squares"):
            raise CodecError(
                f"sketch_gain is 'unbiased' or 'least-squares', not {self.sketch_gain!r}"
            )

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """Codebooks of radii, and of angles if wanted, may come from calibration."""
        return "optional"

    def calibrator(self, site: Site) -> "RadiusSamples":
        """What fits the codebook of radii of a layer's keys or values."""
        return RadiusSamples(self, site)

    def calibrated_knobs(self) -> dict[str, Any]:
        """A codebook belongs to a width and a rotation."""
        return {"radius_bits": self.radius_bits, "seed": self.seed}

    def bind(self, site: Site, artefact: "Artefact | ExampleTables | None" = None) -> "BoundPolar":
        """Polar codes at one layer's keys or values."""
        if site.head_dim % 2:
            raise CodecError(f"head_dim ({site.head_dim}) must be even: pairs are coded")
        tables = {} if artefact is None else artefact.at(site.layer, site.side)
        for name, bits in (("radius_levels", self.radius_bits), ("angle_levels", self.angle_bits)):
            if name in tables and tables[name].shape != (2**bits,):
                raise CodecError(
                    f"the artefact's {name} of layer {site.layer} have shape "
                    f"{tuple(tables[name].shape)}; {self} needs ({2**bits},)"
                )
        return BoundPolar(self, site, tables)


class BoundPolar(BoundCodec):
    """Fields: `radiusN`, `angleN`, `gain` `[heads, block_len]` float16.

    Round k of the sketch adds `sketch{k}_1` and `residual` `[heads, block_len, rounds]` float16.
    """

    def __init__(self, codec: Polar, site: Site, tables: Mapping[str, Tensor]) -> None:
        self.codec, self.site = codec, site
        heads, dim, length = site.num_kv_heads, site.head_dim, site.block_len
        self.radius_plan, self.angle_plan = (
            DigitPlan.uniform(bits, heads, dim // 2, length, site.axis)
            for bits in (codec.radius_bits, codec.angle_bits)
        )
        self.sign_plan = DigitPlan.uniform(1, heads, dim, length, site.axis)
        rounds = range(codec.qjl_rounds)
        residual = [float16_field("residual", heads, length, codec.qjl_rounds)] if rounds else []
        self.layout = Layout(
            (
                *self.radius_plan.fields("radius"),
                *self.angle_plan.fields("angle"),
                float16_field("gain", heads, length),
                *(f for k in rounds for f in self.sign_plan.fields(f"sketch{k}_")),
                *residual,
            )
        )
        radii = tables.get("radius_levels", lloyd_max.rayleigh_levels(codec.radius_bits))
        self.radius_levels = radii.float().to(site.device)
        self.fitted_angles = "angle_levels" in tables
        angles = tables.get("angle_levels", _sector_centres(codec.angle_bits)).float()
        self.cos, self.sin = angles.cos().to(site.device), angles.sin().to(site.device)
        self.signs = random_signs(dim, codec.seed).to(site.device)
        if not rounds:
            n, m = len(self.radius_levels), len(self.cos)
            self.decoded = Tabled(
                (("radius", self.radius_plan), ("angle", self.angle_plan)),
                ("gain",),
                torch.cat((self.radius_levels, self.cos, self.sin)),
                cos_at=n,
                sin_at=n + m,
            )
        if rounds:
            self.sketches = torch.stack(
                [sign_sketch.sketch_matrix(dim, codec.seed + 1 + k) for k in rounds]
            ).to(site.device)
            self.expansions = torch.stack([sign_sketch.expansion(s) for s in self.sketches])

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Unit RMS, rotate, code the pairs; sketch what is left, round after round."""
        x = x.float().contiguous()
        gain = to_float16(x.square().mean(-1).sqrt())
        step = torch.where(gain > 0, gain.float(), 1.0)[..., None]
        y = hadamard(x / step * self.signs)
        a, b = y[..., 0::2], y[..., 1::2]
        # products, sums and square roots only: their bits do not depend on vector width or device
        radius = lloyd_max.quantise((a * a + b * b).sqrt(), self.radius_levels)
        angle = self._nearest_angle(a, b) if self.fitted_angles else _sector(a, b, self.codec)
        fields = {
            **self.radius_plan.pack(radius, "radius"),
            **self.angle_plan.pack(angle, "angle"),
            "gain": gain,
        }
        return fields | self._sketched(y - self._pairs(radius, angle), gain)

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Rotate back the polar points, sketched residuals included, times their gains."""
        columns, gain = self._columns(fields)
        return self._unrotated(columns.unflatten(-1, (-1, self.site.head_dim)) * gain[..., None])

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the points in the rotated space; each round of the sketch adds its signs."""
        return Reading(*self._columns(fields))

    def _columns(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        codes = (
            self.radius_plan.unpack(fields, "radius"),
            self.angle_plan.unpack(fields, "angle"),
        )
        columns, gain = [self._pairs(*codes)], [fields["gain"].float()[..., None]]
        for k in range(self.codec.qjl_rounds):
            signs = self.sign_plan.unpack(fields, f"sketch{k}_")
            columns.append(2.0 * signs.float() - 1.0)
        if self.codec.qjl_rounds:
            gain.append(fields["residual"].float())
        return torch.cat(columns, -1), torch.cat(gain, -1)

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """The query rotated once, the same for all pages; each sketch takes its projection."""
        rotated = hadamard(q * self.signs)
        parts = [rotated]
        parts += [rotated @ self.expansions[k].T for k in range(self.codec.qjl_rounds)]
        return Query(torch.cat(parts, -1)[:, :, None])

    def output(self, total: Total) -> Tensor:
        """The sums rotated back once."""
        return self._unrotated(total.columns.unflatten(-1, (-1, self.site.head_dim)))

    def _unrotated(self, parts: Tensor) -> Tensor:
        """Points and rounds of signs `[..., 1 + rounds, dim]` to states."""
        y = parts[..., 0, :]
        for k in range(self.codec.qjl_rounds):
            y = y + parts[..., k + 1, :] @ self.expansions[k]
        return hadamard(y) * self.signs

    def _pairs(self, radius: Tensor, angle: Tensor) -> Tensor:
        """Codes to points in the rotated space."""
        angle = angle.long()
        return from_polar(self.radius_levels[radius.long()], self.cos[angle], self.sin[angle])

    def _nearest_angle(self, a: Tensor, b: Tensor) -> Tensor:
        """Index of the direction of a codebook with the largest projection (uint8)."""
        best, index = a * self.cos[0] + b * self.sin[0], torch.zeros_like(a, dtype=torch.uint8)
        for k in range(1, len(self.cos)):
            projection = a * self.cos[k] + b * self.sin[k]
            index = torch.where(projection > best, k, index)
            best = torch.maximum(best, projection)
        return index.to(torch.uint8)

    def _sketched(self, rest: Tensor, gain: Tensor) -> Fields:
        """Sign bits and sizes of each round's residual `[..., dim]`, given in units of the gain."""
        fields, sizes = {}, []
        for k in range(self.codec.qjl_rounds):
            bits = sign_sketch.sketch(rest, self.sketches[k])
            points = apply_tiles(2.0 * bits.float() - 1.0, self.expansions[k])
            if self.codec.sketch_gain == "unbiased":
                size = rest.square().mean(-1).sqrt()
            else:
                size = (rest * points).mean(-1) / points.square().mean(-1)
            sizes.append(to_float16(size * gain.float()))
            rest = rest - size[..., None] * points
            fields |= self.sign_plan.pack(bits, f"sketch{k}_")
        return fields | ({"residual": torch.stack(sizes, -1)} if sizes else {})


class RadiusSamples:
    """A sample of radii as they are coded, for a one-dimensional k-means; at most `LIMIT` floats.

    Every `stride`-th radius is kept; when there are too many, every second one stays.
    """

    LIMIT = 1 << 17

    def __init__(self, codec: Polar, site: Site) -> None:
        self.codec, self.stride = codec, 7  # odd, so that it walks over all pairs of a head
        self.signs = random_signs(site.head_dim, codec.seed).to(site.device)
        self.kept = torch.zeros(0, device=site.device)

    def add(self, x: Tensor, positions: Tensor) -> None:
        """Add the radii of some tokens' rotated pairs, in units of each token's gain."""
        gain = to_float16(x.square().mean(-1, keepdim=True).sqrt()).float()
        y = hadamard(x / torch.where(gain > 0, gain, 1.0) * self.signs)
        radius = (y[..., 0::2].square() + y[..., 1::2].square()).sqrt()
        self.kept = torch.cat((self.kept, radius.flatten()[:: self.stride]))
        while len(self.kept) > self.LIMIT:
            self.kept, self.stride = self.kept[::2], 2 * self.stride

    def tables(self) -> dict[str, Tensor]:
        """`radius_levels` `[2**radius_bits]`; empty if no token was seen."""
        if not len(self.kept):
            return {}
        return {"radius_levels": lloyd_max.fit_samples(self.kept.cpu(), 2**self.codec.radius_bits)}


def _sector_centres(bits: int) -> Tensor:
    return (torch.arange(2**bits, dtype=torch.float64) + 0.5) * (2 * math.pi / 2**bits)


def _sector(a: Tensor, b: Tensor, codec: Polar) -> Tensor:
    """Which of 2**angle_bits equal sectors, counted from angle 0, holds the point (uint8).

    By halving: is the point beyond the bisector? Then turn it back by that angle. Products and sums
    give the same bits on any vector width, which an arctangent may not.
    """
    code = torch.zeros_like(a, dtype=torch.int16)
    for k in range(codec.angle_bits):
        cos, sin = math.cos(math.pi / 2**k), math.sin(math.pi / 2**k)
        # half a turn first: its bisector is the axis itself, and exact
        beyond = b < 0 if k == 0 else b * cos - a * sin >= 0
        turned_a, turned_b = (-a, -b) if k == 0 else (a * cos + b * sin, b * cos - a * sin)
        a, b = torch.where(beyond, turned_a, a), torch.where(beyond, turned_b, b)
        code = 2 * code + beyond
    return code.to(torch.uint8)


for _radius, _angle, _nmse in (
    (4, 4, 0.018),
    (3, 3, 0.07),
    (2, 4, 0.05),
    (2, 2, 0.26),
    (1, 1, 0.85),
):
    register(
        f"polar-r{_radius}a{_angle}",
        keys=Polar(_radius, _angle),
        values=Polar(_radius, _angle),
        gaussian_nmse=(_nmse, _nmse),
        summary=f"channel pairs as a radius of {_radius} and an angle of {_angle} bits",
    )
