"""RotateKV: keys before RoPE, rotated across heads, with similar channels quantised together."""

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
    Stored,
    Total,
    float16_field,
    register,
)
from kvfold.layout import Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers import uniform
from kvfold.transforms.hadamard import hadamard

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact


@dataclass(frozen=True)
class RotateKV(Codec):
    """Outlier-aware rotation and asymmetric codes (RotateKV, Su et al. 2025, arXiv:2501.16383).

        y = P H R_n^-1 k_n
        q = round((y - z) / s),   z = min y,   s = (max y - min y) / (2**bits - 1)

    with R_n the rotation of RoPE at position n (keys only), H the fast Walsh-Hadamard transform
    across the channels of `group_heads` neighbouring heads, and P the order of rotated channels:
    slices of head_dim of them share a float16 scale and zero point per token. P comes from
    calibration (`channel_order`), one for each group of heads, and is the identity without it.

    The paper's attention sinks are the cache's: sinks stay exact by position.

    Args:
        bits: code width, 1 to 8 (the paper's are 2, 3 and 4).
        group_heads: heads that H mixes, the paper's grouped heads; the largest divisor of the
            number of KV heads up to it is taken.
        before_rope: whether keys are coded before RoPE; False for values, which have none.

    Raises:
        CodecError: a knob out of range; keys before RoPE at a layer whose RoPE is not known.

    Departs from the paper: slices are as long as a head, two heads are grouped in place of four,
    channels are ordered within their group of heads, and a dimension that is no power of two takes
    block Hadamards. Values are rotated head by head, as in the paper.
    """

    bits: int = 4
    group_heads: int = 2
    before_rope: bool = True

    paper = "RotateKV, arXiv:2501.16383"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise CodecError(f"rotatekv has codes of 1 to 8 bits, not {self.bits}")
        if self.group_heads < 1:
            raise CodecError(f"group_heads ({self.group_heads}) must be at least 1")

    @property
    def pre_rope(self) -> bool:
        """Whether keys are coded before RoPE."""
        return self.before_rope

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """The channel order may come from calibration."""
        return "optional"

    def calibrator(self, site: Site) -> "ChannelMeans":
        """What finds the channel order of a layer's groups of heads."""
        return ChannelMeans(self, site)

    def calibrated_knobs(self) -> dict[str, Any]:
        """The order of channels depends on what is rotated, not on the width of codes."""
        return {"group_heads": self.group_heads, "before_rope": self.before_rope}

    def heads_per_group(self, num_kv_heads: int) -> int:
        """Heads that really are mixed: the largest divisor of the KV heads up to `group_heads`."""
        return max(g for g in range(1, self.group_heads + 1) if num_kv_heads % g == 0)

    def bind(
        self, site: Site, artefact: "Artefact | ExampleTables | None" = None
    ) -> "BoundRotateKV":
        """RotateKV at one layer's keys or values."""
        if self.before_rope and site.side == "value":
            raise CodecError("values have no RoPE; rotatekv for values needs before_rope=False")
        if self.before_rope and site.rope is None:
            raise CodecError(
                f"rotatekv codes keys before RoPE, and the rope of layer {site.layer} is not "
                "known; give Site.rope (Rope(()) for a model without RoPE), or use "
                "before_rope=False"
            )
        if site.rope is not None and site.rope.rotary_dim > site.head_dim:
            raise CodecError(
                f"the rope rotates {site.rope.rotary_dim} channels; head_dim is {site.head_dim}"
            )
        tables = {} if artefact is None else artefact.at(site.layer, site.side)
        order = tables.get("channel_order")
        if order is not None:
            group = self.heads_per_group(site.num_kv_heads)
            shape = (site.num_kv_heads // group, group * site.head_dim)
            if order.shape != shape or not torch.equal(
                order.sort(-1).values, torch.arange(shape[1]).expand(shape).to(order)
            ):
                raise CodecError(
                    f"the artefact's channel_order of layer {site.layer} (shape "
                    f"{tuple(order.shape)}) must hold a permutation of {shape[1]} channels for "
                    f"each of {shape[0]} groups of {group} heads"
                )
        return BoundRotateKV(self, site, order)


class BoundRotateKV(BoundCodec):
    """Fields: `digitsN`; `scale` and `zero` `[heads, block_len]` float16, one a slice."""

    def __init__(self, codec: RotateKV, site: Site, order: Tensor | None) -> None:
        self.codec, self.site = codec, site
        self.rope = site.rope if codec.before_rope else None
        self.group = codec.heads_per_group(site.num_kv_heads)
        self.plan = DigitPlan.uniform(
            codec.bits, site.num_kv_heads, site.head_dim, site.block_len, site.axis
        )
        parameters = (site.num_kv_heads, site.block_len)
        self.layout = Layout(
            (
                *self.plan.fields(),
                float16_field("scale", *parameters),
                float16_field("zero", *parameters),
            )
        )
        if self._on_codes:
            self.stored = Stored(self.plan, gain="scale", offset="zero")
        elif self.rope is not None:
            self.stored = Stored(
                self.plan, gain="scale", offset="zero", turns="token", share=self.group
            )
        self.order = self.inverse_order = None
        if order is not None:
            self.order = order.long().to(site.device)
            self.inverse_order = self.order.argsort(-1)

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Undo RoPE, rotate across heads, then each slice by its own minimum and range."""
        x = x.float()
        if self.rope is not None:
            x = self.rope.unrotate(x, positions)
        codes, scale, zero = uniform.asymmetric(self.rotate(x), self.codec.bits, -1)
        return {**self.plan.pack(codes), "scale": scale[..., 0], "zero": zero[..., 0]}

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """S * q + z, rotated back, with RoPE applied, in float32."""
        scale, zero = (fields[name].float()[..., None] for name in ("scale", "zero"))
        x = self.unrotate(self.plan.unpack(fields).float() * scale + zero)
        return x if self.rope is None else self.rope.rotate(x, positions)

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits, where a head is coded by itself and without RoPE in between."""
        if not self._on_codes:
            return Reading(self.decode(fields, positions))
        scale, zero = (fields[name].float()[..., None] for name in ("scale", "zero"))
        return Reading(self.plan.columns(fields).float(), scale, zero)

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """The query rotated once, digit weights folded in; zero points meet its sum."""
        if not self._on_codes:
            return Query(q[:, :, None])
        rotated = self.rotate(q)
        return Query(self.plan.spread(rotated)[:, :, None], offset=rotated.sum(-1, keepdim=True))

    def token_query(self, q: Tensor) -> Query:
        """A query rotated in its group's space, digit weights folded in, slice by slice."""
        assert self.rope is not None
        rows, heads, queries, dim = q.shape
        wide = q.new_zeros(rows, heads, queries, self.group, dim)
        for h in range(heads):
            wide[:, h, :, h % self.group] = q[:, h] * self.rope.scaling
        rotated = hadamard(wide.flatten(-2))
        if self.order is not None:
            rotated = _reordered(rotated, self.order.repeat_interleave(self.group, 0))
        slices = rotated.unflatten(-1, (self.group, dim))
        columns = self.plan.spread(slices).flatten(-2)
        return Query(columns[:, :, None], offset=slices.sum(-1))

    def output(self, total: Total) -> Tensor:
        """Digit weights and zero points applied, and the sums rotated back once."""
        if not self._on_codes:
            return total.columns
        return self.unrotate(self.plan.gathered(total.columns) + total.offset)

    def rotate(self, x: Tensor) -> Tensor:
        """P H x across the heads of each group: `[rows, heads, tokens, head_dim]`, same shape."""
        y = hadamard(self._merged(x))
        return self._parted(y if self.order is None else _reordered(y, self.order))

    def unrotate(self, y: Tensor) -> Tensor:
        """The inverse of `rotate`."""
        y = self._merged(y)
        y = y if self.inverse_order is None else _reordered(y, self.inverse_order)
        return self._parted(hadamard(y))

    @property
    def _on_codes(self) -> bool:
        # one head's weights cannot be summed over another head's codes, nor over unturned keys
        return self.group == 1 and self.rope is None

    def _merged(self, x: Tensor) -> Tensor:
        """`[rows, heads, tokens, dim]` to `[rows, groups, tokens, group * dim]`."""
        return x.unflatten(1, (-1, self.group)).transpose(2, 3).flatten(-2)

    def _parted(self, y: Tensor) -> Tensor:
        """`[rows, groups, tokens, group * dim]` to `[rows, heads, tokens, dim]`."""
        return y.unflatten(-1, (self.group, -1)).transpose(2, 3).flatten(1, 2)


class ChannelMeans:
    """Sums of the states as they are coded, the statistic of `channel_order`."""

    def __init__(self, codec: RotateKV, site: Site) -> None:
        self.rope = site.rope if codec.before_rope else None
        self.group = codec.heads_per_group(site.num_kv_heads)
        self.total: Tensor | None = None

    def add(self, x: Tensor, positions: Tensor) -> None:
        """Add the states of some tokens, RoPE undone for keys."""
        x = x if self.rope is None else self.rope.unrotate(x, positions)
        total = x.sum((0, 2)).cpu().double()  # float64 does not exist on every device
        self.total = total if self.total is None else self.total + total

    def tables(self) -> dict[str, Tensor]:
        """`channel_order` `[groups, group_heads * head_dim]`; empty if no token was seen."""
        if self.total is None:
            return {}
        means = self.total.unflatten(0, (-1, self.group)).flatten(1)
        return {"channel_order": channel_order(means)}


def channel_order(means: Tensor) -> Tensor:
    """RotateKV's order of rotated channels (int64) from calibration: ascending mean.

    Channels of one slice then have similar values, and a slice's range, hence its step, is short.

    Args:
        means: `[..., group_heads * head_dim]`, the (signed) mean or sum over calibration tokens of
            the states as they are coded, keys before RoPE, the heads of a group side by side.

    Returns:
        One permutation for each group: `rotated[..., order]` is what is cut into slices.
    """
    return hadamard(means.float()).argsort(dim=-1, stable=True)


def _reordered(y: Tensor, order: Tensor) -> Tensor:
    """Channels of `[rows, groups, tokens, channels]` by each group's order."""
    return y.gather(-1, order[None, :, None].expand(y.shape[0], -1, y.shape[2], -1))


for _bits, _nmse in ((2, 0.29), (3, 0.053), (4, 0.0115), (8, 4e-5)):
    register(
        f"rotatekv{_bits}",
        keys=RotateKV(_bits, group_heads=2, before_rope=True),
        values=RotateKV(_bits, group_heads=1, before_rope=False),
        gaussian_nmse=(_nmse, _nmse),
        summary="keys before RoPE, rotated across two heads; a scale and zero per token",
    )
