"""The same bytes and the same attention on a CUDA device."""

import contextlib

import pytest
import torch

import kvfold
from kvfold.attention import paged, workspace
from kvfold.attention.oracle import oracle
from kvfold.attention.paged import attend
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import Site
from kvfold.packing import DigitPlan
from tests.cache.test_store import PRESETS, ROPE, feed
from tests.integrations.conftest import tiny_llama

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_packing_is_the_same_on_the_device(axis, dim):
    bits = tuple(tuple((7 * h + 3 * c) % 9 for c in range(dim)) for h in range(3))
    plan = DigitPlan(bits, 128, axis)
    top = 2 ** torch.tensor(bits)[None, :, None]
    codes = (torch.rand(4, 3, 128, dim) * top).to(torch.int16)
    host, device = plan.pack(codes), plan.pack(codes.cuda())
    for name, field in host.items():
        assert torch.equal(field, device[name].cpu())
    assert torch.equal(plan.unpack(device).cpu(), codes)


def bound(name, device, heads=2, dim=64, dtype=torch.float32):
    preset = kvfold.get(name)
    made = []
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, dtype=dtype, device=torch.device(device), rope=ROPE)
        made.append(codec.bind(site, codec.example(site)))
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_bytes_equal_the_hosts_but_for_ties(name):
    """At most one byte in 500 differs: a sum in another order moves a tie."""
    torch.manual_seed(31)
    x, positions = torch.randn(6, 2, 128, 64), torch.arange(768).view(6, 128)
    for here, there in zip(bound(name, "cpu"), bound(name, "cuda"), strict=True):
        host = LayerStore.encoded(here, x, positions)
        device = LayerStore.encoded(there, x.cuda(), positions.cuda()).cpu()
        share = (host != device).float().mean().item()
        assert share < 0.002, share


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PRESETS)
def test_attention_equals_the_oracle(name, dtype):
    torch.manual_seed(32)
    store = LayerStore(*bound(name, "cuda", dtype=dtype), Timeline(4, 64, 128))
    keys, values = torch.randn(2, 2, 2, 501, 64, device="cuda", dtype=dtype)
    view = feed(store, keys, values, [500, 1])
    q = torch.randn(2, 8, 1, 64, device="cuda", dtype=dtype)
    found, wanted = attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125)
    worst = ((found - wanted).norm() / wanted.norm()).item()
    assert worst < 1e-5, worst


@pytest.mark.parametrize("name", ["int8", "kivi4-g32", "fisher2"])
def test_a_long_pass_over_packed_history_equals_the_oracle(name):
    """Pages are decoded into a bfloat16 workspace: the error is that of bfloat16 states."""
    torch.manual_seed(33)
    store = LayerStore(*bound(name, "cuda", dtype=torch.bfloat16), Timeline(4, 64, 128))
    keys, values = torch.randn(2, 2, 2, 1000, 64, device="cuda", dtype=torch.bfloat16)
    view = feed(store, keys, values, [700, 300])
    q = torch.randn(2, 8, 300, 64, device="cuda", dtype=torch.bfloat16)
    assert workspace.serves(q, view, None, paged.LONG)
    found, wanted = attend(q, view, scaling=0.125), oracle(q, view, scaling=0.125)
    worst = ((found - wanted).norm() / wanted.norm()).item()
    assert worst < 0.01, worst


@pytest.mark.filterwarnings("ignore::kvfold.FoldedWarning")
def test_generate_on_the_device():
    model = tiny_llama().cuda()
    prompt = torch.randint(3, 300, (2, 230), device="cuda")
    more = {"max_new_tokens": 60, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    stock = model.generate(prompt, **more)
    cache = kvfold.FoldedCache(model, "identity")
    assert torch.equal(model.generate(prompt, past_key_values=cache, **more), stock)
    assert cache.layers[0].store.pool.slabs[0].is_cuda


def test_a_first_pass_is_folded_beside_it_and_waited_for():
    """Its pages are those of a pass folded in line; what comes after them reads them whole."""
    model = tiny_llama(num_hidden_layers=2).cuda()
    ids = torch.randint(3, 90, (2, 1200), generator=torch.Generator().manual_seed(4)).cuda()
    caches = [kvfold.FoldedCache(model, "kivi4-g64", strict=True) for _ in range(2)]
    with torch.no_grad():
        logits = []
        for i, cache in enumerate(caches):
            with pytest.MonkeyPatch.context() as patch:
                if i:  # in line
                    patch.setattr(LayerStore, "_beside", lambda *_: contextlib.nullcontext())
                model(ids, past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
    stores = [[layer.store for layer in cache.folded_layers] for cache in caches]
    for beside, inline in zip(*stores, strict=True):
        assert beside.folding is None  # waited for
        pages = range(2 * 8)
        assert torch.equal(beside.pool.gather(pages), inline.pool.gather(pages))
    assert torch.equal(*logits)
