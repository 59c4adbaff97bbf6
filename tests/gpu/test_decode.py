"""The decode kernel on the device: every code it reads, against the float32 oracle."""

import pytest
import torch

import kvfold
from kvfold.attention.oracle import oracle
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Timeline
from kvfold.codec import Site
from kvfold.transforms.rope import Rope
from tests.cache.test_store import feed

pytestmark = pytest.mark.gpu
decode = pytest.importorskip("kvfold.kernels.triton.decode")


def case(name, heads, group, dim, dtype, chunks, rows=2, padded=True):
    generator = torch.Generator(device="cuda").manual_seed(41)
    preset, made = kvfold.get(name), []
    rope = Rope(tuple(1e4 ** (-2 * i / dim) for i in range(dim // 2)))
    for side, codec in (("key", preset.keys), ("value", preset.values)):
        site = Site(side, heads, dim, dtype=dtype, device=torch.device("cuda"), rope=rope)
        made.append(codec.bind(site, codec.example(site)))
    store, length = LayerStore(*made, Timeline(4, 64, 128)), sum(chunks)
    shape = (2, rows, heads, length, dim)
    keys, values = torch.randn(shape, device="cuda", generator=generator).to(dtype)
    valid = None
    if padded:
        valid = torch.ones(rows, length, dtype=torch.bool)
        valid[-1, :131] = False
    view = feed(store, keys, values, chunks, valid)
    q = torch.randn(rows, heads * group, chunks[-1], dim, device="cuda", generator=generator)
    return q.to(dtype), view


def check(q, view, **more):
    """Errors up to twice what rounding the output alone costs, and 1e-3."""
    reason = decode.refuses(q, view)
    if reason is not None:
        pytest.skip(reason)
    more = {"scaling": q.shape[3] ** -0.5, **more}
    wanted = oracle(q, view, **more)
    found = decode.attend(q, view, **more)
    assert torch.equal(found, decode.attend(q, view, **more))
    size = wanted.norm()
    error = float((found.float() - wanted).norm() / size)
    rounding = float((wanted.to(q.dtype).float() - wanted).norm() / size)
    assert error <= 2 * rounding + 1e-3, (error, rounding)


@pytest.mark.parametrize("name", kvfold.presets())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_code(name, dtype):
    check(*case(name, 2, 4, 128, dtype, (900, 1)))


@pytest.mark.parametrize(
    ("heads", "group", "dim", "chunks"),
    [
        (3, 3, 64, (700, 1)),
        (1, 1, 80, (330, 1)),
        (2, 8, 96, (460, 5)),
        (1, 16, 256, (460, 2)),
        (2, 4, 128, (63, 1)),
        (2, 4, 128, (4000, 8)),
    ],
)
def test_shapes(heads, group, dim, chunks):
    check(*case("fisher2", heads, group, dim, torch.bfloat16, chunks, padded=chunks[0] > 300))


def test_softcap_and_sink_logits():
    q, view = case("kivi4-g32", 2, 4, 128, torch.bfloat16, (900, 1))
    check(q, view, softcap=20.0, sink_logits=torch.randn(8, device="cuda"))


def test_a_replayed_launch_follows_the_numbers_on_the_device():
    """Recorded once with 7 pages a row, replayed with what the device says then."""
    q, view = case("fisher2", 2, 4, 128, torch.bfloat16, (1000, 1), padded=False)
    decode.attend(q, view, scaling=0.1)
    graph = torch.cuda.CUDAGraph()
    at = view.on(q.device)
    with torch.cuda.graph(graph):
        found = decode.attend(q, view, scaling=0.1)
    at.folded[1] = 3
    graph.replay()
    wanted = decode.attend(q, view, scaling=0.1)
    assert torch.equal(found, wanted)
    at.folded[1] = 7
    graph.replay()
    assert not torch.equal(found, wanted)
