"""Choosing one product's biases, offsets and gains, by trial on samples of it.

The objective is the expected squared error of the finished sums, E (y − g·ŷ)², with y the exact sum, ŷ that of the
accumulator and g the gain that is best for it. Saturation, underflow and rounding all take part, each at its weight,
since ŷ is what the accumulator computes: no model of the error is needed. For a given ŷ the best g is that of least
squares, Σyŷ / Σŷ², and the error that is left is Σy² − (Σyŷ)² / Σŷ². So a candidate is known by a few sums, which add
up over batches, and every group of outputs (a channel, a head) takes the candidate that leaves the least.

Candidates lie around the *maximum rule*, by which the largest sum and the largest product of a group are just
representable: up to three powers of two above it, since partial sums may be larger than finished ones, and up to two
below, since clipping an outlier may cost less than what it takes from all others. A sum that wraps is lost, so wrapping
formats keep room for twice the largest. The first batch chooses among these;
all batches then choose between that and its neighbours.

What all groups share (the product's bias, the chunk, whether there are shifts) is chosen by their errors relative to
the mean squares of their own sums: each has the same say, and a channel that is louder than the others does not change
them. The product's bias is moved while that helps.

Where sums of chunks go to an outer level, the rule speaks of the largest sum of a chunk, and each level has its own:
its bias is above that of the chunks by as much as its sums are larger, and is moved, too, while that helps.

What a channel will be given may be larger than what it was shown: a class of which no image was seen never had the
largest logit, and a feature may not have been met at all. So the error of saturation is added that is to be expected
of a channel by what all channels show together (`Tail`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fmaq.analysis.biases import (
    bias_for,
    bias_of,
    formats_of,
    has_biases_alone,
    moved,
    outer_formats,
    placed,
    spans_of,
    stepped,
)
from fmaq.analysis.samples import ConvSample, MatrixSample, Sample, spread
from fmaq.analysis.shown import Groups, Shown, Sums, Tail
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.ops.columns import Columns

SHIFTS = (-3, -2, -1, 0, 1, 2)  # of a group's exponents, from the maximum rule
NEIGHBOURS = (-1, 0, 1)  # of what the first batch chose
ROOM = -1  # the highest shift where a sum beyond the largest wraps, and is lost: twice the largest still fits
CHANNELS = 128  # of them, the product's bias is chosen on
MOST_DISTANCE = 12  # that a bias is moved from where the largest product, or the largest sum of its level, puts it
WIDE = 5  # bits of exponent, of which an outer level needs no trial
MOST_PARTS = 64  # of a sum, that are looked at
MOST_OFFSET = 60  # 2^±offset times any ordinary weight is a float32
OUTGROWN = 4.0  # a sample whose sums are so many times the largest before starts anew
SHIFT_PAYS = 0.98  # a shift is kept if it leaves at most so much of the error


@dataclass(frozen=True)
class Fit:
    """What was chosen for a product.

    Attributes:
        accumulator: with biases; `"fp32"` where only ranges were chosen.
        offset, gain, shift: one a group; None where there is nothing to do.
        error: of the sums, as a share of their mean square.
        a_max, b_max: of the operands, see `fmaq.Policy`; None where their formats need none.
    """

    accumulator: Accumulator | str
    offset: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    error: float = 0.0
    a_max: Tensor | None = None
    b_max: Tensor | None = None


@dataclass
class Trial:
    """One product's accumulators that are compared, and what batches have shown of them.

    Attributes:
        acc: the accumulator, before the shifts.
        groups: which outputs share an offset and a gain.
        by_channel: they are channels, else heads.
        is_shared: one bias for all groups.
        offset: of each group, before the shifts.
        shifts: of the exponents, that each group (or all, if they share) chooses from.
        shown: by shift.
        tail: how large the sums may become.
        largest: magnitude of an exact sum in each group.
        beyond: how many groups have sums that no offset up to `MOST_OFFSET` fits.
        has_equal_say: each group in the gain of all; see `Shown`.
        importance: of an error of each group; None: by its own size.
        times: how many times as large as those of a chunk, and of each outer level, whole sums are, in each group.
    """

    acc: Accumulator
    groups: Groups
    by_channel: bool
    is_shared: bool
    offset: Tensor
    shifts: tuple[int, ...]
    shown: dict[int, Shown] = field(default_factory=dict)
    tail: Tail | None = None
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    beyond: int = 0
    has_equal_say: bool = False
    importance: Tensor | None = None
    times: list[Tensor] = field(default_factory=list)

    @classmethod
    def searched(
        cls,
        acc: Accumulator,
        sample: Sample,
        by_channel: bool,
        is_shared: bool,
        chunks: Sequence[int | None] = (),
        by_maximum: bool = False,
        importance: Tensor | None = None,
    ) -> Trial:
        """Around what serves a sample best.

        Args:
            acc: the accumulator whose biases are to be chosen; those it has do not matter.
            sample: of the product in the first batch.
            chunks: to choose from, or none: the accumulator's.
            by_maximum: keep to the maximum rule.
            importance: of an error of each group; None, or of other groups: by its own size.
        """
        found = [
            cls._around(replace(acc, chunk=chunk), sample, by_channel, is_shared, by_maximum, importance)
            for chunk in chunks or (acc.chunk,)
        ]
        trial = found[0]
        if len(found) > 1:
            trial = min(found, key=lambda one: one._least_error(sample))
        trial._show(sample)
        return trial

    @classmethod
    def _around(
        cls,
        acc: Accumulator,
        sample: Sample,
        by_channel: bool,
        is_shared: bool,
        by_maximum: bool,
        importance: Tensor | None,
    ) -> Trial:
        """Of one chunk, around what serves a sample best."""
        y = sample.exact()
        groups = Groups.of(sample, y, by_channel)
        shown, tail = groups.largest(y).double(), None
        largest = shown
        if by_channel and not (is_shared or by_maximum):
            tail = Tail()
            tail.add(sample, groups, y)
            largest = torch.maximum(largest, tail.largest())
        beyond = torch.where(shown > 0, largest / shown.clamp(min=1e-300), 1.0)
        spans = spans_of(acc, sample.depth)
        products = _largest_products(sample, groups)
        parts = [largest if n == sample.depth else beyond * _largest_parts(sample, groups, n, products) for n in spans]
        sums = _exponent(parts[0])
        aboves = [_above(x, sums, is_shared) for x in (products, *parts[1:])]
        top = _top_of(acc, int(sums.max()), aboves)
        wanted = top - (sums.max().expand_as(sums) if is_shared else sums)
        offset = wanted.clamp(-MOST_OFFSET, MOST_OFFSET)
        trial = cls(placed(acc, top, _distances(acc, aboves)), groups, by_channel, is_shared, offset, SHIFTS, tail=tail)
        if importance is not None and importance.shape == groups.shape and not is_shared:
            trial.importance = importance
        wraps = any(isinstance(f, FixedFormat) and f.overflow == "wrap" for f in formats_of(acc))
        trial.shifts = (0,) if by_maximum else tuple(shift for shift in SHIFTS if not wraps or shift <= ROOM)
        trial.times = [torch.where(x > 0, largest / x.clamp(min=1e-300), 1.0) for x in parts]
        if not by_maximum:
            trial.acc = trial._with_best_distances(trial.acc, sample)
            trial.offset = offset + trial._best_shift(sample)
            trial.acc = trial._with_best_distances(trial.acc, sample)
            trial.shifts = NEIGHBOURS if not wraps else tuple(shift for shift in NEIGHBOURS if shift <= 0)
        trial.largest = shown
        trial.beyond = int((offset != wanted).sum())
        return trial

    @classmethod
    def of_gains(cls, acc: Accumulator, sample: Sample, by_channel: bool) -> Trial:
        """Of an accumulator that all groups keep as it is."""
        groups = Groups.of(sample, sample.exact(), by_channel)
        offset = torch.zeros(groups.shape, dtype=torch.int32)
        trial = cls(acc, groups, by_channel, True, offset, (0,), has_equal_say=True)
        trial._show(sample)
        return trial

    @classmethod
    def of_codes(cls, acc: Accumulator, sample: Sample, by_channel: bool, chunks: Sequence[int | None]) -> Trial:
        """Of an integer engine, of which nothing but the chunk can be chosen, and the range of an outer level.

        That has room for twice the largest sum.
        """
        y = sample.exact()
        largest = float(y.abs().max()) if y.numel() else 0.0
        acc = placed(acc, math.frexp(largest)[1], None)
        candidates = [replace(acc, chunk=chunk) for chunk in chunks or (acc.chunk,)]
        best = _best(candidates, lambda one: float((y - sample.emulated(one)).double().square().sum()))
        return cls.of_gains(best, sample, by_channel)

    def _error_of(self, sample: Sample) -> Callable[[Accumulator], float]:
        """The relative error that an accumulator leaves in some channels, at the offsets as they are now."""
        y = sample.exact()
        sample, picked = some_channels(sample)
        groups, offset, importance = self.groups, self.offset, self.importance
        if picked is not None:
            y = y.index_select(sample.channel_dim, picked)
            groups = Groups.of(sample, y, self.by_channel)
            offset = offset[picked] if self.by_channel else offset
            importance = importance[picked] if self.by_channel and importance is not None else importance
        scaled = sample.scaled(offset)

        def error(acc: Accumulator) -> float:
            found = sample.finished(scaled.emulated(acc), Columns(offset))
            shown = Shown.of(groups, y, found, largest_of(acc, offset))
            return _weighed(shown.all.error(shown.inside.gain), shown.all, importance)

        return error

    def _with_best_distances(self, acc: Accumulator, sample: Sample) -> Accumulator:
        """With the bias of products, then of each outer level, moved up, or else down, while that helps.

        A sum's own bias is what the offsets are for, and an outer level of many exponents has room below anyway.
        """
        product, *outers = formats_of(acc)[1:]
        places = [1] if isinstance(product, FloatFormat) else []
        places += [
            i for i, format in enumerate(outers, 2) if isinstance(format, FloatFormat) and format.exponent < WIDE
        ]
        if not places:
            return acc
        error = self._error_of(sample)
        best, least = acc, error(acc)
        for which in places:
            before = best
            for step in (1, -1):
                for distance in range(1, MOST_DISTANCE + 1):
                    candidate = stepped(before, which, step * distance)
                    found = error(candidate)
                    if found >= least:
                        break
                    best, least = candidate, found
                if best is not before:
                    break
        return best

    def add(self, sample: Sample) -> None:
        """Take another sample into account.

        Raises:
            ValueError: it has other channels or heads.
        """
        y = sample.exact()
        groups = Groups.of(sample, y, self.by_channel)
        if groups.shape != self.groups.shape:
            raise ValueError(f"has {groups.shape} channels or heads in one call and {self.groups.shape} in another")
        self.groups = groups
        if self.tail is not None:
            self.tail.add(sample, groups, y)
        self.largest = torch.maximum(self.largest, groups.largest(y).double())
        self._show(sample)

    def is_outgrown_by(self, sample: Sample) -> bool:
        """The sums of most groups are so much larger than any before that the shifts no longer reach them."""
        y = sample.exact()
        groups = Groups.of(sample, y, self.by_channel)
        if len(self.shifts) == 1 or groups.shape != self.groups.shape:
            return False
        times = groups.largest(y).double() / self.largest.clamp(min=1e-300)
        return float(times.max() if self.is_shared else times.median()) >= OUTGROWN

    def _show(self, sample: Sample) -> None:
        for shift, found in self._shown(self.acc, sample).items():
            self.shown[shift] = self.shown[shift] + found if shift in self.shown else found

    def _shown(self, acc: Accumulator, sample: Sample) -> dict[int, Shown]:
        """What a sample shows of every shift."""
        y, scaled, shown = sample.exact(), sample.scaled(self.offset), {}
        for shift in self.shifts:
            found = sample.finished(_shifted(scaled, acc, shift), Columns(self.offset))
            shown[shift] = Shown.of(self.groups, y, found, largest_of(acc, self.offset + shift))
        return shown

    def _best_shift(self, sample: Sample) -> Tensor:
        """Of each group, or of all."""
        return torch.tensor(self.shifts)[self._errors(self._of_groups(self._shown(self.acc, sample))).argmin(0)]

    def _least_error(self, sample: Sample) -> float:
        """The relative error that the best shifts leave."""
        shown = self._of_groups(self._shown(self.acc, sample))
        return _weighed(self._errors(shown).amin(0), next(iter(shown.values())).all, self.importance)

    def _of_groups(self, shown: dict[int, Shown]) -> dict[int, Shown]:
        """What was shown by group, or of all as one if they share a bias."""
        return {shift: one.pooled(self.has_equal_say) if self.is_shared else one for shift, one in shown.items()}

    def _errors(self, shown: dict[int, Shown], has_gain: bool = True) -> Tensor:
        """(shifts, groups): the squared error that each shift leaves, and what saturation is expected to add."""
        errors = []
        for shift, one in shown.items():
            gain = one.inside.gain if has_gain else torch.ones_like(one.all.y)
            error = one.all.error(gain)
            if self.tail is not None:
                error = error + self.tail.excess(one.all, gain * self._reach(self.offset + shift))
            errors.append(error)
        return torch.stack(errors)

    def _reach(self, offset: Tensor) -> Tensor:
        """The largest sum of each group of which no level is expected to saturate.

        A whole sum of n parts is about as many times as large as one of them as the largest ones were, √n if their
        signs are random; and what n parts lose by saturation is then what the whole would, in a range so much larger.
        """
        formats = [self.acc.format, *outer_formats(self.acc)]
        reaches = [format.max * times for format, times in zip(formats, self.times, strict=True)]
        return torch.stack(reaches).amin(0) * torch.ldexp(torch.ones(offset.shape, dtype=torch.float64), -offset)

    def fit(self, has_gain: bool = True, has_shift: bool = False) -> Fit:
        """What is best so far.

        Args:
            has_gain: with gains, of each group, or one if they share a bias.
            has_shift: with shifts, where they pay.
        """
        of_groups = self._of_groups(self.shown)
        errors = self._errors(of_groups, has_gain)
        best = torch.tensor(self.shifts)[errors.argmin(0)]
        chosen = Shown.picked(of_groups, best)
        gain, shift = (chosen.inside.gain if has_gain else torch.ones_like(chosen.all.y)), None
        left = chosen.all.error(gain)
        if has_gain and has_shift:
            slope, constant = chosen.inside.line
            with_shift = chosen.all.error_of_line(slope, constant)
            before, after = (_weighed(x, chosen.all, self.importance) for x in (left, with_shift))
            if after < SHIFT_PAYS * before:
                gain, shift, left = slope, constant, with_shift
        signal = max(float(chosen.all.yy.sum()), 1e-300)
        acc, offsets = self._folded(best)
        return Fit(acc, offsets, gain if has_gain else None, shift, float(left.sum()) / signal)

    def _folded(self, best: Tensor) -> tuple[Accumulator, Tensor | None]:
        """The accumulator and the offsets; what all groups share is in the biases, where those can be chosen."""
        offset = self.offset + best
        if not has_biases_alone(self.acc):
            return self.acc, offset if bool(offset.any()) else None
        acc = moved(self.acc, int(offset.flatten().median()))
        offset = offset - (bias_of(acc.format) - bias_of(self.acc.format))
        return acc, offset if bool(offset.any()) else None


def _weighed(error: Tensor, sums: Sums, importance: Tensor | None) -> float:
    """The squared errors of groups together, each by its importance, or else by the squares of its exact sums."""
    return float((error / sums.yy.clamp(min=1e-300) if importance is None else error * importance).sum())


def some_channels(sample: Sample) -> tuple[Sample, Tensor | None]:
    """A sample with `CHANNELS` of its channels, and which those are; None: all, as there are no more or groups.

    An eighth of them are those whose largest sums are furthest beyond the usual ones.
    """
    if sample.channels <= CHANNELS or (isinstance(sample, ConvSample) and sample.groups > 1):
        return sample, None
    squares = sample.exact().movedim(sample.channel_dim, -1).double().square().flatten(0, -2)
    picked = spread(squares.amax(0) / squares.mean(0).clamp(min=1e-300), CHANNELS)
    return sample.narrowed(picked), picked


def relative_error(acc: Accumulator, sample: Sample) -> float:
    """What an accumulator, the same for all groups, leaves of the squared sums, after the best gain."""
    y = sample.exact()
    groups = Groups.of(sample, y, by_channel=True)
    largest = largest_of(acc, torch.zeros(groups.shape, dtype=torch.int32))
    shown = Shown.of(groups, y, sample.emulated(acc), largest).pooled(has_equal_say=True)
    return float(shown.all.error(shown.inside.gain) / shown.all.yy.clamp(min=1e-300))


def _shifted(sample: Sample, acc: Accumulator, shift: int) -> Tensor:
    """The sums with all offsets larger by a number: biases are, where all formats have some."""
    if has_biases_alone(acc):
        return sample.emulated(moved(acc, shift))
    everywhere = torch.tensor(shift)
    return sample.finished(sample.scaled(everywhere).emulated(acc), Columns(everywhere))


def largest_of(acc: Accumulator, offset: Tensor) -> Tensor:
    """The largest finished sum of each group, of the outermost level."""
    largest = acc.levels[-1].format.max
    return largest * torch.ldexp(torch.ones(offset.shape, dtype=torch.float64), -offset)


def _exponent(magnitudes: Tensor) -> Tensor:
    """⌊log2⌋ as int32; of a zero, the smallest there is of the others."""
    exponents = torch.frexp(magnitudes)[1] - 1
    others = exponents[magnitudes > 0]
    return torch.where(magnitudes > 0, exponents, others.min() if others.numel() else 0)


def _largest_products(sample: Sample, groups: Groups) -> Tensor:
    """A bound on the magnitude of products, in each group: the largest of each k of A times that of B."""
    if isinstance(sample, MatrixSample):
        a = sample.a.abs().amax(-2)  # (…, K)
        products = (a[..., :, None] * sample.b.abs()).amax(-2, keepdim=True)  # (…, 1, N)
        return groups.largest(products)
    return groups.largest(_largest_conv_products(sample))


def _largest_conv_products(sample: ConvSample) -> Tensor:
    x = sample.x.abs().amax((0, *range(2, sample.x.dim())))  # (C,)
    weight = sample.weight.abs().flatten(2).amax(2).unflatten(0, (sample.groups, -1))  # (groups, O/groups, C/groups)
    products = (x.reshape(sample.groups, 1, -1) * weight).amax(2).flatten()  # (O,)
    return products.reshape(1, -1, *[1] * (sample.x.dim() - 2))


def _largest_parts(sample: Sample, groups: Groups, span: int, products: Tensor) -> Tensor:
    """The largest magnitude of a sum of so many consecutive products, in each group.

    Not every part of a long sum is looked at, but that of the largest product is about as large as that.
    """
    largest = products.double()
    for part in sample.parts(span, MOST_PARTS):
        largest = torch.maximum(largest, groups.largest(part).double())
    return largest


def _above(largest: Tensor, sums: Tensor, is_shared: bool) -> int:
    """By how much the largest exponents of something are above those of the sums, in the group where that is most."""
    found = _exponent(largest)
    above = found.max() - sums.max() if is_shared else (found - sums)[largest > 0]
    return int(above.max()) if above.numel() else 0


def _top_of(acc: Accumulator, sums: int, aboves: Sequence[int]) -> int:
    """The largest exponent that sums are to have: theirs, or what fits a fixed-point format, which has no bias.

    Args:
        sums: exponent of the largest.
        aboves: by how much that of the largest product, and of the largest sum of each outer level, is above it.
    """
    limits = [
        math.frexp(format.max)[1] - 1 - beyond
        for format, beyond in zip(formats_of(acc), (0, *aboves), strict=True)
        if isinstance(format, FixedFormat)
    ]
    return min(limits, default=sums)


def _distances(acc: Accumulator, aboves: Sequence[int]) -> list[int]:
    """By how much biases are to be above the sum's, so that all that is so much above the sums is representable."""
    own, *others = formats_of(acc)
    return [bias_for(format, above) - bias_for(own, 0) for format, above in zip(others, aboves, strict=True)]


def _best(candidates: Sequence[Accumulator], error: Callable[[Accumulator], float]) -> Accumulator:
    """That of the least error; a single one is not tried."""
    return candidates[0] if len(candidates) == 1 else min(candidates, key=error)
