"""Exact storage in pages: the bypass, and the yardstick of every test."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from kvfold.codec import BoundCodec, Codec, Fields, Site, States, register
from kvfold.layout import Field, Layout


@dataclass(frozen=True)
class Identity(Codec):
    """States as they are, in the model's dtype: x_n = y_n."""

    def bind(self, site: Site, artefact: object = None) -> "BoundIdentity":
        """Exact storage at one layer's keys or values."""
        return BoundIdentity(site)


class BoundIdentity(BoundCodec):
    """Fields: `states` `[heads, block_len, head_dim]` in the model's dtype."""

    def __init__(self, site: Site) -> None:
        self.site = site
        shape = (site.num_kv_heads, site.block_len, site.head_dim)
        self.layout = Layout((Field("states", shape, site.dtype),))
        self.decoded = States()

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """States, cast to the stored dtype."""
        return {"states": x.to(self.site.dtype)}

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The stored states in float32."""
        return fields["states"].float()


register("identity", keys=Identity(), values=Identity(), summary="exact, in the model's dtype")
