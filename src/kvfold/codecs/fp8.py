"""fp8 with a scale per token and head: the row that users of serving engines compare with."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    Codec,
    Fields,
    Reading,
    Site,
    States,
    float16_field,
    register,
)
from kvfold.layout import Field, Layout
from kvfold.quantizers.uniform import to_float16

E4M3_MAX = 448.0


@dataclass(frozen=True)
class Fp8(Codec):
    """e4m3 floats, a float16 scale per token and head (Micikevicius et al. 2022, arXiv:2209.05433).

        y = e4m3(x / g),   g = max |x| / 448

    Departs from the engines' fp8 caches, which have one scale for a whole layer.
    """

    paper = "FP8 formats, arXiv:2209.05433"

    def bind(self, site: Site, artefact: object = None) -> "BoundFp8":
        """fp8 at one layer's keys or values."""
        return BoundFp8(site)


class BoundFp8(BoundCodec):
    """Fields: `states` `[heads, block_len, head_dim]` e4m3, `gain` `[heads, block_len]` float16."""

    def __init__(self, site: Site) -> None:
        self.site = site
        shape = (site.num_kv_heads, site.block_len, site.head_dim)
        self.layout = Layout(
            (Field("states", shape, torch.float8_e4m3fn), float16_field("gain", *shape[:2]))
        )
        self.decoded = States(gain="gain")

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Scale by the token's largest channel, then round to e4m3."""
        x = x.float()
        gain = to_float16(x.abs().amax(-1) / E4M3_MAX)
        step = torch.where(gain > 0, gain.float(), 1.0)[..., None]
        # e4m3 has no infinity and casts what is above 448 to NaN: gain's rounding may exceed it
        states = (x / step).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {"states": states, "gain": gain}

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """G * y in float32."""
        return fields["states"].float() * fields["gain"].float()[..., None]

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the e4m3 values."""
        return Reading(fields["states"].float(), fields["gain"].float()[..., None])


register(
    "fp8",
    keys=Fp8(),
    values=Fp8(),
    gaussian_nmse=(0.0009, 0.0009),
    summary="e4m3, a scale per token and head",
)
