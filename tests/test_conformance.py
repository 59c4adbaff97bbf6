"""Every preset keeps the codec contract: bytes, appending, extremes, error, reading on codes."""

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kvfold
from kvfold.codec import (
    BoundCodec,
    Codec,
    CodecError,
    Preset,
    Query,
    Reading,
    Site,
    Total,
    codec_from_json,
)
from kvfold.transforms.rope import Rope

PRESETS = list(kvfold.presets().values())
CODED = [preset for preset in PRESETS if preset.gaussian_nmse is not None]
EXAMPLES = int(os.environ.get("KVFOLD_EXAMPLES", "25"))
SIDES = ("key", "value")
SHAPES = [(h, d) for h in (1, 2, 3, 8) for d in (64, 80, 96, 128, 256) if h * d <= 640]


def rope_of(head_dim: int) -> Rope:
    return Rope(tuple(1e4 ** (-2 * i / head_dim) for i in range(head_dim // 2)))


def bound(preset: Preset, side: Any, heads: int, head_dim: int, block_len: int = 64) -> BoundCodec:
    codec = knobs_of(preset, side)
    rope = rope_of(head_dim) if side == "key" else None
    site = Site(side, heads, head_dim, block_len, rope=rope)
    return codec.bind(site, codec.example(site))


@st.composite
def cases(draw: Callable[..., Any]) -> dict[str, Any]:
    return {
        "side": draw(st.sampled_from(SIDES)),
        # small enough that a few hundred cases take a minute
        **dict(zip(("heads", "head_dim"), draw(st.sampled_from(SHAPES)), strict=True)),
        "block_len": draw(st.sampled_from((64, 64, 128))),
        "blocks": draw(st.integers(1, 2)),
        "dtype": draw(st.sampled_from((torch.float32, torch.bfloat16, torch.float16))),
        # the codecs' own seeds are small: data never shares one
        "seed": draw(st.integers(10_000, 99_999)),
        "start": draw(st.integers(0, 30_000)),
    }


def prepare(preset: Preset, case: dict[str, Any]) -> tuple[BoundCodec, Tensor, Tensor]:
    """The bound codec, states and positions (blocks of different rows start anywhere) of a case."""
    try:
        codec = bound(preset, case["side"], case["heads"], case["head_dim"], case["block_len"])
    except CodecError as error:
        # only stated limits of a method: kivi's groups, fisher's tiles
        if "must be a multiple of" not in str(error):
            raise
        assume(False)
        raise
    generator = torch.Generator().manual_seed(case["seed"])
    shape = (case["blocks"], case["heads"], case["block_len"], case["head_dim"])
    x = torch.randn(shape, generator=generator).to(case["dtype"])
    starts = case["start"] + torch.randint(0, 1000, (case["blocks"], 1), generator=generator)
    return codec, x, starts + torch.arange(case["block_len"])


def knobs_of(preset: Preset, side: Any) -> Codec:
    return preset.keys if side == "key" else preset.values


def over(presets: list[Preset]) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("preset", presets, ids=lambda preset: preset.name)


def examples(test: Any) -> Any:
    wrapped = given(case=cases())(test)
    return settings(max_examples=EXAMPLES, derandomize=True, deadline=None)(wrapped)


class CastGuard(TorchDispatchMode):
    """Fails where a non-finite float becomes an integer or an index: on a CPU NaN turns into 0."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        source = args[1] if name == "copy_" else args[0] if args else None
        target = args[0].dtype if name == "copy_" else kwargs.get("dtype")
        casts = name in ("_to_copy", "copy_") and target is not None
        to_integer = casts and not target.is_floating_point and not target.is_complex
        to_integer = to_integer or name == "bucketize"
        if to_integer and isinstance(source, Tensor) and source.dtype.is_floating_point:
            wrong = int((~torch.isfinite(source)).sum())
            assert wrong == 0, f"{wrong} non-finite floats go into {name} to {target}"
        return func(*args, **kwargs)


# --- bytes -----------------------------------------------------------------------------------


@over(PRESETS)
@examples
def test_fields_match_the_layout_and_decode(preset: Preset, case: dict[str, Any]) -> None:
    codec, x, positions = prepare(preset, case)
    with CastGuard():
        fields = codec.encode(x, positions)
    codec.layout.check(fields)
    page = codec.layout.join(fields)
    assert page.shape == (case["blocks"], codec.layout.nbytes), f"{tuple(page.shape)}"
    back = codec.layout.split(page)
    for name, array in fields.items():
        same = array.contiguous().view(torch.uint8).equal(back[name].contiguous().view(torch.uint8))
        assert same, f"{name} changed on its way through the page"
    net = sum(f.numel() * f.element_size() for f in fields.values()) // case["blocks"]
    gross = codec.layout.nbytes
    assert net <= gross < net + 16 * len(fields), f"{net} bytes of fields, {gross} in the layout"

    decoded = codec.decode(back, positions)
    assert decoded.shape == x.shape, f"{tuple(decoded.shape)} for {tuple(x.shape)}"
    assert decoded.dtype == torch.float32, f"{decoded.dtype}"
    budget = max(preset.gaussian_nmse or (0.001, 0.001))
    error = nmse(decoded, x.float())
    assert error < 1.5 * budget, f"nmse {error:.4g} at head_dim {case['head_dim']}, {budget} at 128"


@over(PRESETS)
@examples
def test_bytes_of_a_block_depend_on_that_block_alone(preset: Preset, case: dict[str, Any]) -> None:
    codec, x, positions = prepare(preset, case)
    at_once = codec.layout.join(codec.encode(x, positions))
    for i in range(case["blocks"]):
        alone = codec.layout.join(codec.encode(x[i : i + 1].clone(), positions[i : i + 1]))
        differ = int((alone[0] != at_once[i]).sum())
        assert differ == 0, f"{differ} of {codec.layout.nbytes} bytes of block {i} differ alone"

    # beside other neighbours, and in another memory order, as a transposed cache hands it over
    among = torch.cat((x * 100.0, x[-1:], torch.zeros_like(x[:1])))
    among = among.transpose(1, 2).contiguous().transpose(1, 2)
    where = torch.cat((positions + 7, positions[-1:], positions[:1]))
    encoded = codec.layout.join(codec.encode(among, where))
    differ = int((encoded[-2] != at_once[-1]).sum())
    assert differ == 0, f"{differ} of {codec.layout.nbytes} bytes depend on neighbours or strides"
    assert not torch.equal(encoded[-1], at_once[0]), "the code ignores the states"


@over(PRESETS)
def test_bits_per_element_counts_every_byte(preset: Preset) -> None:
    for heads, dim, length in ((2, 64, 128), (8, 128, 128), (3, 64, 256)):
        stored = 0
        for side in SIDES:
            codec = bound(preset, side, heads, dim, length)
            x = torch.zeros(1, heads, length, dim)
            fields = codec.encode(x, torch.arange(length)[None])
            stored += sum(-(-f.numel() * f.element_size() // 16) * 16 for f in fields.values())
        counted = 8 * stored / (2 * heads * dim * length)
        stated = preset.bits_per_element(
            num_kv_heads=heads, head_dim=dim, block_len=length, dtype=torch.float32
        )
        assert stated == counted, f"{stated} bits stated, {counted} counted at {heads} x {dim}"


# --- extremes --------------------------------------------------------------------------------


def _huge_channel(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(77_001))
    x[..., 5] = 3000.0
    return x


def _alternating(shape: tuple[int, ...]) -> Tensor:
    return 65504.0 * (1 - 2 * (torch.arange(shape[-1]) % 2)).expand(shape).float()


def _one_zero_token(shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(77_002))
    x[:, :, 3] = 0.0
    return x


EXTREMES: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "zeros": torch.zeros,
    "negative zeros": lambda shape: -torch.zeros(shape),
    "constant": lambda shape: torch.full(shape, 0.7),
    "one zero token": _one_zero_token,
    "one huge channel": _huge_channel,
    "float16 max everywhere": lambda shape: torch.full(shape, 65504.0),
    "float16 max, alternating": _alternating,
    "float16 subnormals": lambda shape: torch.full(shape, 6e-8),
}


@over(PRESETS)
@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_extremes_stay_finite(preset: Preset, name: str, head_dim: int) -> None:
    x = EXTREMES[name]((2, 2, 64, head_dim)).to(torch.float16)
    positions = torch.arange(128).view(2, 64)
    for side in SIDES:
        try:
            codec = bound(preset, side, 2, head_dim)
        except CodecError:
            continue
        with CastGuard():
            fields = codec.encode(x, positions)
        decoded = codec.decode(fields, positions)
        wrong = int((~torch.isfinite(decoded)).sum())
        assert wrong == 0, f"{wrong} non-finite states of {decoded.numel()} ({side})"
        if not knobs_of(preset, side).keeps_zeros:
            continue
        if "zeros" in name:
            largest = decoded.abs().max().item()
            assert largest == 0, f"zeros decode to {largest} ({side})"
        elif name == "one zero token" and knobs_of(preset, side).group_len == 1:
            largest = decoded[:, :, 3].abs().max().item()
            assert largest == 0, f"a zero token decodes to {largest} ({side})"


# --- distortion ------------------------------------------------------------------------------


def nmse(decoded: Tensor, x: Tensor) -> float:
    return ((decoded - x).square().mean() / x.square().mean()).item()


@over(CODED)
@pytest.mark.parametrize("side", SIDES)
def test_distortion_both_ways(preset: Preset, side: Any) -> None:
    codec = bound(preset, side, 2, 128, 128)
    x = torch.randn(4, 2, 128, 128, generator=torch.Generator().manual_seed(4711))
    positions = torch.arange(512).view(4, 128)
    error = nmse(codec.decode(codec.encode(x, positions), positions), x)
    assert preset.gaussian_nmse is not None
    budget = preset.gaussian_nmse[side == "value"]
    assert 0.5 * budget < error < budget, f"nmse {error:.4g}, budget {budget} ({side})"


# --- reading on codes ------------------------------------------------------------------------


def naive_scores(reading: Reading, query: Query) -> Tensor:
    """score(q, n) = g_n (q_page . y_n + q_gain) + o_n q_offset + mean_n for each group, float64."""
    y = reading.columns.double()
    pages, heads, length, width = y.shape
    g = torch.ones(pages, heads, length, 1) if reading.gain is None else reading.gain
    o = torch.zeros(pages, heads, length, 1) if reading.offset is None else reading.offset
    groups, segments = g.shape[-1], query.columns.shape[2]
    queries = query.columns.shape[3]
    scores = torch.zeros(pages, heads, queries, length, dtype=torch.float64)
    for s in range(segments):
        tokens = slice(s * length // segments, (s + 1) * length // segments)
        for k in range(groups):
            run = slice(k * width // groups, (k + 1) * width // groups)
            part = query.columns[:, :, s, :, run].double() @ y[:, :, tokens, run].mT
            if query.gain is not None:
                part = part + query.gain[:, :, s, :, k : k + 1]
            scores[..., tokens] += g[:, :, tokens, k].double()[:, :, None] * part
    if query.offset is not None:
        scores += query.offset.double() @ o.double().mT
    if query.mean is not None:
        scores += query.mean
    return scores


def naive_total(reading: Reading, p: Tensor) -> Total:
    """Sums over tokens of p g y, p g, p o, p; p `[pages, heads, queries, block_len]` (float64)."""
    y = reading.columns.double()
    pages, heads, length, width = y.shape
    g = torch.ones(pages, heads, length, 1) if reading.gain is None else reading.gain
    o = torch.zeros(pages, heads, length, 1) if reading.offset is None else reading.offset
    g, o = g.double(), o.double()
    scaled = y * g.repeat_interleave(width // g.shape[-1], -1)
    sums = (p @ scaled, p @ g, p @ o, p.sum(-1, keepdim=True))
    return Total(*(s.sum(0, keepdim=True).float() for s in sums))


@over(PRESETS)
@examples
def test_scores_on_codes_equal_scores_on_decoded_keys(preset: Preset, case: dict) -> None:
    codec, x, positions = prepare(preset, case | {"side": "key"})
    fields = codec.encode(x * 1.7 + 0.3, positions)
    q = torch.randn(
        1, case["heads"], 5, case["head_dim"], generator=torch.Generator().manual_seed(31_337)
    )
    expected = q.double() @ codec.decode(fields, positions).double().mT
    found = naive_scores(codec.read(fields, positions), codec.query(q, fields, positions))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"scores differ by {error:.3g} of the largest"


@over(PRESETS)
@examples
def test_sums_on_codes_equal_sums_of_decoded_values(preset: Preset, case: dict) -> None:
    codec, x, positions = prepare(preset, case | {"side": "value"})
    fields = codec.encode(x * 1.7 + 0.3, positions)
    p = torch.rand(
        *x.shape[:2], 5, case["block_len"], generator=torch.Generator().manual_seed(31_338)
    ).double()
    expected = (p @ codec.decode(fields, positions).double()).sum(0, keepdim=True)
    found = codec.output(naive_total(codec.read(fields, positions), p))
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"outputs differ by {error:.3g} of the largest"


@over(PRESETS)
def test_output_is_linear_over_splits(preset: Preset) -> None:
    """Totals of two halves of the pages add up: splits merge in code space."""
    codec = bound(preset, "value", 2, 64)
    generator = torch.Generator().manual_seed(50_003)
    x = torch.randn(2, 2, 64, 64, generator=generator)
    p = torch.rand(2, 2, 3, 64, generator=generator).double()
    positions = torch.arange(128).view(2, 64)
    fields = codec.encode(x, positions)
    both = codec.output(naive_total(codec.read(fields, positions), p))
    halves = []
    for i in range(2):
        half = {name: f[i : i + 1] for name, f in fields.items()}
        halves.append(naive_total(codec.read(half, positions[i : i + 1]), p[i : i + 1]))
    merged = Total(
        *(getattr(halves[0], n) + getattr(halves[1], n) for n in Total.__dataclass_fields__)
    )
    error = (codec.output(merged) - both).abs().max().item()
    assert error < 1e-3, f"merged splits differ by {error:.3g}"


# --- the object ------------------------------------------------------------------------------


@over(PRESETS)
def test_survives_json(preset: Preset) -> None:
    for codec in (preset.keys, preset.values):
        back = codec_from_json(json.loads(json.dumps(codec.to_json())))
        assert back == codec, f"{back} from {codec}"
        assert hash(back) == hash(codec)
        assert type(codec).__name__ in repr(codec)


@over(PRESETS)
def test_states_its_paper_and_summary(preset: Preset) -> None:
    assert preset.summary, f"{preset.name} has no summary"
    assert preset.gaussian_nmse is None or preset.keys.paper, f"{preset.name} names no paper"


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(CodecError, match=r"unknown preset 'kivi3'.*known presets: .*kivi2-g32"):
        kvfold.get("kivi3")
    with pytest.raises(CodecError, match=r"unknown codec 'nope'; known codecs: .*kivi"):
        codec_from_json({"codec": "nope"})
    with pytest.raises(CodecError, match="has no knobs \\['speed'\\]"):
        codec_from_json({**kvfold.get("int8").keys.to_json(), "speed": 9})
    with pytest.raises(CodecError, match="written as version 99"):
        codec_from_json({**kvfold.get("int8").keys.to_json(), "version": 99})


@over(PRESETS)
def test_bytes_do_not_depend_on_the_number_of_threads(preset: Preset) -> None:
    x = torch.randn(5, 6, 128, 64, generator=torch.Generator().manual_seed(60_007))
    positions = torch.arange(5 * 128).view(5, 128)
    threads, pages = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            codecs = [bound(preset, side, 6, 64, 128) for side in SIDES]
            pages.append([c.layout.join(c.encode(x, positions)) for c in codecs])
    finally:
        torch.set_num_threads(threads)
    for side, one, three in zip(SIDES, *pages, strict=True):
        assert torch.equal(one, three), f"{int((one != three).sum())} bytes differ ({side})"
