"""Packing: exact inverse at any widths, and the bytes that the module's docstring states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvfold.layout import Layout
from kvfold.packing import DIGITS, SECTIONS, DigitPlan


@st.composite
def plans(draw: Callable[..., Any]) -> DigitPlan:
    heads, block_len = draw(st.integers(1, 3)), draw(st.sampled_from((16, 32, 64)))
    axis = draw(st.sampled_from(("channel", "token")))
    if draw(st.booleans()):  # whole chunks of columns, and a rest
        bits, count = draw(st.integers(0, 8)), draw(st.sampled_from((5, 64, 96, 128, 256)))
        return DigitPlan.uniform(bits, heads, count, block_len, axis)
    count = draw(st.integers(1, 40))
    widths = st.lists(st.integers(0, 8), min_size=count, max_size=count).map(tuple)
    return DigitPlan(tuple(draw(widths) for _ in range(heads)), block_len, axis)


def random_codes(plan: DigitPlan, blocks: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** torch.tensor(plan.bits)[None, :, None]
    shape = (blocks, len(plan.bits), plan.block_len, len(plan.bits[0]))
    return torch.randint(0, 2**30, shape, generator=generator) % top


examples = settings(max_examples=60, derandomize=True, deadline=None)


@examples
@given(plan=plans(), blocks=st.integers(1, 2), seed=st.integers(0, 2**20))
def test_unpack_is_the_exact_inverse(plan: DigitPlan, blocks: int, seed: int) -> None:
    codes = random_codes(plan, blocks, seed)
    stored = plan.pack(codes)
    if stored:
        Layout(tuple(plan.fields())).check(stored)
        back = plan.unpack(stored)
        wrong = int((back != codes).sum())
        assert wrong == 0, f"{wrong} of {codes.numel()} codes differ"
    else:
        assert not plan.fields()
        assert codes.max() == 0, f"codes up to {codes.max()} are not stored"
    bits = sum(sum(head) for head in plan.bits) * plan.block_len
    packed = 16 * sum(words.shape[1] for words in stored.values())
    assert packed == bits, f"{packed} bits stored for {bits} bits of codes"


def naive_words(plan: DigitPlan, codes: list) -> dict[str, list[int]]:
    """One block's sections as the module's docstring words them, with Python integers."""
    stored: dict[str, list[int]] = {}
    for w in SECTIONS:
        section = []
        for h, head in enumerate(plan.bits):
            digits = []  # (rank, coordinate, shift) of this section, coarse digits first
            for coordinate, b in enumerate(head):
                left = b
                for rank, width in enumerate(DIGITS[b]):
                    left -= width
                    if width == w:
                        digits.append((rank, coordinate, left))
            digits.sort(key=lambda d: d[:2])
            count, words = len(digits), plan.block_len * w // 16
            made = [[0] * words for _ in range(count)]
            for c, (_, coordinate, shift) in enumerate(digits):
                for u in range(plan.block_len // 4):
                    for f in range(4):
                        code = codes[h][u + f * plan.block_len // 4][coordinate]
                        digit = code >> shift & (1 << w) - 1
                        made[c][u % words] |= digit << 4 * w * (u // words) + w * f
            if plan.axis == "token":
                section += [word for column in made for word in column]
            else:
                for start in range(0, count, 16):
                    chunk = made[start : start + 16]
                    section += [column[i] for i in range(words) for column in chunk]
        if section:
            stored[f"digits{w}"] = section
    return stored


@settings(max_examples=30, derandomize=True, deadline=None)
@given(plan=plans(), seed=st.integers(0, 2**20))
def test_words_lie_as_the_docstring_says(plan: DigitPlan, seed: int) -> None:
    codes = random_codes(plan, 1, seed)
    stored = plan.pack(codes)
    expected = naive_words(plan, codes[0].tolist())
    assert list(stored) == list(expected), f"{list(stored)}, expected {list(expected)}"
    for name, words in expected.items():
        found = [word & 0xFFFF for word in stored[name][0].tolist()]
        wrong = sum(a != b for a, b in zip(found, words, strict=True))
        assert wrong == 0, f"{wrong} of {len(words)} words of {name} differ"


@examples
@given(plan=plans(), seed=st.integers(0, 2**20))
def test_spread_and_gathered_fold_the_digit_weights(plan: DigitPlan, seed: int) -> None:
    codes = random_codes(plan, 2, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    heads, count = len(plan.bits), len(plan.bits[0])
    q = torch.randn(2, heads, 3, count, generator=generator, dtype=torch.float64)
    columns = plan.to_columns(codes).double()
    back = plan.from_columns(plan.to_columns(codes))
    assert torch.equal(back.long(), codes), "from_columns is no inverse"
    error = (plan.spread(q) @ columns.mT - q @ codes.double().mT).abs()
    assert float(error.max() if error.numel() else 0) < 1e-9, f"spread off by {error.max()}"
    p = torch.randn(2, heads, 3, plan.block_len, generator=generator, dtype=torch.float64)
    error = (plan.gathered(p @ columns) - p @ codes.double()).abs()
    assert float(error.max()) < 1e-9, f"gathered off by {error.max()}"


@examples
@given(plan=plans(), seed=st.integers(0, 2**20))
def test_columns_are_the_stored_digits(plan: DigitPlan, seed: int) -> None:
    codes = random_codes(plan, 2, seed)
    stored = plan.pack(codes)
    if stored:
        columns = plan.columns(stored)
        wrong = int((columns != plan.to_columns(codes)).sum())
        assert wrong == 0, f"{wrong} digits differ"
        widest = int(columns.max())
        assert widest < 16, f"a digit of {widest}"


def test_digits_of_a_code() -> None:
    for b, widths in DIGITS.items():
        assert sum(widths) == b, f"{b} bits as {widths}"
        assert list(widths) == sorted(widths, reverse=True), f"{b} bits as {widths}"
    plan = DigitPlan(((7, 3),), 16, "channel")
    codes = torch.tensor([0b1011001, 0b101]).expand(1, 1, 16, 2)
    digits = plan.to_columns(codes)[0, 0, 0].tolist()
    # 7 = 4 + 2 + 1 and 3 = 2 + 1; within a section coarse digits (3's 2-bit one) come first
    assert digits == [0b1011, 0b10, 0b00, 0b1, 0b1], f"{digits}"


def test_refuses_what_it_cannot_pack() -> None:
    with pytest.raises(ValueError, match=r"block_len \(24\) must be a multiple of 16"):
        DigitPlan.uniform(4, 1, 8, 24, "token")
    with pytest.raises(ValueError, match=r"code widths \[9\] are not possible"):
        DigitPlan.uniform(9, 1, 8, 16, "token")
