"""The numbers of a step of one token a row at fixed device addresses, for graphs that replay."""

import torch

from kvfold.cache.timeline import Located, Step, Timeline, upload


class Numbers:
    """What changes from step to step, as int32 tensors that are written in place.

    Args:
        timeline: of the cache; its rows stay the same.
        capacity: pages of a row that there is room for.
        device: where.
    """

    def __init__(self, timeline: Timeline, capacity: int, device: torch.device) -> None:
        rows, exact = timeline.rows, timeline.sinks + timeline.window + timeline.block
        self.capacity = capacity
        self._sizes = [rows * n for n in (exact, capacity, capacity, 1, 1, 1, 1, 1)]
        self._host = torch.zeros(sum(self._sizes), dtype=torch.int32)
        self._device = self._host.to(device)
        self._pages = (-1, -1)
        tokens, table, block, length, folded, first, query, slot = self._device.split(self._sizes)
        #: `[rows, sinks + ring]` token index of each exact slot, -1 where it is empty.
        self.tokens = tokens.view(rows, exact)
        #: `[rows, 1]` token index of the step's token.
        self.query_tokens = query.view(rows, 1)
        #: `[rows]` exact slot that takes the step's token.
        self.slot = slot
        #: the pages to read; `table` is as wide as the capacity.
        self.located = Located(
            length, folded, first, table.view(rows, capacity), block.view(rows, capacity)
        )

    def write(self, step: Step, timeline: Timeline) -> None:
        """Send a step's numbers to the device, without waiting for it."""
        tokens, table, block, length, folded, first, query, slot = self._host.split(self._sizes)
        rows = step.rows
        pages = (step.generation, sum(step.folded))
        if pages != self._pages:
            found = Located.of(step, step.folded, torch.device("cpu"))
            width = found.table.shape[1]
            table.view(rows, -1)[:, :width] = found.table
            block.view(rows, -1)[:, :width] = found.block
            folded.copy_(found.folded)
            self._pages = pages
        start = torch.tensor(step.start)
        tokens.view(rows, -1).copy_(timeline.exact_tokens(step.folded, step.length))
        length.copy_(start + 1)
        first.copy_(torch.tensor(step.first))
        query.copy_(start)
        ring = timeline.sinks + (start - timeline.sinks) % (timeline.window + timeline.block)
        slot.copy_(torch.where(start < timeline.sinks, start, ring))
        # a copy of its own: steps run ahead of the device, which may read it many steps later
        self._device.copy_(upload(self._host, self._device.device), non_blocking=True)
