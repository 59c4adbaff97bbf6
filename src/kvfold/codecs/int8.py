"""int8 with a scale per token and head: the lossless-in-practice row."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    Codec,
    Fields,
    Query,
    Reading,
    Site,
    Stored,
    Total,
    float16_field,
    register,
)
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import uniform

BITS = 8
MIDDLE = 2 ** (BITS - 1)


@dataclass(frozen=True)
class Int8(Codec):
    """Symmetric 8-bit codes with a float16 scale per token and head (ZeroQuant, arXiv:2206.01861).

        x = g * (c - 128),   g = max |x| / 127

    Stored as two sections of 4-bit digits. A zero row has g = 0 and gives zeros.
    """

    paper = "ZeroQuant, arXiv:2206.01861"

    def bind(self, site: Site, artefact: object = None) -> "BoundInt8":
        """int8 at one layer's keys or values."""
        return BoundInt8(site)


class BoundInt8(BoundCodec):
    """Fields: `digits4`, `gain` `[heads, block_len]` float16."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.plan = DigitPlan.uniform(
            BITS, site.num_kv_heads, site.head_dim, site.block_len, site.axis
        )
        gain = float16_field("gain", site.num_kv_heads, site.block_len)
        self.layout = Layout((*self.plan.fields(), gain))
        self.stored = Stored(self.plan, gain="gain")

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """One scale per token and head, rounded to float16 before the codes are chosen."""
        codes, gain = uniform.symmetric(x.float(), BITS, -1)
        return {**self.plan.pack(codes), "gain": gain[..., 0]}

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """G * (c - 128) in float32."""
        return (self.plan.unpack(fields).float() - MIDDLE) * fields["gain"].float()[..., None]

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits, high halves before low halves."""
        return Reading(self.plan.columns(fields).float(), fields["gain"].float()[..., None])

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """Digit weights folded into q; the middle of the code range is a constant times g."""
        q = q[:, :, None]
        return Query(self.plan.spread(q), -MIDDLE * q.sum(-1, keepdim=True))

    def output(self, total: Total) -> Tensor:
        """Digit weights applied to the sums."""
        return self.plan.gathered(total.columns) - MIDDLE * total.gain


register(
    "int8",
    keys=Int8(),
    values=Int8(),
    gaussian_nmse=(6e-5, 6e-5),
    summary="symmetric, a scale per token and head",
)
