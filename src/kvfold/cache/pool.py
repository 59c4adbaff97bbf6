"""Append-only pages in slabs of fixed size and fixed address."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvfold.cache.timeline import upload


class Pool:
    """Pages of one layer, numbered; page `i` is row `i % slab_pages` of slab `i // slab_pages`.

    It grows by whole slabs and never moves a page, so that memory is never held twice and device
    addresses stay valid.
    """

    def __init__(self, page_bytes: int, slab_pages: int, device: torch.device) -> None:
        self.page_bytes, self.slab_pages, self.device = page_bytes, slab_pages, device
        self.slabs: list[Tensor] = []
        #: `[at least slabs]` int64 device address of each slab, for kernels; it is filled in place,
        #: and made anew (twice as long) only where it is full.
        self.addresses = torch.zeros(0, dtype=torch.int64, device=device)

    def reserve(self, pages: int) -> None:
        """Grow until page numbers below `pages` exist."""
        shape = (self.slab_pages, self.page_bytes)
        held = len(self.slabs)
        with torch.inference_mode(False):
            while len(self.slabs) * self.slab_pages < pages:
                self.slabs.append(torch.zeros(shape, dtype=torch.uint8, device=self.device))
            if len(self.slabs) > held:
                self._note_addresses()

    def _note_addresses(self) -> None:
        found = torch.tensor([slab.data_ptr() for slab in self.slabs], dtype=torch.int64)
        if len(found) > len(self.addresses):
            self.addresses = found.new_zeros(max(16, 2 * len(found)), device=self.device)
        self.addresses[: len(found)].copy_(upload(found, self.device), non_blocking=True)

    def write(self, numbers: Sequence[int], pages: Tensor) -> None:
        """Store `pages` `[n, page_bytes]` under their numbers."""
        for slab, rows, at in self._by_slab(numbers):
            self.slabs[slab][_index(rows, self.device)] = pages[at]

    def gather(self, numbers: Sequence[int]) -> Tensor:
        """Pages `[n, page_bytes]` in the order of their numbers: a view where they lie in a row."""
        parts = [
            self.slabs[slab][_index(rows, self.device)] for slab, rows, _ in self._by_slab(numbers)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _by_slab(self, numbers: Sequence[int]) -> list[tuple[int, list[int], slice]]:
        """Runs of numbers in the same slab: slab, rows in it, and their places in `numbers`."""
        runs: list[tuple[int, list[int], slice]] = []
        for place, number in enumerate(numbers):
            slab, row = divmod(number, self.slab_pages)
            if runs and runs[-1][0] == slab:
                runs[-1][1].append(row)
                runs[-1] = (slab, runs[-1][1], slice(runs[-1][2].start, place + 1))
            else:
                runs.append((slab, [row], slice(place, place + 1)))
        return runs


def _index(rows: list[int], device: torch.device) -> Tensor | slice:
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    return upload(torch.tensor(rows), device)
