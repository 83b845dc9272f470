"""MXFP4 against torchao, ml_dtypes and transformers, bit for bit, and against exact arithmetic."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout_kernels import e2m1, packing
from rollout_kernels.errors import BadTensor
from rollout_kernels.mxfp4 import MXFP4, ScaleMode, dequantize, quantize

MODES = [mode.value for mode in ScaleMode]


def bits(tensor: Tensor) -> Tensor:
    """Compare bit patterns, so that −0 differs from 0 and NaN equals NaN."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ordinary(seed: int) -> Tensor:
    return torch.randn(256, 512, generator=generator(seed)) * 0.02


def every_magnitude(seed: int) -> Tensor:
    """Float32 from the smallest subnormal to almost the largest number, a scale for each row."""
    g = generator(seed)
    exponent = torch.randint(-149, 127, (512, 1), generator=g).double()
    values = torch.randn(512, 256, generator=g).double() * torch.exp2(exponent)
    return values.clamp(-3.4e38, 3.4e38).float()


def mixed_in_block(seed: int) -> Tensor:
    """Each element has its own power of two: most of a block is far below its scale."""
    g = generator(seed)
    values = torch.exp2(torch.randint(-149, 128, (512, 256), generator=g).double()).float()
    return torch.where(torch.rand(512, 256, generator=g) < 0.5, -values, values)


def tie_grid() -> Tensor:
    """Every tie between two codes and its two neighbours in float32, at many scales, under every possible maximum."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    grid = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(0.0))])
    grid = torch.cat([grid, -grid])
    rows = []
    for top in (3.0, 3.5, 4.0, 5.0, 6.0, 6.5, 7.0, 7.5, 7.99):
        for k in range(-130, 120, 5):
            row = torch.zeros(64)
            row[: len(grid) // 2], row[32 : 32 + len(grid) // 2] = grid[::2], grid[1::2]
            row[31] = row[63] = top
            rows.append(torch.ldexp(row.double(), torch.tensor(k)).float())
    return torch.stack(rows)


def zeros_and_signs() -> Tensor:
    x = torch.zeros(4, 64)
    x[1] = -0.0
    x[2, ::2] = -0.0
    x[3, 0] = -1e-45
    return x


INPUTS = {
    "ordinary": ordinary(0),
    "every_magnitude": every_magnitude(1),
    "mixed_in_block": mixed_in_block(2),
    "tie_grid": tie_grid(),
    "zeros_and_signs": zeros_and_signs(),
    "subnormal": every_magnitude(3) * 2.0**-120,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_equal_torchao(torchao_quantize, name: str, mode: str, dtype: torch.dtype) -> None:
    weight = INPUTS[name].clamp(-3e38, 3e38).to(dtype)
    blocks, scales = torchao_quantize(weight, mode)
    packed = quantize(weight, mode)
    torch.testing.assert_close(packed.scales, scales, rtol=0, atol=0)
    torch.testing.assert_close(packed.blocks, blocks, rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_every_bfloat16_maximum_equals_torchao(torchao_quantize, mode: str) -> None:
    finite = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    weight = torch.zeros(len(finite), 32, dtype=torch.bfloat16)
    weight[:, 7], weight[:, 8] = finite, -finite / 3
    blocks, scales = torchao_quantize(weight, mode)
    packed = quantize(weight, mode)
    assert torch.equal(packed.scales, scales)
    assert torch.equal(packed.blocks, blocks)


@pytest.mark.parametrize("mode", MODES)
def test_scales_equal_the_definition_on_every_bfloat16_maximum(mode: str) -> None:
    finite = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    weight = torch.zeros(len(finite), 32, dtype=torch.bfloat16)
    weight[:, 0] = finite

    def exponent(amax: float) -> int:
        fraction, e = math.frexp(amax)  # amax = fraction * 2^e, fraction in [0.5, 1)
        if mode == "floor":
            return e - 1 - 2
        if mode == "ceil":
            return (e - 1 if fraction == 0.5 else e) - 2
        if mode == "even":
            return (e if fraction >= 0.875 else e - 1) - 2
        fraction, e = math.frexp(float(np.float32(amax) / np.float32(6)))
        return e - 1 if fraction == 0.5 else e

    normal = [i for i, v in enumerate(finite.tolist()) if v >= 2.0**-125]  # below, byte 0 or rounding in the subnormals
    expected = torch.tensor([max(exponent(finite[i].item()) + 127, 0) for i in normal], dtype=torch.uint8)
    assert torch.equal(quantize(weight[normal], mode).scales[:, 0], expected)


def test_elements_equal_ml_dtypes() -> None:
    every_bf16 = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.cat(
        [every_bf16[~every_bf16.isnan()], tie_grid().flatten().clamp(-1e30, 1e30), ordinary(5).flatten() * 100]
    )
    with np.errstate(over="ignore"):
        expected = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 0xF
    np.testing.assert_array_equal(e2m1.encode(values).numpy(), expected)


def test_decode_equals_ml_dtypes_on_all_codes() -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = e2m1.decode(torch.from_numpy(codes))
    np.testing.assert_array_equal(got.view(torch.int32).numpy(), expected.view(np.int32))


def all_codes_and_scales() -> MXFP4:
    """256 rows, one for each scale byte; each holds all 16 codes twice, in both nibbles."""
    codes = torch.cat([torch.arange(16), torch.arange(16).flip(0)]).to(torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.int32).to(torch.uint8).unsqueeze(-1)
    return MXFP4(packing.pack(codes).unsqueeze(1), scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_all_codes_at_all_scales_dequantise_exactly(dtype: torch.dtype) -> None:
    packed = all_codes_and_scales()
    got = dequantize(packed, dtype)
    codes = packing.unpack(packed.blocks).view(256, 32)
    for byte in range(255):
        exact = torch.tensor(
            [math.ldexp(e2m1.VALUES[c], byte - 127) for c in codes[byte].tolist()], dtype=torch.float64
        )
        assert torch.equal(bits(got[byte]), bits(exact.to(dtype))), byte
    assert got[255].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_codes_at_all_scales_equal_transformers(transformers_dequantize, dtype: torch.dtype) -> None:
    packed = all_codes_and_scales().rows(0, 255)  # byte 255 is NaN here and infinity there
    theirs = transformers_dequantize(packed.blocks, packed.scales, dtype)
    assert torch.equal(bits(dequantize(packed, dtype)), bits(theirs))


def test_float16_rounds_once_and_byte_extremes() -> None:
    packed = all_codes_and_scales()
    exact = dequantize(packed, torch.float64)
    assert torch.equal(bits(dequantize(packed.rows(0, 255), torch.float16)), bits(exact[:255].to(torch.float16)))
    ones = MXFP4(torch.full((1, 1, 16), 0x22, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert dequantize(ones, torch.float32)[0, 0].item() == 2.0**-127


def test_zero_blocks_get_scale_byte_0_and_keep_signs() -> None:
    for mode in MODES:
        packed = quantize(zeros_and_signs()[:3], mode)
        assert not packed.scales.any()
        restored = dequantize(packed, torch.float32)
        assert torch.equal(bits(restored), bits(zeros_and_signs()[:3]))


def test_rceil_never_saturates_and_floor_does() -> None:
    weight = ordinary(9)
    top = weight.unflatten(-1, (-1, 32)).abs().amax(-1)
    for mode, saturates in (("rceil", False), ("floor", True)):
        scale = torch.exp2(quantize(weight, mode).scales.float() - 127)
        assert bool((top > 6 * scale).any()) is saturates


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32),
    st.sampled_from(MODES),
)
def test_each_element_takes_the_nearest_code(values: list[float], mode: str) -> None:
    weight = torch.tensor(values, dtype=torch.float32)
    packed = quantize(weight, mode)
    byte = int(packed.scales[0])
    if byte == 0:  # documented exception
        return
    codes = packing.unpack(packed.blocks).flatten().tolist()
    for value, code in zip(weight.tolist(), codes):
        scaled = math.ldexp(value, 127 - byte)
        distances = [abs(abs(scaled) - m) for m in e2m1.MAGNITUDES]
        assert distances[code & 7] == min(distances)
        assert (code >= 8) == (math.copysign(1.0, value) < 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(MODES))
def test_quantising_what_was_dequantised_changes_nothing(seed: int, mode: str) -> None:
    once = dequantize(quantize(torch.randn(8, 64, generator=generator(seed)), mode), torch.float32)
    assert torch.equal(bits(dequantize(quantize(once, mode), torch.float32)), bits(once))


@pytest.mark.parametrize("mode", MODES)
def test_which_packed_values_quantising_again_keeps(mode: str) -> None:
    """Every scale byte whose values are finite, every largest element, beside it each smaller one of both signs."""
    top = torch.arange(1, 8)
    codes = torch.minimum(torch.arange(16).repeat(2) & 7, top[:, None]) | (torch.arange(16).repeat(2) & 8)
    bytes_ = torch.arange(253)
    codes, tops = codes.repeat(253, 1), top.repeat(253)
    scales = bytes_.repeat_interleave(7).to(torch.uint8)
    once = dequantize(MXFP4(packing.pack(codes.to(torch.uint8)).unsqueeze(1), scales[:, None]), torch.float32)
    again = dequantize(quantize(once, mode), torch.float32)
    kept = (bits(once) == bits(again)).all(-1)
    large = once.abs().amax(-1) >= 2.0**-124
    if mode == "ceil":
        assert kept[large & (tops < 7)].all()
        six = large & (tops == 7)
        lost = (once[six] != again[six]).any(0)
        magnitude = torch.tensor(e2m1.MAGNITUDES)[codes[-1] & 7]
        assert torch.equal(lost, (magnitude == 0.5) | (magnitude == 1.5))
        assert not kept[six].any()
    else:
        assert kept[large].all()
        assert not kept[~large].any()
        assert torch.equal(again[~large], torch.zeros(()) * once[~large] if mode == "rceil" else halved(once[~large]))


def halved(values: Tensor) -> Tensor:
    """What is rounded against 2^−126 and stands for as many 2^−127."""
    codes = e2m1.encode((values.double() * 2.0**126).float())
    return (e2m1.decode(codes, torch.float64) * 2.0**-127).float()


@pytest.mark.parametrize("mode", MODES)
def test_the_largest_numbers_round_to_infinity_except_in_floor_mode(mode: str) -> None:
    first = 3.5 * 2.0**126
    below = torch.tensor(first).nextafter(torch.tensor(0.0)).item()
    found = [dequantize(quantize(torch.full((32,), v), mode), torch.float32)[0].item() for v in (below, first, 3.4e38)]
    assert math.isfinite(found[0])
    assert [math.isinf(v) for v in found[1:]] == [mode != "floor"] * 2
    exact = dequantize(quantize(torch.full((32,), 3.4e38), mode), torch.float64)[0].item()
    assert exact == (6 * 2.0**125 if mode == "floor" else 2.0**128)


def test_strides_leading_dimensions_and_empty() -> None:
    weight = torch.randn(64, 96, generator=generator(4))
    transposed = weight.T.contiguous().T  # same values, other strides
    assert not transposed.is_contiguous()
    assert torch.equal(quantize(transposed).blocks, quantize(weight).blocks)
    stack = weight.view(2, 2, 16, 96)
    assert quantize(stack).shape == (2, 2, 16, 96)
    assert torch.equal(dequantize(quantize(stack)), dequantize(quantize(weight)).view(2, 2, 16, 96))
    assert dequantize(quantize(torch.empty(0, 64))).shape == (0, 64)
    one_row = quantize(weight).rows(3, 4)
    assert torch.equal(dequantize(one_row), dequantize(quantize(weight))[3:4])


def test_large_inputs_are_converted_in_pieces() -> None:
    weight = torch.randn(1, 32 * 9000, generator=generator(8))  # more than two pieces, the last one short
    whole = quantize(weight)
    pieces = [quantize(part) for part in weight.split(32 * 7, dim=-1)]
    assert torch.equal(whole.blocks, torch.cat([p.blocks for p in pieces], dim=1))
    assert torch.equal(dequantize(whole), torch.cat([dequantize(p) for p in pieces], dim=1))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_an_error_that_says_where(value: float) -> None:
    weight = torch.zeros(3, 4, 64)
    weight[1, 2, 33], weight[2, 0, 0] = value, value
    with pytest.raises(
        BadTensor, match=r"q_proj \(shape \[3, 4, 64\], float32, on cpu\) holds -?(inf|nan) at index \[1, 2, 33\]"
    ):
        quantize(weight, name="q_proj")


def test_finite_values_whose_sum_overflows_are_accepted() -> None:
    assert quantize(torch.full((2, 64), 3e38)).scales.unique().item() == 253


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 40), r"w \(shape \[4, 40\].* not a multiple of 32"),
        (torch.tensor(1.0), "not a multiple of 32"),
        (torch.zeros(4, 32, dtype=torch.float64), r"w .*float64.*float32, bfloat16, float16"),
        (torch.zeros(4, 32, dtype=torch.int64), "dtype"),
    ],
)
def test_bad_weights_are_refused(weight: Tensor, message: str) -> None:
    with pytest.raises(BadTensor, match=message):
        quantize(weight, name="w")


def test_bad_packed_tensors_are_refused() -> None:
    blocks, scales = torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(BadTensor, match=r"blocks has shape \[2, 3, 16\].*scales has shape \[2, 4\]"):
        MXFP4(blocks, torch.zeros(2, 4, dtype=torch.uint8))
    with pytest.raises(BadTensor, match=r"scales .*int32"):
        MXFP4(blocks, scales.int())
    with pytest.raises(BadTensor, match="int32"):
        dequantize(MXFP4(blocks, scales), torch.int32)
    with pytest.raises(ValueError, match="nearest"):
        quantize(torch.zeros(1, 32), "nearest")
