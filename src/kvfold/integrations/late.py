"""What passes of one token a row were given, compared on the device and read when it got there."""

import torch
from torch import Tensor

from kvfold.cache.timeline import CacheError


class Late:
    """Whether masks and positions of decode steps were what the cache holds, without waiting.

    Reading them at once would make the host wait for the device in every step. The verdict comes a
    step or two late; nothing is generated after that.
    """

    def __init__(self) -> None:
        self.wrong: Tensor | None = None
        self.seen: Tensor | None = None
        self.event: torch.cuda.Event | None = None

    def note(
        self, mask: Tensor | None, positions: Tensor | None, length: Tensor, position: Tensor
    ) -> None:
        """Compare a pass `mask` `[rows, slots]`, `positions` `[rows or 1, 1]` with the cache's.

        Args:
            mask: the pass's attention mask, None for none.
            positions: the pass's RoPE positions, None for none.
            length: `[rows]` tokens of each row after the pass, on the device.
            position: `[rows]` position of each row's new token, on the device.
        """
        if self.wrong is None or self.wrong.device != length.device:
            pinned = length.device.type == "cuda"
            self.wrong = torch.zeros(1, dtype=torch.bool, device=length.device)
            self.seen = torch.zeros(1, dtype=torch.bool, pin_memory=pinned)
            self.event = torch.cuda.Event() if pinned else None
        assert self.seen is not None
        if mask is not None:
            self.wrong |= (mask.sum(1) != length).any()
        if positions is not None:
            self.wrong |= (positions[:, 0] != position).any()
        self.seen.copy_(self.wrong, non_blocking=True)
        if self.event is not None:
            self.event.record()

    def check(self) -> None:
        """Raise `CacheError` if a pass is known by now to have been wrong."""
        if self.seen is None or (self.event is not None and not self.event.query()):
            return
        if bool(self.seen):
            raise CacheError(
                "attention_mask or position_ids of an earlier pass did not mark the tokens that "
                "the cache holds, which decoding on a device finds late: what was generated since "
                "is wrong; reset() the cache"
            )
