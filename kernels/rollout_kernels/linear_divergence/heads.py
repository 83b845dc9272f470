"""LM heads: from hidden states to logits in the precision of the computation, and back.

Shape legend: C = tokens of a chunk, V = rows of the head that take part, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..mxfp4 import MXFP4, dequantize

_HALF = (torch.bfloat16, torch.float16)
# A piece of a head that has to be converted before it can be multiplied: elements.
_TILE_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class Head:
    """The first `vocabulary` rows of a head, which stay in their own dtype.

    Where that dtype is not the one computed in, pieces of rows are converted as they are used. On a GPU a
    half-precision head and hidden states of the same dtype are multiplied as they are; products are summed and
    returned in float32. Gradients are rounded to the head's dtype for that if it is bfloat16; float16 would lose small
    ones, so they are multiplied in float32.
    """

    weight: Tensor | MXFP4
    vocabulary: int
    dtype: torch.dtype
    """of the computation: float32 or float64"""
    as_is: bool
    """whether the weight is multiplied in its own dtype"""

    @classmethod
    def of(cls, weight: Tensor | MXFP4, vocabulary: int, dtype: torch.dtype, hidden: Tensor) -> Head:
        """For these hidden states."""
        as_is = False
        if isinstance(weight, Tensor):
            half = weight.is_cuda and weight.dtype in _HALF and weight.dtype == hidden.dtype and dtype == torch.float32
            as_is = half or weight.dtype == dtype
        return cls(weight, vocabulary, dtype, as_is)

    def logits(self, hidden_CH: Tensor, temperature: float, out_CV: Tensor) -> None:
        """out = hidden · weightᵀ / temperature."""
        if self._half:
            weight = next(self._tiles())[1]
            torch.mm(hidden_CH, weight.T, out_dtype=self.dtype, out=out_CV)
            if temperature != 1.0:
                out_CV.div_(temperature)
            return
        # Dividing hidden states is V/H times cheaper than dividing logits, and here it rounds nothing away.
        hidden_CH = hidden_CH.to(self.dtype) / temperature
        for rows, weight in self._tiles():
            torch.mm(hidden_CH, weight.T, out=out_CV[:, rows])

    def hidden_gradient(self, grad_CV: Tensor) -> Tensor:
        """grad · weight, [C, H]."""
        if self._half_gradients:
            weight = next(self._tiles())[1]
            return torch.mm(grad_CV.to(weight.dtype), weight, out_dtype=self.dtype)
        total = grad_CV.new_zeros(grad_CV.shape[0], self.weight.shape[-1])
        for rows, weight in self._tiles(as_is=not self._half):
            total.addmm_(grad_CV[:, rows], weight)
        return total

    def add_weight_gradient(self, total_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
        """total += gradᵀ · hidden, for the rows that take part."""
        if self._half_gradients and total_VH.dtype == self.dtype:
            assert isinstance(self.weight, Tensor)
            dtype = self.weight.dtype
            hidden_CH = hidden_CH.to(dtype)
            for rows in self._pieces():  # in pieces, because each product exists once more before it is added
                total_VH[rows].add_(torch.mm(grad_CV[:, rows].T.to(dtype), hidden_CH, out_dtype=self.dtype))
        else:
            total_VH[: self.vocabulary].addmm_(grad_CV.T.to(total_VH.dtype), hidden_CH.to(total_VH.dtype))

    @property
    def _half(self) -> bool:
        return self.as_is and isinstance(self.weight, Tensor) and self.weight.dtype != self.dtype

    @property
    def _half_gradients(self) -> bool:
        return self._half and isinstance(self.weight, Tensor) and self.weight.dtype == torch.bfloat16

    def _tiles(self, *, as_is: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of the head that can be multiplied as they are: one, if all of it can and may be."""
        if as_is and self.as_is and isinstance(self.weight, Tensor):
            yield slice(0, self.vocabulary), self.weight[: self.vocabulary]
            return
        for rows in self._pieces():
            if isinstance(self.weight, MXFP4):
                yield rows, dequantize(self.weight.rows(rows.start, rows.stop), self.dtype)
            else:
                yield rows, self.weight[rows].to(self.dtype)

    def _pieces(self) -> Iterator[slice]:
        step = max(1, _TILE_ELEMENTS // max(1, self.weight.shape[-1]))
        for start in range(0, self.vocabulary, step):
            yield slice(start, min(start + step, self.vocabulary))
