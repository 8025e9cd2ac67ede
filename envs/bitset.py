"""Sets of small non-negative integers as rows of 62-bit words, so that a batch of sets is one tensor.

A set over 0..capacity-1 is ``n_words`` int64 values; bit ``q % 62`` of word ``q // 62`` says that q is
a member. Two bits of every word stay zero, which keeps arithmetic shifts of int64 exact.
"""

import torch
from torch import Tensor

WORD = 62
_FULL = (1 << WORD) - 1


def n_words(capacity: int) -> int:
    """Return how many words hold a set over 0..capacity-1."""
    return -(-capacity // WORD)


def singleton(value: int, words: int) -> Tensor:
    """Return the set {value}: (words,) int64."""
    out = torch.zeros(words, dtype=torch.int64)
    out[value // WORD] = 1 << (value % WORD)
    return out


def add(sets: Tensor, amount: Tensor) -> Tensor:
    """Add ``amount`` to every member; members that leave the range are dropped.

    Args:
        sets: (..., words) int64.
        amount: (...) int64 ≥ 0, broadcast against the leading shape of ``sets``.

    Returns:
        (..., words) int64.
    """
    words = sets.shape[-1]
    if words == 1:
        return (sets << amount.unsqueeze(-1).clamp(max=WORD)).bitwise_and_(_FULL)
    return _shift_words(sets, amount // WORD, amount % WORD)


def subtract(sets: Tensor, amount: Tensor) -> Tensor:
    """Subtract ``amount`` from every member; members that would be negative are dropped (shapes as ``add``)."""
    words = sets.shape[-1]
    if words == 1:
        return sets >> amount.unsqueeze(-1).clamp(max=WORD)
    # Subtracting d is adding (62 - d % 62) one word further down.
    remainder = amount % WORD
    return _shift_words(sets, -(amount // WORD) - 1, WORD - remainder)


def _shift_words(sets: Tensor, word_shift: Tensor, bit_shift: Tensor) -> Tensor:
    """Move members up by 62·word_shift + bit_shift, with bit_shift in 0..62 and word_shift of any sign."""
    words = sets.shape[-1]
    shape = torch.broadcast_shapes(sets.shape[:-1], word_shift.shape)
    padded = torch.nn.functional.pad(sets, (words + 1, words + 1)).expand(*shape, 3 * words + 2)
    # Word j takes its upper bits from word j - word_shift and its lower ones from the word below that.
    source = torch.arange(words, 2 * words + 1, device=sets.device) - word_shift.clamp(-words - 1, words).unsqueeze(-1)
    window = padded.gather(-1, source.expand(*shape, words + 1))
    bit_shift = bit_shift.unsqueeze(-1)
    upper = (window[..., 1:] << bit_shift).bitwise_and_(_FULL)
    return upper.bitwise_or_(window[..., :-1] >> (WORD - bit_shift))


def members(sets: Tensor) -> Tensor:
    """Return (..., 62·words) bool, True where the integer is a member."""
    bits = torch.arange(WORD, device=sets.device)
    return ((sets.unsqueeze(-1) >> bits) & 1).flatten(-2).bool()


def pack(member: Tensor) -> Tensor:
    """Return the sets (..., words) int64 of a membership table (..., capacity) bool."""
    capacity = member.shape[-1]
    words = n_words(capacity)
    bits = torch.nn.functional.pad(member.long(), (0, words * WORD - capacity)).unflatten(-1, (words, WORD))
    return (bits << torch.arange(WORD, device=member.device)).sum(dim=-1)
