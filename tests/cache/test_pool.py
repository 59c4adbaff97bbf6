"""Pages that lie elsewhere than they are read; streams are emulated where there is no GPU."""

from contextlib import nullcontext

import pytest
import torch

from kvfold.cache.pool import Pool


class Stream:
    """Stands for a CUDA stream, and notes what was waited for."""

    def __init__(self, log):
        self.log = log

    def record_event(self):
        self.log.append("sent")
        return "event"

    def wait_event(self, event):
        self.log.append("waited")


@pytest.fixture
def offloaded(monkeypatch):
    log = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(log))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    pool = Pool(16, 3, torch.device("cpu"))
    pool.reserve(9)
    pool.write(range(9), torch.arange(9 * 16, dtype=torch.uint8).view(9, 16))
    pool.is_offloaded = True
    return pool, log


def test_the_next_group_is_sent_before_the_last_one_is_used(offloaded):
    pool, log = offloaded
    groups = [[0, 1, 4], [8, 2], [3, 5, 7]]
    found = []
    for pages in pool.stream(groups):
        log.append("used")
        found.append(pages)
    assert log == ["sent", "waited", "sent", "used", "waited", "sent", "used", "waited", "used"]
    for pages, group in zip(found, groups, strict=True):
        assert pages[:, 0].tolist() == [16 * n for n in group]
        assert torch.equal(pages, pool.gather(group))
    assert list(pool.stream([])) == []


def test_on_the_cpu_nothing_is_moved():
    pool = Pool(16, 3, torch.device("cpu"), offload=True)
    pool.reserve(1)
    assert not pool.is_offloaded
    assert pool.home == pool.device
