"""Codecs on their own: encode plain tensors or numpy arrays, look at the bytes, decode."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    CodecError,
    Preset,
    Side,
    Site,
    check_states,
    exact_math,
    get,
)
from kvfold.transforms.rope import Rope

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact


@dataclass(frozen=True)
class Encoded:
    """Coded states: bytes of whole blocks, and how to read them.

    Args:
        pages: `[rows, blocks, nbytes]` uint8, laid out as `codec.layout` says.
        tokens: tokens that were given; the last block is completed by repeating the last one.
        positions: `[rows, blocks, block_len]` absolute token positions.
        codec: the bound codec.
        numpy: whether `decode` gives a numpy array, as was given.
    """

    pages: Tensor
    tokens: int
    positions: Tensor
    codec: BoundCodec
    numpy: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes held, metadata and padding included."""
        return self.pages.numel()

    @property
    def bits_per_element(self) -> float:
        """Stored bits of a full block over its elements."""
        site = self.codec.site
        elements = site.block_len * site.num_kv_heads * site.head_dim
        return 8 * self.codec.layout.nbytes / elements

    def decode(self) -> Any:
        """States `[rows, kv_heads, tokens, head_dim]` (float32)."""
        fields = self.codec.layout.split(self.pages.flatten(0, 1))
        x = self.codec.decode(fields, self.positions.flatten(0, 1))
        x = x.unflatten(0, self.pages.shape[:2]).transpose(1, 2).flatten(2, 3)
        x = x[:, :, : self.tokens]
        return x.cpu().numpy() if self.numpy else x


@exact_math
def encode(
    x: Tensor | np.ndarray,
    preset: str | Preset,
    *,
    side: Side = "key",
    positions: Tensor | np.ndarray | None = None,
    rope: Rope | None = None,
    block_len: int = 128,
    layer: int = 0,
    artefact: "Artefact | None" = None,
) -> Encoded:
    """Code states `[rows, kv_heads, tokens, head_dim]` (a tensor or numpy array of floats).

    Args:
        x: keys after RoPE, or values.
        preset: name of a preset, or a `Preset`.
        side: `"key"` or `"value"`.
        positions: `[rows, tokens]` absolute positions, by default 0, 1, 2, ...
        rope: the rotary embedding of the keys, for codecs that code them before RoPE.
        block_len: tokens of a block.
        layer: the layer whose tables an artefact gives.
        artefact: calibration, for codecs that use one.

    Raises:
        CodecError: a shape, dtype or preset that does not fit, or states that are not finite.

    >>> import torch
    >>> code = encode(torch.randn(1, 8, 1000, 128), "turboquant4")
    >>> code.decode().shape, code.bits_per_element
    (torch.Size([1, 8, 1000, 128]), 4.125)
    """
    is_numpy = isinstance(x, np.ndarray)
    states = torch.as_tensor(x)
    if states.ndim != 4 or not states.is_floating_point() or not states.numel():
        raise CodecError(
            f"states have shape {tuple(states.shape)} and dtype {states.dtype}; floats of shape "
            "[rows, kv_heads, tokens, head_dim] are possible"
        )
    if side not in ("key", "value"):
        raise CodecError(f"side is 'key' or 'value', not {side!r}")
    rows, heads, tokens, head_dim = states.shape
    chosen = get(preset)
    codec = chosen.keys if side == "key" else chosen.values
    site = Site(side, heads, head_dim, block_len, layer, states.dtype, states.device, rope)
    bound = codec.bind(site, artefact)
    check_states(states, f"{side}_states")
    if positions is None:
        at = torch.arange(tokens, device=states.device).expand(rows, -1)
    else:
        at = torch.as_tensor(positions).to(states.device)
        if tuple(at.shape) != (rows, tokens):
            raise CodecError(
                f"positions have shape {tuple(at.shape)}; {(rows, tokens)} is expected"
            )
    blocks = -(-tokens // block_len)
    index = torch.arange(blocks * block_len, device=states.device)
    beyond = (index - (tokens - 1)).clamp_min(0)
    index = index.clamp(max=tokens - 1)
    at = (at[:, index] + beyond).unflatten(1, (blocks, block_len))
    tiles = states[:, :, index].unflatten(2, (blocks, block_len)).transpose(1, 2)
    pages = bound.layout.join(bound.encode(tiles.flatten(0, 1), at.flatten(0, 1)))
    return Encoded(pages.unflatten(0, (rows, blocks)), tokens, at, bound, is_numpy)
