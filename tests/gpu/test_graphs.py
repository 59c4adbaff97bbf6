"""Decode steps replayed from CUDA graphs: the eager tokens, the same pages, nothing waited for."""

import pytest
import torch

import kvfold
from kvfold.attention import dispatch
from tests.integrations.conftest import tiny_llama

pytestmark = pytest.mark.gpu
NAMES = ["identity", "kivi4-g32", "turboquant4"]


@pytest.fixture(scope="module")
def model():
    """Two layers of head_dim 64, in float32."""
    return tiny_llama(head_dim=64).cuda()


def prompt(rows=2, tokens=330):
    made = torch.randint(3, 300, (rows, tokens), generator=torch.Generator().manual_seed(5))
    return made.cuda()


def generate(model, ids, cache, mask=None, tokens=140):
    mask = torch.ones_like(ids) if mask is None else mask
    more = {"max_new_tokens": tokens, "do_sample": False, "attention_mask": mask}
    return model.generate(ids, past_key_values=cache, **more)


def serves(model, name):
    """Whether the device's kernel reads this preset; else nothing is replayed, and that is said."""
    if "cuda" not in dispatch.KERNELS:
        pytest.skip("no kernel for cuda")
    cache = kvfold.FoldedCache(model, name, graphs=True)
    with torch.no_grad():
        for part in (prompt(1), prompt(1)[:, :1]):
            model(input_ids=part, past_key_values=cache)
    if cache.graphs.reason is not None:
        assert name == "identity", cache.graphs.reason
        pytest.skip(cache.graphs.reason)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::kvfold.FoldedWarning")
def test_replayed_tokens_and_pages_are_the_eager_ones(model, name, padded):
    """140 tokens: a block is folded on the way and the ring goes round."""
    serves(model, name)
    ids, mask = prompt(), torch.ones(2, 330, dtype=torch.long, device="cuda")
    if padded:
        mask[0, :60] = 0
    made = []
    for on in (False, True):
        cache = kvfold.FoldedCache(model, name, graphs=on)
        made.append((generate(model, ids, cache, mask), cache))
    (eager, first), (replayed, second) = made
    assert second.graphs.replays > 130
    assert second.graphs.captures <= 2, second.graphs.captures
    # one kernel serves both, but its splits differ with the room for pages: a tie may fall
    # otherwise; what both generated until then is the same, and so are the pages of it
    same = (eager == replayed).all(0).long().cumprod(0).sum().item()
    assert same >= 330 + 100, same
    held = second.timeline.folded_at(330 + 60)
    for a, b in zip(first.folded_layers, second.folded_layers, strict=True):
        for x, y in zip(a.store.pool.slabs[:1], b.store.pool.slabs[:1], strict=True):
            share = (x[: 2 * held] != y[: 2 * held]).float().mean().item()
            assert share < 0.01, share


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.filterwarnings("ignore::kvfold.FoldedWarning")
def test_no_step_waits_for_the_device(model, graphs):
    """Neither a replay nor an eager step, a fold among them, synchronises with the host."""
    serves(model, "kivi4-g32")
    cache = kvfold.FoldedCache(model, "kivi4-g32", graphs=graphs)
    ids = prompt()
    mask = torch.ones(2, 330 + 200, dtype=torch.long, device="cuda")
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask[:, :330], past_key_values=cache)
        for n in range(330, 330 + 180):
            watched = n > 340
            torch.cuda.set_sync_debug_mode("error" if watched else "default")
            try:
                position = torch.full((2, 1), 0, device="cuda") + n
                model(
                    input_ids=ids[:, :1],
                    attention_mask=mask[:, : n + 1],
                    position_ids=position,
                    past_key_values=cache,
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert cache.timeline.folded[0] == cache.timeline.folded_at(330) + 1


def test_steps_run_ahead_of_the_device(model):
    """Each replay reads its own step's numbers, however many steps later the device gets there."""
    serves(model, "kivi4-g32")
    cache, ids = kvfold.FoldedCache(model, "kivi4-g32", graphs=True), prompt()
    found = []
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            model(input_ids=part, past_key_values=cache)
        numbers = cache.graphs.capture.numbers
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # half a second
        for _ in range(12):
            model(input_ids=ids[:, :1], past_key_values=cache)
            found.append(numbers.query_tokens.clone())
    assert torch.cat(found, 1).tolist() == [list(range(331, 343))] * 2


def test_a_fold_on_the_device_writes_the_hosts_bytes(model):
    """Bytes of the blocks folded while decoding, against the same states encoded on the host."""
    cache = kvfold.FoldedCache(model, "kivi4-g32", graphs=False)
    ids = prompt(1, 460)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    store = cache.folded_layers[0].store
    on_host = tiny_llama(head_dim=64)
    host = kvfold.FoldedCache(on_host, "kivi4-g32")
    with torch.no_grad():
        on_host(input_ids=ids.cpu(), past_key_values=host)
    there = host.folded_layers[0].store
    share = (store.pool.slabs[0].cpu() != there.pool.slabs[0]).float().mean().item()
    assert share < 0.01, share


def test_states_that_no_code_holds_are_refused_when_the_device_gets_there(model):
    cache = kvfold.FoldedCache(model, "kivi4-g32", graphs=False)
    with torch.no_grad():
        model(input_ids=prompt(1), past_key_values=cache)
        store = cache.folded_layers[0].store
        states = torch.full((1, 1, 1, 4), float("nan"), device="cuda")
        store.watch.add(states, "layer 0: key_states")
        torch.cuda.synchronize()
        with pytest.raises(kvfold.CodecError, match="layer 0: key_states contain NaN"):
            store.watch.check()
