"""One weight of all experts of a layer in 4 bits, and products with it.

bitsandbytes quantizes linear layers and leaves transformers' fused experts, parameters of three dimensions, in 16 bits;
its `replace_parameter_4bit` takes all experts of a layer out of their 4 bits for every pass, and autograd keeps them. A
`Bank` takes out some experts at a time, forward and again backward, and keeps nothing. Values and format are those of
bitsandbytes' linear layers: NF4 or FP4 in blocks, the blocks' scales in 8 bits with double quantization.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from . import CHUNK_BYTES

NESTED = 256  # scales that share one in bitsandbytes' double quantization


class Bank(nn.Module):
    """The weights ``[experts, out, in]`` of one projection. Each expert's are ``parts`` pieces of equal size along
    ``out``, quantized by themselves: gate and up, where a checkpoint has them apart.

    Args:
        dtype: of what leaves the 4 bits where nothing else is asked for.
        blocksize, quant_type, nested: bitsandbytes' settings; ``nested`` is double quantization.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor
    offset: torch.Tensor
    code: torch.Tensor

    def __init__(
        self,
        experts: int,
        outputs: int,
        inputs: int,
        parts: int,
        *,
        dtype: torch.dtype,
        device,
        blocksize: int = 64,
        quant_type: str = "nf4",
        nested: bool = True,
    ):
        super().__init__()
        self.experts, self.outputs, self.inputs, self.parts = experts, outputs, inputs, parts
        self.dtype, self.blocksize, self.quant_type, self.nested = dtype, blocksize, quant_type, nested
        size = outputs * inputs // parts
        blocks = size // blocksize
        pieces = experts * parts
        self._buffer("packed", (pieces, size // 2), torch.uint8, device)
        self._buffer("scales", (pieces, blocks), torch.uint8 if nested else torch.float32, device)
        if nested:
            self._buffer("outer", (pieces, math.ceil(blocks / NESTED)), torch.float32, device)
            self._buffer("offset", (pieces, 1), torch.float32, device)
            self._buffer("code", (256,), torch.float32, device)

    def _buffer(self, name: str, shape: tuple[int, ...], dtype, device) -> None:
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device), persistent=False)

    @staticmethod
    def holds(outputs: int, inputs: int, parts: int, blocksize: int = 64) -> bool:
        """Whether weights of this size fall into whole blocks."""
        return outputs % parts == 0 and (outputs // parts * inputs) % blocksize == 0

    # ---- in ---------------------------------------------------------------------------------------------------------

    def put(self, expert: int, part: int, weight: torch.Tensor) -> None:
        """Quantize one piece, ``[out / parts, in]`` in a floating format, on the bank's device."""
        from bitsandbytes.functional import quantize_4bit

        weight = weight.to(self.packed.device)
        if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            weight = weight.float()
        data, state = quantize_4bit(
            weight.contiguous(),
            blocksize=self.blocksize,
            compress_statistics=self.nested,
            quant_type=self.quant_type,
        )
        self.put_quantized(expert, part, data, state)

    def put_quantized(self, expert: int, part: int, data: torch.Tensor, state) -> None:
        """A piece that is in 4 bits already. ``state``: its `bitsandbytes.functional.QuantState`.

        Raises:
            ValueError: it is quantized in another way than the bank.
        """
        theirs = (state.blocksize, state.quant_type, state.nested)
        if theirs != (self.blocksize, self.quant_type, self.nested) or data.numel() != self.packed.shape[1]:
            raise ValueError(f"an expert's weights are quantized as {theirs}, others are not")
        i = expert * self.parts + part
        self.packed[i] = data.view(torch.uint8).flatten()
        self.scales[i] = state.absmax.flatten()
        if self.nested:
            self.outer[i], self.offset[i] = state.state2.absmax, state.offset
            self.code.copy_(state.state2.code)  # the same of all: it depends on the format alone

    # ---- out --------------------------------------------------------------------------------------------------------

    def dense(self, experts: slice | torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights of some experts (consecutive ones, or by number, int64 ``[n]``): ``[n, out, in]``."""
        dtype = dtype or self.dtype
        if isinstance(experts, slice):
            pieces: slice | torch.Tensor = slice(experts.start * self.parts, experts.stop * self.parts)
        else:
            pieces = (experts[:, None] * self.parts + torch.arange(self.parts, device=experts.device)).flatten()
        packed, scales = self.packed[pieces], self.scales[pieces]
        if self.nested:
            outer = self.outer[pieces].repeat_interleave(NESTED, 1)[:, : scales.shape[1]]
            scales = self.code[scales.int()] * outer + self.offset[pieces]
        known = dtype if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.float32
        shape = [len(packed) // self.parts, self.outputs, self.inputs]
        found = torch.ops.bitsandbytes.dequantize_4bit.default(
            packed.reshape(-1, 1), scales.reshape(-1), self.blocksize, self.quant_type, shape, known
        )
        return found.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.experts} experts of {self.outputs} × {self.inputs}, {self.quant_type}"


# ---- products --------------------------------------------------------------------------------------------------------


def multiply(bank: Bank, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """``rows [n, in]``, those of each expert side by side, times their expert's weight: ``[n, out]``.

    Args:
        counts: rows of each expert; rows beyond their sum belong to none and give 0.
    """
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        rows = rows.to(torch.get_autocast_dtype(kind))
    return _Product.apply(rows, bank, counts)


def multiply_few(bank: Bank, rows: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
    """The same for a few rows in any order, without asking the GPU for anything: ``experts``, int64 ``[n]``, each
    row's own. Has no gradient."""
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        rows = rows.to(torch.get_autocast_dtype(kind))
    return torch.bmm(bank.dense(experts, rows.dtype), rows[:, :, None])[:, :, 0]


class _Product(torch.autograd.Function):
    """The weights are frozen, so the backward needs nothing but them, and takes them out of their 4 bits again."""

    @staticmethod
    def forward(ctx, rows, bank, counts):
        ctx.bank, ctx.counts = bank, counts
        return _product(bank, rows, counts, forward=True)

    @staticmethod
    def backward(ctx, gradient):
        return _product(ctx.bank, gradient.contiguous(), ctx.counts, forward=False), None, None


def _product(bank: Bank, rows: torch.Tensor, counts: list[int], *, forward: bool) -> torch.Tensor:
    out = rows.new_empty(len(rows), bank.outputs if forward else bank.inputs)
    grouped = _grouped(rows, bank)
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32, device=rows.device) if grouped else None
    done = 0
    for experts, own in _chunks(bank, counts, rows):
        weights = bank.dense(experts, rows.dtype)
        weights = weights.transpose(-2, -1) if forward else weights
        end = done + sum(own)
        if ends is not None:
            out[done:end] = F.grouped_mm(rows[done:end], weights, offs=ends[experts] - done)
        else:
            place = done
            for i, n in enumerate(own):
                if n:
                    torch.mm(rows[place : place + n], weights[i], out=out[place : place + n])
                place += n
        done = end
        del weights  # before the next are made
    out[done:] = 0
    return out


def _chunks(bank: Bank, counts: list[int], rows: torch.Tensor) -> Iterator[tuple[slice, list[int]]]:
    """Consecutive experts that are taken out of their 4 bits together, and the rows of each; none without rows."""
    size = 1
    if rows.is_cuda:  # a CPU gains nothing by it
        size = max(1, CHUNK_BYTES // (bank.outputs * bank.inputs * rows.element_size()))
    for start in range(0, bank.experts, size):
        own = counts[start : start + size]
        if any(own):
            yield slice(start, start + len(own)), own


def _grouped(rows: torch.Tensor, bank: Bank) -> bool:
    """Whether one kernel multiplies all experts of a chunk: torch's own on Hopper and later; on older cards it would
    ask the GPU for every group's size, and multiply them one by one too."""
    return (
        rows.is_cuda
        and rows.dtype == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and bank.inputs % 8 == bank.outputs % 8 == 0
        and torch.cuda.get_device_capability(rows.device)[0] >= 9
    )
