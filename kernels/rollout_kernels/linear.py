"""A linear layer whose weight stays packed.

On a CPU the weight is dequantised in tiles as it is multiplied, or once if a cache is allowed. On a GPU few rows go
through a kernel that dequantises inside the product; for many rows the weight is dequantised once and multiplied by
the vendor's library.

Shape legend: M = rows of the input (all leading dimensions), N = outputs, K = inputs.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .checks import require_device, require_dtype, require_sizes
from .gpu import has_gpu_kernels
from .mxfp4 import MXFP4, ScaleMode, dequantize, quantize

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Up to here a GPU waits for the weight rather than for arithmetic, and reading it packed wins.
FEW_ROWS = 64
_TILE_ELEMENTS = 1 << 20


class WeightCache:
    """Dequantised weights, each kept until what it was made from changes: by loading, moving or writing.

    Tensors made in inference mode do not say when they are written to: what is made from them is not kept.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Hashable, Tensor]] = {}

    def get(self, place: Hashable, packed: MXFP4, dtype: torch.dtype) -> Tensor:
        """The dequantised weight of `place`, made anew if the one that is kept is of another origin or dtype."""
        if packed.blocks.is_inference() or packed.scales.is_inference():
            self._kept.pop(place, None)
            with torch.inference_mode(False):
                return dequantize(packed, dtype)
        made_from = (packed.blocks.data_ptr(), packed.blocks._version, packed.scales._version, packed.device, dtype)
        kept = self._kept.get(place)
        if kept is None or kept[0] != made_from:
            with torch.inference_mode(False):  # or autograd would refuse it in a later training step
                kept = self._kept[place] = made_from, dequantize(packed, dtype)
        return kept[1]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for _, weight in self._kept.values())

    def clear(self) -> None:
        """Free what is kept; the next use makes it anew."""
        self._kept.clear()


class MXFP4Linear(nn.Module):
    """`nn.Linear` with an MXFP4 weight, which is constant; gradients reach the input and the bias.

    Args:
        packed: the weight, of logical shape [N, K].
        bias: [N] or None.
        cache: keep the dequantised weight after its first use: as fast as a dense layer, and larger than one.
    """

    weight_blocks: Tensor
    weight_scales: Tensor

    def __init__(self, packed: MXFP4, bias: Tensor | None = None, *, cache: bool = False) -> None:
        super().__init__()
        require_sizes("packed", packed.shape, (None, None), "the weight of a linear layer has outputs and inputs")
        self.out_features, self.in_features = packed.shape
        # Buffers named as in checkpoints, so that state dictionaries are in their layout.
        self.register_buffer("weight_blocks", packed.blocks)
        self.register_buffer("weight_scales", packed.scales)
        if bias is not None:
            require_sizes("bias", bias.shape, (packed.shape[0],), f"packed stands for {list(packed.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        self.cache = WeightCache() if cache else None

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mode: ScaleMode | str = ScaleMode.RCEIL, *, cache: bool = False, name: str = "weight"
    ) -> MXFP4Linear:
        """Quantise a dense layer. Errors are those of `quantize`."""
        return cls(quantize(linear.weight, mode, name=name), linear.bias, cache=cache)

    @property
    def packed(self) -> MXFP4:
        return MXFP4(self.weight_blocks, self.weight_scales)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], in the dtype of x.

        Raises:
            BadTensor: another last dimension, dtype or device.
        """
        return packed_linear(x, self.packed, self.bias, cache=self.cache)

    def extra_repr(self) -> str:
        bias, cache = self.bias is not None, self.cache is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, cache={cache}"


def packed_linear(
    x: Tensor, packed: MXFP4, bias: Tensor | None = None, *, cache: WeightCache | None = None, place: Hashable = 0
) -> Tensor:
    """x · dequantise(packed)ᵀ + bias, without ever holding the dequantised weight (on a CPU, or for few rows).

    Args:
        x: floating [..., K].
        packed: of logical shape [N, K].
        bias: [N], or None.
        cache: hold it after all, and use it again.
        place: the weight's name in the cache.

    Raises:
        BadTensor: x has another last dimension, dtype or device.
    """
    require_dtype("x", x, _FLOATS)
    require_sizes("x", x.shape, (*x.shape[:-1], packed.shape[-1]), f"the packed weight stands for {list(packed.shape)}")
    require_device("x", x, packed.device, "the packed weight")
    bias = None if bias is None else bias.to(x.dtype)
    if cache is not None:
        return functional.linear(x, cache.get(place, packed, x.dtype), bias)
    x_MK = x.reshape(-1, x.shape[-1])
    out: Tensor = _PackedLinear.apply(x_MK, packed)  # type: ignore[no-untyped-call]
    out = out.view(*x.shape[:-1], packed.shape[0])
    return out if bias is None else out + bias


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, packed: MXFP4) -> Tensor:
        ctx.packed = packed
        if x_MK.is_cuda and x_MK.shape[0] > FEW_ROWS:
            return torch.mm(x_MK, dequantize(packed, x_MK.dtype).T)
        if has_gpu_kernels(x_MK) and x_MK.dtype != torch.float64:  # the kernel sums in float32
            from .triton.linear import few_rows_linear

            return few_rows_linear(x_MK, packed)
        out = x_MK.new_empty(x_MK.shape[0], packed.shape[0])
        for rows, weight in _tiles(packed, x_MK.dtype):
            torch.mm(x_MK, weight.T, out=out[:, rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, None]:
        grad_MN: Tensor = grads[0]
        packed: MXFP4 = ctx.packed
        # Tiles are summed, so in float32 where the dtype is smaller: each sum would round once more.
        wide = torch.promote_types(grad_MN.dtype, torch.float32)
        total = grad_MN.new_zeros(grad_MN.shape[0], packed.shape[1], dtype=wide)
        for rows, weight in _tiles(packed, grad_MN.dtype):
            if total.dtype == grad_MN.dtype:
                total.addmm_(grad_MN[:, rows], weight)
            else:
                total += torch.mm(grad_MN[:, rows], weight)
        return total.to(grad_MN.dtype), None


def _tiles(packed: MXFP4, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    n, k = packed.shape
    step = max(1, _TILE_ELEMENTS // max(1, k))
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield slice(start, stop), dequantize(packed.rows(start, stop), dtype)
