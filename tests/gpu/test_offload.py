"""Cold pages in CPU memory, streamed to a CUDA device while attention reads them."""

import pytest
import torch

from kvfold import FoldedCache
from tests.integrations.conftest import tiny_llama
from tests.integrations.test_eviction import run

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("more", [{}, {"trim": 128}, {"top_k": 64}])
def test_offloaded_pages_are_the_same_pages(more):
    model = tiny_llama(max_position_embeddings=8192).cuda()
    ids = torch.randint(3, 300, (2, 4100), generator=torch.Generator().manual_seed(4)).cuda()
    parts = [4000] + [1] * 100
    knobs = {"window": 32, "block": 32, "graphs": False, **more}
    caches = [FoldedCache(model, "turboquant4", offload=o, **knobs) for o in (False, True)]
    here, there = (run(model, ids, cache, parts) for cache in caches)
    assert (here - there).abs().max() < 2e-3, (here - there).abs().max()
    pool = caches[1].layers[0].store.pool
    assert pool.is_offloaded
    assert all(slab.is_pinned() for slab in pool.slabs)
    pages = [
        cache.layers[0].store.pool.gather([n for n in cache.timeline.table[0] if n >= 0]).cpu()
        for cache in caches
    ]
    assert torch.equal(*pages)
    assert "cold pages lie in pinned CPU memory" in caches[1].summary()
