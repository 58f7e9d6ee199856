"""Fitted state of detectors: sums and samples that stream, merge, and are held in buffers.

A fit is any number of `update` calls; `merge` joins two fits into the fit of the whole. Memory does not grow with
the number of inputs, except that of `Bank`, which holds the inputs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

# Rows that are converted to float64 at a time: a whole data set in float64 would need its own memory again. At
# this size a product with the block still runs at full speed, and the block is smaller than a wide Gram matrix.
_BLOCK_ROWS = 512
# Rows that are added to a sample at a time: each addition rewrites the sample.
_SAMPLED_ROWS = 4096
# Columns of a sample that are reordered at a time, which bounds the memory that reordering needs.
_SAMPLED_COLUMNS = 256
# Columns of a Gram matrix that are summed at a time: enough for a product at full speed.
_PANEL_COLUMNS = 512
# Elements that, with intermediate results, fit into the cache of a core.
_CACHED_ELEMENTS = 1 << 17
# Several detectors may hold one Gram matrix each, so the limit of one is well below a machine's memory.
_MAX_GRAM_BYTES = 1 << 30
_MAX_GRAMS_BYTES = 8 << 30


class Statistic(nn.Module, ABC):
    """Buffers that summarize the inputs of a fit; empty until the first `update`."""

    #: Whether the inputs are held out of the fit of all other statistics.
    held_out: ClassVar[bool] = False

    def __init__(self, **empty: Tensor) -> None:
        super().__init__()
        for name, value in empty.items():
            self.register_buffer(name, value)
        self._empty = empty

    @property
    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""

    @property
    def width(self) -> int:
        """Width of a row; 0 before the first row, and if rows are single numbers."""
        return 0

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Add the inputs of another statistic with the same settings."""

    def require_width(self, rows: Tensor) -> None:
        """Raise a ValueError if rows have another width than earlier rows."""
        if not self.is_empty and rows.shape[1] != self.width:
            raise ValueError(f"features of width {rows.shape[1]} after features of width {self.width}")

    def validate(self) -> None:
        """Raise a ValueError if no fit could have left these buffers."""
        for name, value in self.named_buffers():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise ValueError(f"{name} is not finite")

    def reset(self) -> None:
        """Remove all inputs."""
        for name, value in self._empty.items():
            setattr(self, name, value.to(getattr(self, name).device))

    def copy_from(self, other: Self) -> None:
        """Copy the buffers of another statistic with the same settings to the device of this one."""
        for name in self._empty:
            mine = getattr(self, name)
            setattr(self, name, getattr(other, name).detach().to(mine.device, copy=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Buffers follow a change of device but not one of dtype: sums in half precision would overflow.
        for name in self._empty:
            value = getattr(self, name)
            moved = fn(value)
            setattr(self, name, moved if moved.dtype == value.dtype else value.to(moved.device))
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Shapes depend on the data, so the loaded buffers replace the empty ones of a new detector.
        for name in self._empty:
            value = state_dict.get(prefix + name)
            mine = getattr(self, name)
            if value is None:
                missing_keys.append(prefix + name)
            elif value.dtype != mine.dtype or value.ndim != mine.ndim:
                error_msgs.append(
                    f"{prefix + name} is {value.dtype} of {value.ndim} dimensions, "
                    f"expected {mine.dtype} of {mine.ndim}"
                )
            else:
                setattr(self, name, value.detach().to(mine.device, copy=True))


class Moments(Statistic):
    """Count, sum and, by default, Gram matrix of rows about a fixed point, by group.

    Sums are taken about ``shift``, by default the mean of the first block, so that the covariance does not drown
    in the square of a large mean. A Gram matrix is summed from the diagonal down, in panels of columns, which
    saves nearly half of the products of wide rows; its upper part is filled in when it is read.

    Parameters
    ----------
    gram : whether to keep a Gram matrix; without it there are only means.
    gram_per_group : whether to keep one Gram matrix per group instead of one for all.
    """

    groups: Tensor  # (G,) sorted labels
    counts: Tensor  # (G,)
    sums: Tensor  # (G, d) about shift
    gram: Tensor  # (0, d, d), (1, d, d) or (G, d, d) about shift, valid from the diagonal down
    shift: Tensor  # (d,)

    def __init__(self, *, gram: bool = True, gram_per_group: bool = False) -> None:
        f64 = torch.float64
        super().__init__(
            groups=torch.empty(0, dtype=torch.int64),
            counts=torch.empty(0, dtype=f64),
            sums=torch.empty(0, 0, dtype=f64),
            gram=torch.empty(0, 0, 0, dtype=f64),
            shift=torch.empty(0, dtype=f64),
        )
        self.has_gram = gram
        self.gram_per_group = gram_per_group

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return len(self.counts) == 0

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.sums.shape[1]

    def validate(self) -> None:
        """Raise a ValueError if no fit could have left these buffers."""
        super().validate()
        groups, width = len(self.groups), self.width
        grams = self._grams(groups)
        shapes = [tuple(t.shape) for t in (self.counts, self.sums, self.gram, self.shift)]
        if not self.is_empty and (
            shapes != [(groups,), (groups, width), (grams, width, width), (width,)] or not (self.counts > 0).all()
        ):
            raise ValueError(f"counts, sums, gram and shift of {groups} groups have the shapes {shapes}")

    @property
    def total(self) -> Tensor:
        """Number of rows."""
        return self.counts.sum()

    def update(self, rows: Tensor, labels: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Add rows (n, d) in groups by labels (n,). Default: one group."""
        self.require_width(rows)
        if len(rows) == 0:
            return
        rows = rows.to(self.gram.device)
        if labels is None:
            labels = torch.zeros(len(rows), dtype=torch.int64)
        labels = labels.to(self.gram.device, torch.int64)
        present, group = labels.unique(return_inverse=True)
        if self.is_empty:
            start = rows[:_BLOCK_ROWS].double().mean(0) if shift is None else shift.double()
            self._open(present, start)
        else:
            self._open(present, self.shift)
        position = torch.searchsorted(self.groups, present)[group]
        self.counts.index_add_(0, position, torch.ones(len(rows), dtype=torch.float64, device=rows.device))
        # All blocks share one buffer: if each were allocated and freed, several would occupy the heap at once.
        buffer = self.gram.new_empty(min(len(rows), _BLOCK_ROWS), rows.shape[1])
        for block, where in zip(rows.split(_BLOCK_ROWS), position.split(_BLOCK_ROWS), strict=True):
            centered = buffer[: len(block)].copy_(block).sub_(self.shift)
            self.sums.index_add_(0, where, centered)
            if not self.has_gram:
                continue
            if not self.gram_per_group:
                _add_products(self.gram[0], centered)
                continue
            for g in where.unique().tolist():
                _add_products(self.gram[g], centered[where == g])

    def update_unit(self, rows: Tensor, labels: Tensor | None = None, shift: Tensor | None = None) -> None:
        """Add rows, each divided by its length (`unit_rows`); otherwise as `update`."""
        row = 0
        for unit in unit_blocks(rows):
            self.update(unit, None if labels is None else labels[row : row + len(unit)], shift)
            row += len(unit)

    def merge(self, other: Self) -> None:
        """Add the rows of another."""
        if other.is_empty:
            return
        if self.is_empty:
            self.copy_from(other)
            return
        device = self.gram.device
        sums, counts, gram = (t.to(device) for t in (other.sums, other.counts, other.gram))
        delta = other.shift.to(device) - self.shift
        # z - s = (z - t) + delta, where s is this shift and t the other one.
        moved_sums = sums + counts[:, None] * delta
        groups = other.groups.to(device)
        self._open(groups, self.shift)
        position = torch.searchsorted(self.groups, groups)
        self.counts.index_add_(0, position, counts)
        self.sums.index_add_(0, position, moved_sums)
        if not self.has_gram:
            return
        parts = sums if self.gram_per_group else sums.sum(0, keepdim=True)
        sizes = counts if self.gram_per_group else counts.sum().reshape(1)
        cross = delta[None, :, None] * parts[:, None, :]
        outer = sizes[:, None, None] * (delta[:, None] * delta[None, :])
        moved_gram = gram + cross + cross.transpose(1, 2) + outer
        self.gram.index_add_(0, position if self.gram_per_group else position.new_zeros(1), moved_gram)

    def means(self) -> Tensor:
        """Return the mean of each group, (G, d)."""
        return self.shift + self.sums / self.counts[:, None]

    def mean(self) -> Tensor:
        """Return the mean of all rows, (d,)."""
        return self.shift + self.sums.sum(0) / self.total

    def second_moment(self) -> Tensor:
        """Return ``(Z - s)'(Z - s) / N`` about the shift s, (d, d)."""
        return self._whole_gram() / self.total

    def covariance(self) -> Tensor:
        """Return the biased covariance of all rows, (d, d)."""
        offset = self.sums.sum(0) / self.total
        return self.second_moment() - offset[:, None] * offset[None, :]

    def within_covariance(self) -> Tensor:
        """Return the biased covariance about each group's own mean, pooled over the groups, (d, d)."""
        scaled = self.sums / self.counts.sqrt()[:, None]
        return (self._whole_gram() - scaled.T @ scaled) / self.total

    def shrunk(self) -> tuple[Tensor, Tensor]:
        """Return means and covariance of groups that each have one more row, at the mean of all rows.

        Returns
        -------
        The means (G, d), and the biased covariance (d, d) of the given rows about the mean of their group.
        """
        means = (self.sums + self.sums.sum(0) / self.total) / (self.counts[:, None] + 1)
        cross = self.sums.T @ means
        scaled = means * self.counts.sqrt()[:, None]
        return self.shift + means, (self._whole_gram() - cross - cross.T + scaled.T @ scaled) / self.total

    def group_covariances(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the biased covariance of each group, (d, d), and its rounding error, (d,); see `rounding`."""
        for gram, total, count in zip(self.gram, self.sums, self.counts, strict=True):
            moment = _fill_in(gram / count)
            yield moment - torch.outer(total / count, total / count), _rounding(moment)

    def rounding(self) -> Tensor:
        """Return the variance of each unit, (d,), that may result from rounding of the sums alone."""
        return _rounding(self.second_moment())

    def _grams(self, groups: int) -> int:
        """Return the number of Gram matrices of some number of groups."""
        return 0 if not self.has_gram else groups if self.gram_per_group else min(groups, 1)

    def _whole_gram(self) -> Tensor:
        return _fill_in(self.gram.sum(0))

    def _open(self, labels: Tensor, shift: Tensor) -> None:
        """Allocate the groups of these labels."""
        if not self.is_empty and torch.isin(labels, self.groups).all():
            return
        width = len(shift)
        groups = torch.cat([self.groups, labels]).unique()
        grams = self._grams(len(groups))
        need = width**2 * 8
        if grams and (need > _MAX_GRAM_BYTES or grams * need > _MAX_GRAMS_BYTES):
            raise ValueError(
                f"{grams} covariance(s) of {width} x {width} need {grams * need / 2**30:.1f} GiB; "
                "use narrower features, or a detector without a covariance (KNN, NAN)"
            )
        device = self.gram.device
        position = torch.searchsorted(groups, self.groups)
        counts = torch.zeros(len(groups), dtype=torch.float64, device=device)
        sums = torch.zeros(len(groups), width, dtype=torch.float64, device=device)
        if len(position):
            counts[position] = self.counts
            sums[position] = self.sums
        if self.gram_per_group or self.is_empty:
            gram = torch.zeros(grams, width, width, dtype=torch.float64, device=device)
            if len(position):
                gram[position] = self.gram
            self.gram = gram
        self.groups, self.counts, self.sums = groups, counts, sums
        self.shift = shift.to(device, torch.float64)


class Total(Statistic):
    """Count and sum of single numbers."""

    count: Tensor
    sum: Tensor

    def __init__(self) -> None:
        super().__init__(count=torch.zeros((), dtype=torch.float64), sum=torch.zeros((), dtype=torch.float64))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return bool(self.count == 0)

    def update(self, values: Tensor) -> None:
        """Add numbers, (n,)."""
        self.count = self.count + values.numel()
        self.sum = self.sum + values.double().sum().to(self.sum.device)

    def merge(self, other: Self) -> None:
        """Add the numbers of another."""
        self.count = self.count + other.count.to(self.count.device)
        self.sum = self.sum + other.sum.to(self.sum.device)

    def mean(self) -> Tensor:
        """Return the mean, 0-d."""
        return self.sum / self.count


class RowMean(Statistic):
    """Count and sum of rows."""

    count: Tensor  # 0-d
    sum: Tensor  # (d,)

    def __init__(self) -> None:
        f64 = torch.float64
        super().__init__(count=torch.zeros((), dtype=f64), sum=torch.empty(0, dtype=f64))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return bool(self.count == 0)

    @property
    def width(self) -> int:
        """Width of a row."""
        return len(self.sum)

    def update(self, rows: Tensor) -> None:
        """Add rows, (n, d)."""
        self.require_width(rows)
        if len(rows):
            self._add(len(rows), rows.sum(0, dtype=torch.float64))

    def merge(self, other: Self) -> None:
        """Add the rows of another."""
        if not other.is_empty:
            self._add(other.count, other.sum)

    def mean(self) -> Tensor:
        """Return the mean, (d,)."""
        return self.sum / self.count

    def _add(self, count: Tensor | int, total: Tensor) -> None:
        total = total.detach().to(self.sum.device)
        self.sum = total.clone() if self.is_empty else self.sum + total
        self.count = self.count + count


class HeldOutConstants(Statistic):
    """Numbers that are computed from held-out inputs, all at once."""

    held_out = True
    values: Tensor  # (k, m)

    def __init__(self) -> None:
        super().__init__(values=torch.empty(0, 0, dtype=torch.float64))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been computed yet."""
        return self.values.numel() == 0

    def merge(self, other: Self) -> None:
        """Copy the numbers of another if there are none yet: those of two fits hold for neither data nor both."""
        if self.is_empty:
            self.copy_from(other)


class RowSample(Statistic):
    """A uniform sample of ``size`` rows, or of a share of all rows, that does not depend on their order.

    Every row has a pseudo-random key, computed from its bits, and the rows with the lowest keys are kept (a
    bottom-k sketch). So the sample of a whole is exactly the merged sample of its parts; up to ``size`` rows it is
    all of them.

    Parameters
    ----------
    size : number of rows that are kept.
    share : share of all rows that are kept even if they are more than ``size``, in expectation. Default: 0.
    """

    rows: Tensor  # (k, d) float32, by ascending key
    keys: Tensor  # (k,) in [0, 2^63)
    seen: Tensor  # 0-d

    def __init__(self, size: int, share: float = 0) -> None:
        super().__init__(
            rows=torch.empty(0, 0, dtype=torch.float32),
            keys=torch.empty(0, dtype=torch.int64),
            seen=torch.zeros((), dtype=torch.int64),
        )
        self.size = size
        self._lowest = min(math.floor(share * 2**63), 2**63 - 1)

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return len(self.keys) == 0

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.rows.shape[1]

    def validate(self) -> None:
        """Raise a ValueError if no fit could have left these buffers."""
        super().validate()
        most = min(self._kept(self.keys), int(self.seen))
        if not len(self.keys) == len(self.rows) <= most:
            raise ValueError(f"a sample has {len(self.keys)} keys for {len(self.rows)} rows of {int(self.seen)}")

    @property
    def is_complete(self) -> bool:
        """Whether the sample holds all rows."""
        return int(self.seen) == len(self.keys)

    def update(self, rows: Tensor) -> None:
        """Add rows, (n, d)."""
        self.require_width(rows)
        for block in rows.split(_SAMPLED_ROWS):
            block = block.to(self.rows.device, torch.float32).contiguous()
            self._keep(block, row_keys(block), len(block))

    def merge(self, other: Self) -> None:
        """Add the rows of another."""
        device = self.rows.device
        self._keep(other.rows.to(device), other.keys.to(device), int(other.seen))

    def _keep(self, rows: Tensor, keys: Tensor, seen: int) -> None:
        self.seen = self.seen + seen
        mine = len(self.keys)
        theirs = torch.arange(len(keys), device=keys.device)
        if mine >= self.size:
            theirs = (keys < max(int(self.keys[-1]), self._lowest)).nonzero().squeeze(1)
        if len(theirs) == 0:
            return
        keys, order = torch.cat([self.keys, keys[theirs]]).sort(stable=True)
        kept = self._kept(keys)
        indices = torch.cat([torch.arange(mine, device=keys.device), theirs + mine])[order[:kept]]
        self.keys = keys[:kept]
        if len(indices) != mine:
            self.rows = _joined_rows(self.rows, rows, indices)
            return
        parts = (table.split(_SAMPLED_COLUMNS, 1) for table in (self.rows, rows))
        for columns, others in zip(*parts, strict=True):
            columns.copy_(_joined_rows(columns, others, indices))

    def _kept(self, keys: Tensor) -> int:
        """Return the maximum number of rows to keep of those with these keys."""
        return max(self.size, int((keys < self._lowest).sum()))


class FloatHistogram(Statistic):
    """Quantiles of numbers to one part in 2^11, whatever their scale and order.

    A bin is a float32 without its last 12 bits: there are 2048 bins between two powers of two. Only bins with a
    positive count are stored.
    """

    bins: Tensor  # (m,) ascending
    counts: Tensor  # (m,)

    _DROPPED_BITS = 12
    _BINS = 1 << (32 - _DROPPED_BITS)

    def __init__(self) -> None:
        super().__init__(bins=torch.empty(0, dtype=torch.int64), counts=torch.empty(0, dtype=torch.int64))

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return len(self.bins) == 0

    def update(self, values: Tensor) -> None:
        """Add numbers of any shape."""
        flat = values.detach().to(self.bins.device, torch.float32).reshape(-1)
        for part in flat.split(1 << 24):
            bits = part.contiguous().view(torch.int32)
            # The bits of negative floats sort by descending magnitude; flipped, they sort as the floats do.
            ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) >> self._DROPPED_BITS
            counts = torch.bincount(ordered + self._BINS // 2, minlength=self._BINS)
            hit = counts.nonzero().squeeze(1)
            self._combine(hit - self._BINS // 2, counts[hit])

    def merge(self, other: Self) -> None:
        """Add the numbers of another."""
        self._combine(other.bins.to(self.bins.device), other.counts.to(self.bins.device))

    def validate(self) -> None:
        """Raise a ValueError if no fit could have left these buffers."""
        super().validate()
        if (
            len(self.bins) != len(self.counts)
            or not (self.counts > 0).all()
            or not (self.bins.diff() > 0).all()
            or (2 * self.bins.abs() > self._BINS).any()
        ):
            raise ValueError("bins must ascend, each with a positive count")

    def percentile(self, p: float) -> float:
        """Return the p-th percentile, interpolated linearly between order statistics as in numpy."""
        rank = p / 100 * (int(self.counts.sum()) - 1)
        low = math.floor(rank)
        below, above = self._order_statistic(low), self._order_statistic(math.ceil(rank))
        return below + (rank - low) * (above - below)

    def _order_statistic(self, rank: int) -> float:
        """Return the number of a given rank, as if the numbers of a bin were evenly spaced in it."""
        ends = self.counts.cumsum(0)
        i = int(torch.searchsorted(ends, rank, right=True))
        low, high = self._edge(int(self.bins[i])), self._edge(int(self.bins[i]) + 1)
        count = int(self.counts[i])
        inside = (rank - (int(ends[i]) - count) + 0.5) / count
        return low + inside * (high - low)

    def _combine(self, bins: Tensor, counts: Tensor) -> None:
        merged, position = torch.cat([self.bins, bins]).unique(return_inverse=True)
        total = torch.zeros(len(merged), dtype=torch.int64, device=merged.device)
        self.bins, self.counts = merged, total.index_add_(0, position, torch.cat([self.counts, counts]))

    def _edge(self, index: int) -> float:
        ordered = torch.tensor(index << self._DROPPED_BITS, dtype=torch.int64).to(torch.int32)
        bits = ordered if index >= 0 else ordered ^ 0x7FFFFFFF
        return float(bits.view(torch.float32))


class Bank(Statistic):
    """All rows, in the order in which they were added, as float32."""

    rows: Tensor  # (n, d)

    def __init__(self) -> None:
        super().__init__(rows=torch.empty(0, 0, dtype=torch.float32))
        self._room = self.rows  # `rows` is its beginning; the rest is spare, so that adding seldom copies

    @property
    def is_empty(self) -> bool:
        """Whether nothing has been added yet."""
        return len(self.rows) == 0

    @property
    def width(self) -> int:
        """Width of a row."""
        return self.rows.shape[1]

    def update(self, rows: Tensor, write: Callable[[Tensor, Tensor], object] | None = None) -> None:
        """Add rows (n, d), or the rows that ``write(rows, out)`` writes to the bank's memory."""
        self.require_width(rows)
        if len(rows) == 0:
            return
        start, end = len(self.rows), len(self.rows) + len(rows)
        # After a move or a load the buffer is a new one, and the spare memory is that of the old one.
        if self._room.data_ptr() != self.rows.data_ptr() or len(self._room) < end:
            room = self.rows.new_empty(max(end, start * 3 // 2), rows.shape[1])
            if start:
                room[:start] = self.rows
            self._room = room
        if write is None:
            self._room[start:end] = rows
        else:
            write(rows, self._room[start:end])
        self.rows = self._room[:end]

    def merge(self, other: Self) -> None:
        """Append the rows of another."""
        if not other.is_empty:
            self.update(other.rows)


def _joined_rows(first: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """Return the rows of two tensors, concatenated, in a given order, without a copy of both."""
    if len(first) == 0:
        return second[order]
    made = second.new_empty(len(order), second.shape[1])
    for indices, part in zip(made.split(_BLOCK_ROWS), order.split(_BLOCK_ROWS), strict=True):
        mine = part < len(first)
        indices[mine] = first[part[mine]]
        indices[~mine] = second[part[~mine] - len(first)]
    return made


def unit_rows(z: Tensor) -> Tensor:
    """Return each row divided by its length, ``z / (||z|| + 1e-10)``, in float64; a zero vector stays zero."""
    z = z.double()
    return z / _lengths(z)


def unit_blocks(z: Tensor, rows: int = _BLOCK_ROWS) -> Iterator[Tensor]:
    """Yield `unit_rows` block by block, without a gradient: all of them would need twice the memory of z.

    Each block is overwritten by the next.
    """
    buffer = z.new_empty((min(rows, len(z)), z.shape[1]), dtype=torch.float64)
    for block in z.detach().split(rows):
        unit = buffer[: len(block)].copy_(block)
        yield unit.div_(_lengths(unit))


def _lengths(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=1, keepdim=True) + 1e-10


def single_unit_rows(z: Tensor) -> Tensor:
    """Return `unit_rows` in float32."""
    unit = z.new_empty(z.shape, dtype=torch.float32)
    write_unit_rows(z, unit)
    return unit


def write_unit_rows(z: Tensor, out: Tensor) -> None:
    """Write `unit_rows` to a tensor of their shape, in its dtype."""
    # On a CPU a block fits into the caches of the cores; on a GPU few large operations are faster.
    cached = max(1, torch.get_num_threads() * _CACHED_ELEMENTS // max(z.shape[1], 1))
    rows = cached if z.device.type == "cpu" else _BLOCK_ROWS
    for unit, made in zip(unit_blocks(z, rows), out.split(rows), strict=True):
        made.copy_(unit)


def whitening(covariance: Tensor, rounding: Tensor, precision: torch.dtype = torch.float64) -> Tensor:
    """Return L of shape (d, r) with ``L L' = pinv(covariance)``.

    Directions whose variance is within ``rounding`` (0-d), or within the rounding of a ``precision`` as a share of
    the largest, carry no information and are dropped, as in the pseudo-inverse.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > torch.maximum(rounding, len(values) * torch.finfo(precision).eps * values[-1])
    return vectors[:, kept] / values[kept].sqrt()


def _add_products(gram: Tensor, rows: Tensor) -> None:
    """Add ``rows' rows`` to a Gram matrix, in panels of columns from the diagonal down."""
    for start in range(0, len(gram), _PANEL_COLUMNS):
        end = start + _PANEL_COLUMNS
        gram[start:, start:end].addmm_(rows[:, start:].T, rows[:, start:end])


def _fill_in(gram: Tensor) -> Tensor:
    """Fill in the upper part, which `_add_products` omits, in place; return the matrix."""
    for start in range(0, len(gram), _PANEL_COLUMNS):
        end = start + _PANEL_COLUMNS
        gram[start:end, end:] = gram[end:, start:end].T
    return gram


def _rounding(second_moment: Tensor) -> Tensor:
    return len(second_moment) * torch.finfo(torch.float64).eps * second_moment.diagonal()


def row_keys(rows: Tensor) -> Tensor:
    """Return a pseudo-random key in [0, 2^63) of each of the rows (n, d) float32, computed from its bits."""
    generator = torch.Generator().manual_seed(0x5EED)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=generator) | 1
    weights = weights.to(rows.device)
    rows_per_part = max(1, _CACHED_ELEMENTS // max(rows.shape[1], 1))
    keys = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    # All parts share one buffer: if each were allocated and freed, all would occupy the heap at once.
    buffer = keys.new_empty(min(rows_per_part, len(rows)), rows.shape[1])
    for part, sums in zip(rows.view(torch.int32).split(rows_per_part), keys.split(rows_per_part), strict=True):
        torch.sum(buffer[: len(part)].copy_(part).mul_(weights), 1, out=sums)
    # Multiplicative mixing, so that the high bits, which sort the keys, depend on every bit of the row. The last
    # shift copies the sign into the bits that it flips: no key is negative.
    for multiplier in (-0x61C8864680B583EB, -0x3B314601E57A13AD):
        keys = (keys ^ (keys >> 32)) * multiplier
    return keys ^ (keys >> 29)
