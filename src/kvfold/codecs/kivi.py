"""KIVI: keys quantised per channel, values per token, in short asymmetric groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
    Total,
    float16_field,
    register,
)
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import uniform


@dataclass(frozen=True)
class Kivi(Codec):
    """Asymmetric uniform codes of short groups (KIVI, Liu et al. 2024, arXiv:2402.02750, Eq. 1).

        q = round((x - z) / s),   z = min x,   s = (max x - min x) / (2**bits - 1)

    over each group of `group_size` elements; groups run along tokens for keys (per channel) and
    along channels for values (per token). Scales and zero points are float16.

    Our `group_size` is the paper's G; its residual length R lives in the cache's window and block.

    Args:
        bits: code width, 1 to 8 (the paper's are 2 and 4).
        group_size: elements that share a scale and a zero point: 32 cost one whole bit per element.
        group_axis: the axis along which a group runs.

    Raises:
        CodecError: `group_size` does not divide the length of its axis.

    Departs from the paper: groups are aligned to token positions and quantised once, when they are
    closed, each with a scale and zero of its own.
    """

    bits: int = 2
    group_size: int = 32
    group_axis: Literal["token", "channel"] = "token"

    paper = "KIVI, arXiv:2402.02750"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"kivi has codes of 1 to 8 bits, not {self.bits}")
        if self.group_axis not in ("token", "channel"):
            raise CodecError(f"group_axis is 'token' or 'channel', not {self.group_axis!r}")
        if self.group_size < 2:
            raise CodecError(f"group_size ({self.group_size}) must be at least 2")

    @property
    def group_len(self) -> int:
        """Tokens that share parameters: the exact window may not be shorter."""
        return self.group_size if self.group_axis == "token" else 1

    def bind(self, site: Site, artefact: object = None) -> "BoundKivi":
        """KIVI at one layer's keys or values."""
        length = site.block_len if self.group_axis == "token" else site.head_dim
        if length % self.group_size:
            name = "block_len" if self.group_axis == "token" else "head_dim"
            possible = ", ".join(str(g) for g in range(16, length + 1) if length % g == 0)
            raise CodecError(
                f"{name} ({length}) must be a multiple of group_size ({self.group_size}) when "
                f"groups run along {self.group_axis}s; possible group sizes: {possible}"
            )
        return BoundKivi(self, site)


class BoundKivi(BoundCodec):
    """Fields: `digitsN`; `scale` and `zero` `[heads, groups of tokens or 1, ...]` float16.

    Along tokens both are `[heads, block_len / G, head_dim]`, along channels
    `[heads, block_len, head_dim / G]`.
    """

    def __init__(self, codec: Kivi, site: Site) -> None:
        self.codec, self.site = codec, site
        self.plan = DigitPlan.uniform(
            codec.bits, site.num_kv_heads, site.head_dim, site.block_len, site.axis
        )
        self.along_tokens = self.page_query = codec.group_axis == "token"
        groups = (
            (site.num_kv_heads, site.block_len // codec.group_size, site.head_dim)
            if self.along_tokens
            else (site.num_kv_heads, site.block_len, site.head_dim // codec.group_size)
        )
        self.layout = Layout(
            (
                *self.plan.fields(),
                float16_field("scale", *groups),
                float16_field("zero", *groups),
            )
        )
        if self.along_tokens and site.side == "key" and self.plan.plain:
            self.stored = Stored(self.plan, page_scale="scale", page_zero="zero")
        elif not self.along_tokens and self._groups_are_runs:
            self.stored = Stored(self.plan, gain="scale", offset="zero")

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Each group by its own minimum and range."""
        axis = 2 if self.along_tokens else 3
        groups = x.float().unflatten(axis, (-1, self.codec.group_size))
        codes, scale, zero = uniform.asymmetric(groups, self.codec.bits, axis + 1)
        return {
            **self.plan.pack(codes.flatten(axis, axis + 1)),
            "scale": scale.squeeze(axis + 1),
            "zero": zero.squeeze(axis + 1),
        }

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """S * q + z in float32."""
        axis = 2 if self.along_tokens else 3
        codes = self.plan.unpack(fields).float().unflatten(axis, (-1, self.codec.group_size))
        scale = fields["scale"].float().unsqueeze(axis + 1)
        return (codes * scale + fields["zero"].float().unsqueeze(axis + 1)).flatten(axis, axis + 1)

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits; along channels each token has a gain and offset per group."""
        if self.along_tokens and self.site.side == "value":
            return Reading(self.decode(fields, positions))
        columns = self.plan.columns(fields).float()
        if self.along_tokens:
            return Reading(columns)
        if not self._groups_are_runs:
            return Reading(self.decode(fields, positions))
        return Reading(columns, fields["scale"].float(), fields["zero"].float())

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """Along tokens: steps folded into one query per group, zero points into a constant."""
        if not self.along_tokens:
            if not self._groups_are_runs:
                return Query(q[:, :, None])
            sums = q.unflatten(-1, (-1, self.codec.group_size)).sum(-1)
            return Query(self.plan.spread(q[:, :, None]), offset=sums)
        scale, zero = fields["scale"].float(), fields["zero"].float()
        columns = self.plan.spread(q[:, :, None] * scale[:, :, :, None])
        return Query(columns, q[:, :, None] @ zero[..., None])

    def output(self, total: Total) -> Tensor:
        """Along channels: digit weights applied, and each group's zero points added."""
        if self.along_tokens or not self._groups_are_runs:
            return total.columns
        offset = total.offset.repeat_interleave(self.codec.group_size, -1)
        return self.plan.gathered(total.columns) + offset

    @property
    def _groups_are_runs(self) -> bool:
        """Whether groups of channels are equal runs of columns: one group, or one digit each."""
        return self.plan.plain or self.codec.group_size == self.site.head_dim


for _bits, _group, _nmse in (
    (2, 32, (0.16, 0.16)),
    (2, 64, (0.22, 0.22)),
    (4, 32, (0.0066, 0.0066)),
    (4, 64, (0.0092, 0.0092)),
):
    register(
        f"kivi{_bits}-g{_group}",
        keys=Kivi(_bits, _group, "token"),
        values=Kivi(_bits, _group, "channel"),
        gaussian_nmse=_nmse,
        summary=f"keys per channel, values per token, groups of {_group}",
    )
