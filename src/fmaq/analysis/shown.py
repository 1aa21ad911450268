"""What samples show of an accumulator's sums, by channel or head, and how large they may become beyond that."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fmaq.analysis.samples import Sample

PRIOR = 16.0  # sums that a channel is taken to be shown beside its own
FEW = 8.0  # sums, of which a gain is not to be trusted
TAIL = 4096  # of the largest sums are kept


@dataclass(frozen=True)
class Groups:
    """The outputs that share an offset and a gain: those of a channel, of a head, or all.

    Attributes:
        dims: dimensions of the outputs that a group extends over.
        shape: of an offset, as `Columns` takes it.
    """

    dims: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, sample: Sample, y: Tensor, by_channel: bool) -> Groups:
        """Channels where the product has a weight (`by_channel`), else heads, where it has several."""
        everything = tuple(range(y.dim()))
        if by_channel:
            channel = sample.channel_dim % y.dim()
            return cls(tuple(d for d in everything if d != channel), (y.shape[channel],))
        if sample.heads is not None and sample.heads > 1:
            return cls(tuple(d for d in everything if d != y.dim() - 3), (sample.heads, 1))
        return cls(everything, ())

    def sum(self, y: Tensor) -> Tensor:
        """Sums over the groups, in float64, of shape `shape`."""
        return y.double().sum(self.dims).reshape(self.shape)

    def largest(self, y: Tensor) -> Tensor:
        """The largest magnitudes."""
        return y.abs().amax(self.dims).reshape(self.shape)

    def spread(self, x: Tensor, y: Tensor) -> Tensor:
        """One number a group, so that it broadcasts with the outputs."""
        return x.reshape([1 if d in self.dims else size for d, size in enumerate(y.shape)])


@dataclass
class Sums:
    """Sums over some of the sampled outputs of each group, which add up over batches."""

    count: Tensor
    y: Tensor
    found: Tensor
    yy: Tensor
    y_found: Tensor
    found_found: Tensor

    @classmethod
    def of(cls, groups: Groups, y: Tensor, found: Tensor) -> Sums:
        """Of exact sums and those of an accumulator."""
        y, found = y.double(), found.double()
        of_group = y.numel() / max(1, torch.Size(groups.shape).numel())
        count = torch.full(groups.shape, of_group, dtype=torch.float64)
        return cls(count, *map(groups.sum, (y, found, y * y, y * found, found * found)))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def pooled(self, weight: Tensor | float = 1.0) -> Sums:
        """All groups as one, each at its weight."""
        return Sums(*((getattr(self, name) * weight).sum() for name in self.__dataclass_fields__))

    @classmethod
    def picked(cls, candidates: dict[int, Sums], best: Tensor) -> Sums:
        """Those of each group's best candidate."""
        found = {}
        for name in cls.__dataclass_fields__:
            value = torch.zeros(best.shape, dtype=torch.float64)
            for candidate, sums in candidates.items():
                value = torch.where(best == candidate, getattr(sums, name), value)
            found[name] = value
        return cls(**found)

    @property
    def gain(self) -> Tensor:
        """Σyŷ / Σŷ², and 1 where there is nothing to scale or it would turn a sum around.

        A group of fewer than `FEW` sums has the gain of all groups.
        """
        alone = self._gain()
        if not bool((self.count < FEW).any()):
            return alone
        return torch.where(self.count < FEW, self.pooled(_equal_say(self))._gain(), alone)

    def _gain(self) -> Tensor:
        gain = self.y_found / self.found_found.clamp(min=1e-300)
        return torch.where((self.found_found > 0) & (gain > 0), gain, 1.0)

    def error(self, gain: Tensor | float) -> Tensor:
        """Σ (y − gain·ŷ)²."""
        return (self.yy - 2 * gain * self.y_found + gain * gain * self.found_found).clamp(min=0)

    @property
    def line(self) -> tuple[Tensor, Tensor]:
        """The gain and the shift of least squares; of few sums, `gain` and no shift."""
        count = self.count.clamp(min=1)
        variance = self.found_found - self.found * self.found / count
        gain = (self.y_found - self.found * self.y / count) / variance.clamp(min=1e-300)
        gain = torch.where((variance > 0) & (gain > 0), gain, 1.0)
        shift = (self.y - gain * self.found) / count
        is_few = self.count < FEW
        return torch.where(is_few, self.gain, gain), torch.where(is_few, 0.0, shift)

    def error_of_line(self, gain: Tensor, shift: Tensor) -> Tensor:
        """Σ (y − gain·ŷ − shift)²."""
        linear = 2 * shift * (gain * self.found - self.y) + self.count * shift * shift
        return (self.error(gain) + linear).clamp(min=0)


def _equal_say(sums: Sums) -> Tensor:
    """Weights that give groups whose sums differ in size the same say; by count they are 1 on average.

    A few sums do not tell a group's size: such a group has no say, unless there are no others.
    """
    if not bool((sums.count >= FEW).any()):
        return torch.ones_like(sums.count)
    alive = (sums.yy > 0) & (sums.count >= FEW)
    weight = torch.where(alive, sums.count / torch.where(alive, sums.yy, 1.0), 0.0)
    return weight * sums.count.sum() / (weight * sums.count).sum().clamp(min=1e-300)


@dataclass
class Shown:
    """What samples show of an accumulator.

    A gain undoes the shrinkage of truncation, which all sums share, and is not to make up for saturation. So only sums
    that do not saturate have a say in it; and where an accumulator was not chosen for the product, whose partial sums
    may saturate too, each group has the same say in a gain of all, however large its sums are.

    Attributes:
        all: the sums.
        inside: those below the largest that there is.
    """

    all: Sums
    inside: Sums

    @classmethod
    def of(cls, groups: Groups, y: Tensor, found: Tensor, largest: Tensor) -> Shown:
        """Of exact sums and those of an accumulator; `largest` as the groups' shape."""
        everything = Sums.of(groups, y, found)
        saturated = found.abs() >= groups.spread(largest.to(found.dtype), found)
        if not bool(saturated.any()):
            return cls(everything, everything)
        inside = Sums.of(groups, y.masked_fill(saturated, 0), found.masked_fill(saturated, 0))
        return cls(everything, replace(inside, count=groups.sum(~saturated)))

    def __add__(self, other: Shown) -> Shown:
        return Shown(self.all + other.all, self.inside + other.inside)

    @classmethod
    def picked(cls, candidates: dict[int, Shown], best: Tensor) -> Shown:
        """That of each group's best candidate."""
        parts = ({key: getattr(one, name) for key, one in candidates.items()} for name in ("all", "inside"))
        return cls(*(Sums.picked(part, best) for part in parts))

    def pooled(self, has_equal_say: bool = False) -> Shown:
        """All groups as one."""
        return Shown(self.all.pooled(), self.inside.pooled(_equal_say(self.all) if has_equal_say else 1.0))


@dataclass
class Tail:
    """How large the sums of a channel may become, by what all channels show.

    Each channel has a size that does not depend on what was shown to it: the root mean square of its sums if its inputs
    were independent, none of them weaker than most. All channels' sums, by their sizes, are taken to be of one
    distribution, from which a channel draws as if it had been shown `PRIOR` sums more.

    Attributes:
        count: of sums, of which `sums` are the largest.
        sums: magnitudes by their channel's size, in ascending order.
        powers: the mean square of every input, one a batch.
        size: of each channel.
    """

    count: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    powers: list[Tensor] = field(default_factory=list)
    size: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.float64))

    def add(self, sample: Sample, groups: Groups, y: Tensor) -> None:
        """Take a sample into account, and its exact sums."""
        self.powers.append(sample.input_power())
        power = torch.stack(self.powers).mean(0)
        self.size = sample.output_power(power.clamp(min=float(power.median()))).sqrt()
        size = groups.spread(self.size, y)
        magnitudes = torch.where(size > 0, y.abs() / size, 0.0).flatten()
        largest = magnitudes.topk(min(TAIL, magnitudes.numel())).values
        self.sums = torch.cat([self.sums, largest]).sort().values[-TAIL:]
        self.count += y.numel()

    def largest(self) -> Tensor:
        """The magnitude of each channel that one in as many sums is expected to exceed."""
        return self.size * self.sums[-min(len(self.sums), self.size.numel())]

    def excess(self, sums: Sums, limit: Tensor) -> Tensor:
        """Σ (max(0, |sum| − limit))² as it is expected, in as many sums."""
        limit = limit / self.size.clamp(min=1e-300)
        above = self.sums.flip(0)
        count = len(above) - torch.searchsorted(self.sums, limit)
        first, second = (
            torch.cat([torch.zeros(1, dtype=torch.float64), x.cumsum(0)])[count] for x in (above, above * above)
        )
        share = (second - 2 * limit * first + limit * limit * count).clamp(min=0) / max(1, self.count)
        return sums.count * PRIOR / (PRIOR + sums.count) * self.size**2 * share
