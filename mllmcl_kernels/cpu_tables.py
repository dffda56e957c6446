"""Tables of numbers that let one C++ call work on a whole list of tensors.

A call brings hundreds of tensors: handing each over takes longer than looking up its address and size here, once.
"""

# n tensors, k lists

from __future__ import annotations

import operator
import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, islice, repeat

import torch
from torch import Tensor

from .checks import DTYPE, dtypes_in
from .layouts import addresses, laid_like, laid_masks, lie_alike, seen, seen_as, slices
from .masks import NONE, Mask

__all__ = ["KeptTable", "list_reason", "list_table", "look", "number_table"]

#: torch's own numbers of the dtypes
DTYPE_CODE = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}

#: lists that C++ looks at in one go
MOST_LISTS = 4


def number_table(numbers: Sequence[int]) -> Tensor:
    """int64 `[len(numbers)]`."""
    if not numbers:
        return torch.empty(0, dtype=torch.int64)
    return torch.frombuffer(_packed(numbers), dtype=torch.int64)


def _packed(numbers: Sequence[int]) -> bytearray:
    return bytearray(struct.pack(f"{len(numbers)}q", *numbers))


def list_reason(
    lists: Iterable[Sequence[Tensor]], what: str, *written: Sequence[Tensor], pairs: dict[str, tuple] | None = None
) -> str | None:
    """Why C++ kernels cannot take these lists, or None.

    A dtype they do not convert, `written` lists, `what`, that lie differently or with gaps, or lists of `pairs` whose
    dtypes differ.
    """
    dtypes = dtypes_in(*lists)
    foreign = dtypes - {torch.float32, torch.bfloat16, torch.float16}
    if foreign:
        return f"computes in float32, got {', '.join(sorted(map(str, foreign)))}"
    if len(dtypes) > 1 and pairs:
        for reason, (these, those) in pairs.items():
            if list(map(DTYPE, these)) != list(map(DTYPE, those)):
                return reason
    return None if lie_alike(*written) else f"{what} must lie in memory alike and without gaps"


def list_table(
    written: Sequence[Sequence[Tensor]], read: Sequence[Sequence[Tensor]],
    masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int],
) -> tuple[Tensor, list[Sequence[Tensor]]]:  # fmt: skip
    """What C++ has to know of k lists of tensors, which an update goes through together, and their masks.

    int64: n, whether there are masks, and of each list its dtype, or -1 where it has several; then sizes `[n]`, of each
    list addresses `[n]` and, where there are several, dtypes `[n]`; with masks their addresses, kinds, actives, numbers
    of slices and lengths of one, `[n]` each. Written lists come first; `list_reason` has seen to it that they lie alike
    and without gaps. What else lies differently is copied. The caller holds every tensor, and what comes with the
    table, until the call is done.

    Raises:
        ValueError: what memory safety needs does not hold: C++ trusts the table.
    """
    numbers, held = _list_numbers(written, read, masks, kinds, actives)
    return number_table(numbers), held


def _list_numbers(written, read, masks, kinds, actives) -> tuple[list[int], list[Sequence[Tensor]]]:
    heads = written[0]
    read, masks = [laid_like(heads, tensors) for tensors in read], laid_masks(heads, masks, kinds)
    streams, sizes = (*written, *read), list(map(Tensor.numel, heads))
    if any(list(map(Tensor.numel, tensors)) != sizes for tensors in streams[1:]):
        raise ValueError("mllmcl_cpu: tensors must be of one size at each place of the lists")
    masked = kinds.count(NONE) < len(kinds)
    head, body = [len(sizes), int(masked)], sizes
    for tensors in streams:
        body += addresses(tensors)
        if len(found := dtypes_in(tensors)) == 1:
            head.append(DTYPE_CODE[found.pop()])
        else:
            head.append(-1)
            body += map(DTYPE_CODE.__getitem__, map(DTYPE, tensors))
    if masked:
        numbers, inner = slices(heads, kinds)
        if list(map(Tensor.numel, masks)) != numbers or dtypes_in(masks) != {torch.uint8}:
            raise ValueError("mllmcl_cpu: masks must be uint8 and fit their tensors")
        body += [*addresses(masks), *kinds, *actives, *numbers, *inner]
    return head + body, [*read, masks]


def look(lists: Sequence[list[Tensor] | tuple[Tensor, ...]], masks: Sequence[Mask | None] | None) -> Tensor | None:
    """`list_table` of lists as they mostly are, without masks; None where they, or the masks, are otherwise.

    One look says what `expect_lists`, `list_reason` and `list_table` find with a dozen: tensors of one shape at each
    place, on the CPU, of one dtype in each list, lying alike and without gaps.
    """
    count = len(lists[0])
    unmasked = masks is None or (
        isinstance(masks, (list, tuple)) and len(masks) == count and all(map(operator.is_, masks, repeat(None)))
    )
    if not unmasked:
        return None
    table = torch.empty(2 + len(lists) + count * (1 + len(lists)), dtype=torch.int64)
    padded = [*lists, *[()] * (MOST_LISTS - len(lists))]
    return table if torch.ops.mllmcl_cpu.look.default(*padded, len(lists), table) else None


class KeptTable:
    """A `list_table` for calls that come again: what is written stays where it is, what is read moves.

    Making the table anew takes a call over hundreds of tensors longer than the update of a few experts.
    """

    def __init__(
        self, written: Sequence[Sequence[Tensor]], read: Sequence[Sequence[Tensor]],
        masks: Sequence[Tensor], kinds: Sequence[int], actives: Sequence[int],
    ) -> None:  # fmt: skip
        numbers, (*as_read, self._masks) = _list_numbers(written, read, masks, kinds, actives)
        count, width = numbers[0], len(written) + len(read)
        #: whether what is read was not copied
        self._renewable = all(map(operator.is_, chain(*as_read), chain(*read)))
        self._buffer = _packed(numbers)
        self.table = torch.frombuffer(self._buffer, dtype=torch.int64)
        self._written, self._seen = written, seen(written)
        self._read_as = list(map(seen_as, read))
        self._row = struct.Struct(f"{count}q")
        # addresses, and dtypes where there are several, follow the head and the sizes
        rows = [count * (2 if dtype < 0 else 1) for dtype in numbers[2 : 2 + width]]
        starts = accumulate(rows, initial=2 + width + count)
        self._starts = [8 * start for start in islice(starts, len(written), width)]

    def renew(self, read: Sequence[Sequence[Tensor]]) -> bool:
        """Write down where these tensors, which the caller holds, are; False where the table has to be made anew."""
        if not self._renewable or seen(self._written) != self._seen or list(map(seen_as, read)) != self._read_as:
            return False
        for start, tensors in zip(self._starts, read, strict=True):
            self._row.pack_into(self._buffer, start, *addresses(tensors))
        return True
