"""One-byte gains on a log scale: 16 steps an octave, byte 128 is 1, byte 0 is the gain 0."""

import torch
from torch import Tensor

_STEPS, _ONE = 16, 128


def gain_table() -> Tensor:
    """`[256]` the gain of each byte: 2^((byte - 128) / 16), and 0 for byte 0."""
    table = torch.exp2((torch.arange(256, dtype=torch.float64) - _ONE) / _STEPS).float()
    table[0] = 0.0
    return table


def gain_byte(rms: Tensor) -> Tensor:
    """The byte (int16) whose gain is nearest to `rms` on a log scale, saturating."""
    return (_STEPS * rms.log2() + _ONE).round().clamp(0, 255).to(torch.int16)
