"""TurboQuant: a random rotation, then the best scalar quantiser for what it makes of any vector."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    Codec,
    CodecError,
    Fields,
    Query,
    Reading,
    Site,
    Stored,
    Tabled,
    Total,
    float16_field,
    register,
)
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import lloyd_max, sign_sketch
from kvfold.quantizers.uniform import sphere_step, to_float16
from kvfold.transforms.orthogonal import apply_tiles, random_rotation

MAX_BITS = 4


@dataclass(frozen=True)
class TurboQuant(Codec):
    """Lloyd-Max codes after a rotation (TurboQuant, Zandieh et al. 2025, arXiv:2504.19874, Alg. 1).

        y = R x / ||x|| * sqrt(d),   c_i = nearest level to y_i,   x^ = g R^T level[c]

    The levels are those of a coordinate of a random unit vector (the paper's Lemma 1), times
    sqrt(d). The gain g is a float16 per token and head on the scale of the vector's RMS.

    With `qjl` (Alg. 2) one of the `bits` is the sign of a Gaussian sketch of the residual
    r = y - level[c], whose RMS is a second float16:

        x^ = g R^T (level[c] + ||r|| sqrt(pi/2) / d S^T sign(S r))

    With `levels="uniform"` the levels are those of least error among equally spaced ones,

        level[c] = step * (c - (2**bits - 1) / 2)

    so that attention kernels multiply the digits themselves (integer products, no look-up for each
    element): the step goes into the query and the output. The squared error is 1, 9 and 21 % larger
    at 2, 3 and 4 bits.

    Our R is the paper's Pi.

    Args:
        bits: stored per element, 1 to 4; with `qjl` one of them is the sketch's.
        norm_correction: what the gain restores after quantising: `"norm"` the length of x,
            `"least-squares"` the least error, `"none"` neither (g is the RMS of x).
        qjl: spend one bit on a sign sketch of the residual; its products are unbiased and noisier.
        seed: of R and S.
        levels: `"lloyd-max"`, the paper's, or `"uniform"`.

    Raises:
        CodecError: bits out of range, or a norm correction or uniform levels together with `qjl`.

    Departs from the paper: the norm is corrected after quantising (the paper stores ||x||), the
    same rotation serves all layers and heads, all channels have the same width, and levels may be
    uniform.
    """

    bits: int = 4
    norm_correction: Literal["norm", "least-squares", "none"] = "norm"
    qjl: bool = False
    seed: int = 0
    levels: Literal["lloyd-max", "uniform"] = "lloyd-max"

    paper = "TurboQuant, arXiv:2504.19874"

    def __post_init__(self) -> None:
        least = 2 if self.qjl else 1
        if not least <= self.bits <= MAX_BITS:
            sketch = " (one of them the sketch's)" if self.qjl else ""
            raise CodecError(
                f"turboquant has codes of {least} to {MAX_BITS} bits{sketch}, not {self.bits}"
            )
        if self.norm_correction not in ("norm", "least-squares", "none"):
            raise CodecError(
                f"norm_correction is 'norm', 'least-squares' or 'none', not "
                f"{self.norm_correction!r}"
            )
        if self.qjl and self.norm_correction != "none":
            raise CodecError(
                f"norm_correction ({self.norm_correction!r}) would bias the sketch; with qjl=True "
                "it must be 'none'"
            )
        if self.levels not in ("lloyd-max", "uniform"):
            raise CodecError(f"levels are 'lloyd-max' or 'uniform', not {self.levels!r}")
        if self.qjl and self.levels != "lloyd-max":
            raise CodecError(
                f"levels ({self.levels!r}) leave no place for the sketch's columns; with qjl=True "
                "they must be 'lloyd-max'"
            )

    def bind(self, site: Site, artefact: object = None) -> "BoundTurboQuant":
        """TurboQuant at one layer's keys or values."""
        return BoundTurboQuant(self, site)


class BoundTurboQuant(BoundCodec):
    """Fields: `digitsN`, `gain` `[heads, block_len]` float16; sketched: `signs1`, `residual`."""

    def __init__(self, codec: TurboQuant, site: Site) -> None:
        self.codec, self.site = codec, site
        heads, dim = site.num_kv_heads, site.head_dim
        bits = codec.bits - codec.qjl
        self.plan = DigitPlan.uniform(bits, heads, dim, site.block_len, site.axis)
        fields = [*self.plan.fields(), float16_field("gain", heads, site.block_len)]
        self.uniform = codec.levels == "uniform"
        if self.uniform:
            self.step, self.middle = sphere_step(bits, dim), (2**bits - 1) / 2
            levels = self.step * (torch.arange(2**bits) - self.middle)
        else:
            levels = lloyd_max.sphere_levels(bits, dim)
        self.levels = levels.to(site.device)
        self.rotation = random_rotation(dim, codec.seed).to(site.device)  # y = x @ rotation
        if codec.qjl:
            self.sign_plan = DigitPlan.uniform(1, heads, dim, site.block_len, site.axis)
            residual = float16_field("residual", heads, site.block_len)
            fields += [*self.sign_plan.fields("signs"), residual]
            # a seed of its own: S must not depend on R
            self.sketch = sign_sketch.sketch_matrix(dim, codec.seed + 1).to(site.device)
            self.expansion = sign_sketch.expansion(self.sketch)
        self.layout = Layout(tuple(fields))
        if self.uniform:
            self.stored = Stored(self.plan, gain="gain")
        elif self.plan.plain and not codec.qjl:
            self.stored = Stored(self.plan, gain="gain", levels=self.levels[None])
        else:
            start = torch.zeros(heads, dim, dtype=torch.int64)
            plans, gains, table = [("digits", self.plan)], ["gain"], self.levels
            if codec.qjl:
                plans, gains = [*plans, ("signs", self.sign_plan)], [*gains, "residual"]
                start = torch.cat((start, torch.full_like(start, len(table))), 1)
                table = torch.cat((table, torch.tensor([-1.0, 1.0]).to(table)))
            self.decoded = Tabled(tuple(plans), tuple(gains), table, start)

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Rotate the unit-RMS vector, take the nearest levels, then choose the gain for them."""
        x = x.float().contiguous()
        rms = x.square().mean(-1, keepdim=True).sqrt()
        y = apply_tiles(x / torch.where(rms > 0, rms, 1.0), self.rotation)
        codes = lloyd_max.quantise(y, self.levels)
        gain = rms * self._correction(y, self.levels[codes.long()])
        fields = {**self.plan.pack(codes), "gain": to_float16(gain[..., 0])}
        if self.codec.qjl:
            rest = y - self.levels[codes.long()]
            signs = sign_sketch.sketch(rest, self.sketch)
            size = rms * rest.square().mean(-1, keepdim=True).sqrt()
            fields |= self.sign_plan.pack(signs, "signs")
            fields["residual"] = to_float16(size[..., 0])
        return fields

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The inverse rotation of the gains times the levels, in float32."""
        y = self.levels[self.plan.unpack(fields).long()] * fields["gain"].float()[..., None]
        if self.codec.qjl:
            y = y + self._signs(fields) * fields["residual"].float()[..., None] @ self.expansion
        return y @ self.rotation.T

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits if uniform, else the levels; a sketch adds a group of signs."""
        gain = fields["gain"].float()[..., None]
        if self.uniform:
            return Reading(self.plan.columns(fields).float(), gain)
        columns = self.levels[self.plan.unpack(fields).long()]
        if self.codec.qjl:
            columns = torch.cat((columns, self._signs(fields)), -1)
            gain = torch.cat((gain, fields["residual"].float()[..., None]), -1)
        return Reading(columns, gain)

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """The query rotated once, the same for all pages; a sketch also takes its projection.

        Uniform: step and digit weights folded in; the middle of the codes is a constant times g.
        """
        rotated = (q @ self.rotation)[:, :, None]
        if self.uniform:
            rotated = self.step * rotated
            return Query(self.plan.spread(rotated), -self.middle * rotated.sum(-1, keepdim=True))
        if self.codec.qjl:
            rotated = torch.cat((rotated, rotated @ self.expansion.T), -1)
        return Query(rotated)

    def output(self, total: Total) -> Tensor:
        """The sums rotated back once; uniform: digit weights and step applied to them first."""
        y = total.columns
        if self.uniform:
            y = self.step * (self.plan.gathered(y) - self.middle * total.gain)
        if self.codec.qjl:
            levels, signs = y.chunk(2, -1)
            y = levels + signs @ self.expansion
        return y @ self.rotation.T

    def _signs(self, fields: Mapping[str, Tensor]) -> Tensor:
        return 2.0 * self.sign_plan.unpack(fields, "signs").float() - 1.0

    def _correction(self, y: Tensor, coded: Tensor) -> Tensor:
        """The gain in units of the RMS of x. No level is 0, so that `coded` has a norm."""
        power = coded.square().mean(-1, keepdim=True)
        if self.codec.norm_correction == "norm":
            return (y.square().mean(-1, keepdim=True) / power).sqrt()
        if self.codec.norm_correction == "least-squares":
            return (y * coded).mean(-1, keepdim=True) / power
        return torch.ones_like(y[..., :1])


for _bits, _nmse in ((2, 0.14), (3, 0.042), (4, 0.0115)):
    register(
        f"turboquant{_bits}",
        keys=TurboQuant(_bits),
        values=TurboQuant(_bits),
        gaussian_nmse=(_nmse, _nmse),
        summary="random rotation, Lloyd-Max levels, norm corrected",
    )
for _bits, _nmse in ((2, 0.142), (3, 0.045), (4, 0.0138)):
    register(
        f"turboquant{_bits}-uniform",
        keys=TurboQuant(_bits, levels="uniform"),
        values=TurboQuant(_bits, levels="uniform"),
        gaussian_nmse=(_nmse, _nmse),
        summary="random rotation, uniform levels that kernels multiply, norm corrected",
    )
register(
    "turboquant3-qjl",
    keys=TurboQuant(3, norm_correction="none", qjl=True),
    values=TurboQuant(3, norm_correction="none", qjl=True),
    gaussian_nmse=(0.22, 0.22),
    summary="for the record: two bits and a sign sketch of the residual",
)
