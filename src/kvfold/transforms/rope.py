"""Rotary position embedding and its inverse, from a model's own frequencies."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """R_n of one layer: `rotate(x, n)` turns channel pairs of x by `n * inv_freq`, times `scaling`.

    Computed in float32 exactly as transformers does (positions times frequencies in float32), so
    that `unrotate(rotate(x, n), n) == x` up to rounding at any position.

    Args:
        inv_freq: radians per position, one a channel pair (Su et al. 2021, arXiv:2104.09864);
            empty for a model without RoPE, whose R_n is the identity.
        scaling: factor on cos and sin (yarn's attention factor); 1 for plain RoPE.
        pairs: `"half"` pairs channels i and i + rotary_dim/2, `"interleaved"` 2i and 2i + 1.
    """

    inv_freq: tuple[float, ...]
    scaling: float = 1.0
    pairs: Literal["half", "interleaved"] = "half"

    @property
    def rotary_dim(self) -> int:
        """Leading channels that are rotated; the others pass through."""
        return 2 * len(self.inv_freq)

    @cached_property
    def _by_device(self) -> dict[torch.device, Tensor]:
        return {}

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[..., rotary_dim / 2]` (float32, scaled) at integer positions."""
        device = positions.device
        if device not in self._by_device:
            self._by_device[device] = torch.tensor(
                self.inv_freq, dtype=torch.float32, device=device
            )
        angle = positions[..., None].float() * self._by_device[device]
        return angle.cos() * self.scaling, angle.sin() * self.scaling

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R_n x for x `[..., heads, tokens, dim]` at positions `[..., tokens]`, in float32."""
        cos, sin = self.cos_sin(positions.unsqueeze(-2))
        return self._turn(x, cos, sin)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """R_n^-1 x, the inverse of `rotate`, scaling included."""
        cos, sin = self.cos_sin(positions.unsqueeze(-2))
        return self._turn(x, cos / self.scaling**2, -sin / self.scaling**2)

    def _turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        if not self.inv_freq:
            return x
        turned, passed = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        if self.pairs == "half":
            a, b = turned.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        else:
            a, b = turned[..., 0::2], turned[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        return torch.cat((turned, passed), -1) if passed.shape[-1] else turned
