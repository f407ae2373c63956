"""Rounding to bf16 at random, with bits that depend on the element and not on which process, chunk or order has it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

PIECE = 1 << 22
"""Elements whose bits are drawn at a time: what the drawing takes is small beside the weights, also where they are not
sharded. Pieces start at multiples of it in the whole tensor."""


def round_at_random(values: Tensor, key: int, start: int = 0) -> Tensor:
    """Rounds fp32 values to one of their two bf16 neighbours; those that are bf16, infinite or NaN stay.

    The chance of rounding up is the distance to the lower neighbour. bf16 is the upper half of the bits of fp32: a
    random number below 2**16 is added to them before the lower half goes.

    Args:
        values: contiguous; elements `start`, `start` + 1, ... of the tensor that `key` stands for.
    """
    out = torch.empty(values.shape, dtype=torch.bfloat16, device=values.device)
    flat, rounded = values.view(-1), out.view(-1)
    for at, noise in _noise(key, start, flat.numel(), values.device):
        part = flat[at : at + len(noise)]
        bits = (part.view(torch.int32) + noise) & ~0xFFFF
        rounded[at : at + len(noise)] = torch.where(part.isfinite(), bits.view(torch.float32), part).bfloat16()
    return out


def _noise(key: int, start: int, count: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """Numbers below 2**16 for elements `start` to `start` + `count`, piece by piece: (position from `start`, int32)."""
    at = start
    while at < start + count:
        piece, first = divmod(at, PIECE)
        last = min(PIECE, start + count - piece * PIECE)
        counter = torch.arange(first, last, dtype=torch.int32, device=device)
        one, two = _signed(mixed(key, piece, 1)), _signed(mixed(key, piece, 2))
        yield at - start, _hash(_hash(counter.add_(one)).add_(two)).bitwise_and_(0xFFFF)
        at = piece * PIECE + last


def _hash(words: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby), in place; int32 products wrap around."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(_signed(factor))
    return words.bitwise_xor_(_shifted(words, 16))


def _shifted(words: Tensor, bits: int) -> Tensor:
    return (words >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def mixed(*numbers: int) -> int:
    """A key of 64 bits from integers, in their order (steps of SplitMix64, Steele et al. 2014)."""
    state, word = 0, (1 << 64) - 1
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) & word
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & word
        state ^= state >> 31
    return state


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    held = tensor.detach()
    return held.to_local() if isinstance(held, DTensor) else held


def first_element(tensor: Tensor) -> int:
    """The number in the whole tensor of the first element that this process holds: ranks hold as many rows each."""
    if not isinstance(tensor, DTensor):
        return 0
    rows, mesh = tensor.shape[0], tensor.device_mesh
    before = min(mesh.get_local_rank() * -(-rows // mesh.size()), rows)
    return before * (tensor.numel() // max(rows, 1))
