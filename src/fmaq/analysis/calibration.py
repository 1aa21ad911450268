"""Choosing biases, offsets and gains for a model from a few batches: `calibrate`.

A product is calibrated when the model calls it, on the operands that it is given then: what comes before is emulated
already, with what has been chosen for it. So one emulated pass over the batches does it, and later layers are fitted to
what earlier ones really give them. What is chosen, and by which objective: see `fit`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from fmaq.analysis import ranks, warned
from fmaq.analysis.batches import call, inputs_of
from fmaq.analysis.biases import bias_for, biases_of, distances_of, placed, top_of, with_biases
from fmaq.analysis.fit import SHIFTS, Fit, Trial, relative_error, some_channels
from fmaq.analysis.fitted import as_vector, fitted, ruled, template_of
from fmaq.analysis.importance import gradients
from fmaq.analysis.met import Met
from fmaq.analysis.operand_ranges import larger_ranges, largest_of_operands
from fmaq.analysis.samples import MatrixSample, Sample, is_finite, joined, sample
from fmaq.emulation.attach import attached
from fmaq.emulation.coverage import undisturbed
from fmaq.emulation.operands import formats_of, sums_codes
from fmaq.emulation.policy import Policy
from fmaq.emulation.products import Place, Request, choosing
from fmaq.emulation.rule import FP32, Rule
from fmaq.numerics import Accumulator, FloatFormat

Per = Literal["model", "layer", "channel", "token"]
Ranges = Literal["static", "dynamic", "given"]
ROWS = 48  # outputs of a channel that are sampled of a product, a batch
ENOUGH = 24  # to choose ranges by; of fewer, ranges are chosen anew with each batch
COMPARED = 64  # elements of a weight, to see whether it is the same one in another call
STEPS = 1 << 22  # or as many as have so many steps, where that is more


def calibrate(
    model: nn.Module,
    policy: Policy | Accumulator | str | Mapping[str, Any],
    batches: Iterable[Any],
    per: Per = "channel",
    *,
    rule: Literal["trial", "maximum"] = "trial",
    gain: bool = True,
    shift: bool = True,
    chunks: Sequence[int | None] = (),
    ranges: Ranges = "static",
    importance: Callable[[Any], Tensor] | None = None,
    together: bool = True,
) -> Policy:
    """A policy whose accumulators fit the sums of a model: biases, and by channel offsets, gains and shifts.

    The biases of the policy's accumulators, if they have any, are chosen anew; `"M7E4 product=M7E4"` does without. Of
    fixed-point accumulators only offsets and gains are chosen, and of integer engines (`"I16f0"` with integer operands)
    none: their sums are those of codes. The operands' formats get static ranges: what is beyond the largest magnitude
    that the batches show saturates, and no result depends on what else is in its batch. Layers that the policy leaves
    alone stay alone. The model is run without gradients, in the mode (train or eval) that it is in, and afterwards is
    attached, or not, as it was before, with its buffers and torch's random state.

    What the policy says of layers and products that no batch reaches stays as written; formats of theirs that lack a
    bias are given the one usual among the others, and a `CalibrationWarning` names them.

    Args:
        model: any module.
        policy: a `Policy`, or what `Policy.parse` takes.
        batches: of inputs: a tensor, a tuple of arguments, or a mapping of keyword arguments each. One pass is made.
            Of a data loader's (inputs, labels), the labels are left out where forward has no parameter for them, with a
            warning; where they would be given to an optional one, it is an error.
        per: what has a bias of its own. "model": one for all products. "layer": each product. "channel": each output
            channel (an offset of the weights' exponents, free in hardware), and each head in attention's products.
            "token": each channel, and each token besides (see `per_token` of `fmaq.matmul`): the hardware has to find a
            token's largest exponent at run time, and to add it to the token's results. There are no shifts then.
        rule: "trial" takes the least squared error of the sums, after the gain; "maximum" the bias by which the largest
            sum of the first batch is just representable.
        gain: with gains, by channel or layer, which undo the mean shrinkage of truncation.
        shift: with shifts of the mean of channels, where they pay.
        chunks: try these chunks for every product, and keep the best; none: the accumulator's own.
        ranges: of the operands' formats that have no bias of their own. "static": chosen anew, of each operand, and of
            each output channel of a weight if the policy says `weight_per_channel`; constants of the hardware.
            "dynamic": those of each tensor at run time, which the hardware has to find before it can quantize; a
            sample's result then depends on its batch and its padding. "given": as the policy has them.
        importance: what an error matters where one choice is for all channels of a product. None: its square by the
            mean square of the channel's sums. A function of the model's output that gives a scalar: its square times
            the mean square of the scalar's gradient by the channel's sums, for which each batch takes a pass and a
            gradient in float32 more. A loss will do, or `fmaq.analysis.likelihood` (of logits) and
            `fmaq.analysis.projection` (of any output), which need no labels. Not with "layer" and "model".
        together: where torch.distributed runs several processes, each of them calls this, is given the batches of all,
            and returns the policy of rank 0. False: this process alone, by its own batches.

    Returns:
        A policy for `attach`, and for `Policy.save`, with an entry for every layer whose products were met.

    Raises:
        TypeError: `model` is no module.
        ValueError: no batch, or one that forward does not take, `per`, `rule` or `ranges` unknown, the policy emulates
            and quantizes nothing that was met, or an operand is not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate takes a torch.nn.Module, got {type(model).__name__}")
    check_choices(per, rule, chunks, ranges)
    if importance is not None and per in ("model", "layer"):
        raise ValueError(f'importance weighs channels with offsets of their own: per="channel" or "token", got {per!r}')
    given = Policy.parse(policy)
    policy = replace(given, per_token=True) if per == "token" else given
    fits = _Fits(per, rule == "maximum", gain, shift, tuple(chunks), ranges)
    has_others = together and ranks.are_several()
    inputs = ranks.everyones(lambda: inputs_of(model, batches)) if has_others else inputs_of(model, batches)
    if not inputs:
        raise ValueError("calibrate needs at least one batch of inputs; batches is empty")
    if importance is not None:
        fits.importance = gradients(model, policy, inputs, importance)
    met = Met()
    with met.running():
        _run(model, policy, inputs, fits, "calibrating")
    if not (fits.trials or fits.unsummed):
        raise ValueError("calibrate met no product that the policy emulates; does its accumulator say fp32?")
    warned.warn(model, given, fits.trials, fits.empty, fits.various, met)
    if per == "model" and fits.trials:
        fits.share()
        _run(model, policy, inputs, fits, "fitting gains")
    new = fitted(model, given, policy, fits.all(), met.modules)
    return ranks.the_first_ones(new) if has_others else new


def check_choices(per: str, rule: str = "trial", chunks: Sequence[int | None] = (), ranges: str = "static") -> None:
    """Refuse what `calibrate` would.

    Raises:
        TypeError, ValueError: naming what each may be.
    """
    if not isinstance(chunks, Sequence) or isinstance(chunks, str):
        raise TypeError(f"chunks must be a sequence of chunks, such as (16, 32), got {chunks!r}")
    if per not in get_args(Per):
        raise ValueError(f'per must be "model", "layer", "channel" or "token", got {per!r}')
    if rule not in ("trial", "maximum"):
        raise ValueError(f'rule must be "trial" or "maximum", got {rule!r}')
    if ranges not in get_args(Ranges):
        raise ValueError(f'ranges must be "static", "dynamic" or "given", got {ranges!r}')


def _run(model: nn.Module, policy: Policy, batches: Sequence[Any], fits: _Fits, what: str) -> None:
    """One emulated pass over the batches, each product by what has been chosen for it when it is met."""
    console = Console(stderr=True)
    shown = track(batches, what, console=console, transient=True, disable=not console.is_terminal)
    with undisturbed(model), attached(model, policy, may_be_template=True), choosing(fits):
        for batch in shown:
            call(model, batch)


@dataclass
class _Fits:
    """The trials of all products, and the rules that follow.

    Attributes:
        per, by_maximum, has_gain, has_shift, chunks, ranges: see `calibrate`.
        trials: of the products met so far.
        largest: the largest magnitudes of both operands of the products met so far, where their formats need one; by
            output channel where the rule says so.
        unsummed: products that are only quantized: their sums are float32's.
        engines: products whose sums are of integer codes.
        samples: of all products, what one bias for all is chosen on.
        few: of products that have not shown `ENOUGH` sums of each channel yet.
        empty: products that were given no rows, once at least.
        weights: some elements of what each product was given as a weight first.
        various: products that were given other weights later.
        shifted: those that may have shifts.
        shared: by template, what all products keep.
        importance: of each group of a product, see `calibrate`; what it lacks counts by its own size.
    """

    per: Per
    by_maximum: bool
    has_gain: bool
    has_shift: bool
    chunks: tuple[int | None, ...]
    ranges: Ranges
    trials: dict[Place, Trial] = field(default_factory=dict)
    largest: dict[Place, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)
    unsummed: set[Place] = field(default_factory=set)
    engines: set[Place] = field(default_factory=set)
    samples: dict[Place, Sample] = field(default_factory=dict)
    few: dict[Place, Sample] = field(default_factory=dict)
    empty: set[Place] = field(default_factory=set)
    weights: dict[Place, Tensor] = field(default_factory=dict)
    various: set[Place] = field(default_factory=set)
    shifted: set[Place] = field(default_factory=set)
    shared: dict[Accumulator, Accumulator] = field(default_factory=dict)
    importance: dict[Place, Tensor] = field(default_factory=dict)

    def ranged(self, place: Place, request: Request, rule: Rule) -> Rule:
        """The rule with the ranges of the operands of this and all earlier calls."""
        if rule.accumulator == FP32:
            self.unsummed.add(place)
        if self.ranges == "given":
            a_max, b_max = (None if given is None else given.tensor for given in (rule.a_max, rule.b_max))
            self.largest[place] = (a_max, b_max)
            return rule
        rule = replace(rule, a_max=None, b_max=None)
        if self.ranges == "dynamic":
            return rule
        found = self.largest[place] = larger_ranges(self.largest.get(place), largest_of_operands(request, rule))
        return replace(rule, a_max=as_vector(found[0]), b_max=as_vector(found[1]))

    def all(self) -> dict[Place, Fit]:
        """What is best for every product that was met with anything to choose by."""
        return {place: self.fit(place) for place in (*self.trials, *self.unsummed)}

    def choose(self, place: Place, request: Request, rule: Rule) -> Rule:
        """The rule of a product that is met, from this and all earlier samples of it."""
        where = f"{place.kind} of {place.layer or 'the model itself'}"
        self._refuse_another_kind(place)
        for operand, is_weight in zip(request.operands, request.is_weight, strict=True):
            if not (is_weight and place in self.trials) and not is_finite(operand):
                raise ValueError(f"{where} has operands that are not finite")
        acc, has_channels = Accumulator.parse(rule.accumulator), request.is_weight[1]
        if any(not operand.numel() for operand in request.operands):
            self.empty.add(place)
            return replace(rule, accumulator=placed(acc, 0))
        if sums_codes(acc, formats_of(rule, request.is_weight)):
            self.engines.add(place)
        if has_channels:
            self._compare_weight(place, request.operands[1])
        options = request.options or {}
        found = sample(request.kind, request.operands, options, request.steps, ROWS, STEPS, rule.per_token, True)
        if not is_finite(found.exact()):
            raise ValueError(f"{where} has sums beyond float32's range")
        together = self._with_few(place, found, has_channels)
        if place not in self.trials or together is not None or self.trials[place].is_outgrown_by(found):
            found = found if together is None else together
            self.trials[place] = self._trial(place, acc, found, has_channels)
            if self.has_shift and has_channels and not rule.per_token and place not in self.engines:
                self.shifted.add(place)
            if self.per == "model" and not self.shared:
                self.samples[place] = some_channels(found)[0]
        else:
            try:
                self.trials[place].add(found)
            except ValueError as error:
                raise ValueError(f"{where} {error}; calibrate it with calls that are alike") from None
        return ruled(rule, self.fit(place))

    def computed(self, place: Place, request: Request, result: Tensor) -> Tensor:
        """As it is."""
        return result

    def _with_few(self, place: Place, found: Sample, has_channels: bool) -> Sample | None:
        """A sample and all earlier ones of its product, as long as these show fewer than `ENOUGH` sums a channel."""
        before = self.few.pop(place, None)
        together = found if before is None else joined(before, found)
        is_matrix_of_activations = isinstance(found, MatrixSample) and found.b.dim() == 2 and not has_channels
        if together is not None and not is_matrix_of_activations and together.outputs < ENOUGH * together.channels:
            self.few[place] = together
        return None if before is None else together

    def _compare_weight(self, place: Place, weight: Tensor) -> None:
        flat = weight.detach().flatten()
        some = flat[:: -(-flat.numel() // COMPARED)].to(torch.float32, copy=True)
        if not torch.equal(self.weights.setdefault(place, some), some):
            self.various.add(place)

    def _refuse_another_kind(self, place: Place) -> None:
        """A policy knows a layer's products by their index."""
        for other in () if place in self.trials else self.trials:
            if (other.layer, other.index) == (place.layer, place.index):
                raise ValueError(
                    f"product {place.index} of {place.layer or 'the model itself'} is {other.kind} in one call and "
                    f"{place.kind} in another; calibrate it with calls that are alike"
                )

    def _trial(self, place: Place, acc: Accumulator, found: Sample, has_channels: bool) -> Trial:
        if place in self.engines:
            return Trial.of_codes(acc, found, has_channels, self.chunks)
        shared = self.shared.get(template_of(acc))
        if shared is not None:
            return Trial.of_gains(shared, found, has_channels)
        is_shared, importance = self.per in ("model", "layer"), self.importance.get(place)
        return Trial.searched(acc, found, has_channels, is_shared, self.chunks, self.by_maximum, importance)

    def fit(self, place: Place) -> Fit:
        """What is best for a product so far."""
        a_max, b_max = self.largest.get(place, (None, None))
        if place in self.unsummed:
            return Fit(FP32, a_max=a_max, b_max=b_max)
        has_gain = self.has_gain and place not in self.engines
        return replace(self.trials[place].fit(has_gain, place in self.shifted), a_max=a_max, b_max=b_max)

    def share(self) -> None:
        """One accumulator for all products of a template: that of the least relative error of their sums, on average.

        Its chunk is the one that most of them would choose.
        """
        by_template: dict[Accumulator, list[Place]] = {}
        for place, trial in self.trials.items():
            by_template.setdefault(template_of(trial.acc), []).append(place)
        for template, places in by_template.items():
            if isinstance(template.format, FloatFormat):
                chunk = Counter(self.trials[place].acc.chunk for place in places).most_common(1)[0][0]
                self.shared[template] = self._one_for_all(replace(template, chunk=chunk), places)
        self.trials, self.samples, self.few = {}, {}, {}

    def _one_for_all(self, template: Accumulator, places: list[Place]) -> Accumulator:
        """The largest exponent first, with the product's bias as far above as it is for most; then that distance.

        An outer level has room for the largest sum of all.
        """
        chosen = [self.trials[place].acc for place in places]
        tops = [top_of(acc) for acc in chosen]
        distances = [distances_of(acc)[0] for acc in chosen]
        outers = [min(biases) for biases in zip(*(biases_of(acc)[2:] for acc in chosen), strict=True)]
        usual = sorted(distances)[len(distances) // 2]

        def with_top(top: int, distance: int) -> Accumulator:
            own = bias_for(template.format, top)
            return with_biases(template, [own, own + distance, *outers])

        def error(acc: Accumulator) -> float:
            return self._relative_error(acc, places)

        if self.by_maximum:  # the largest sum of all fits, and the largest product
            return with_top(max(tops), min(d - top for d, top in zip(distances, tops, strict=True)) + max(tops))
        candidates = range(max(tops) - min(SHIFTS), min(tops) - 1, -1)  # of equals, the one with most room
        top = min(candidates, key=lambda top: error(with_top(top, usual)))
        near = range(max(usual - 2, min(distances)), min(usual + 2, max(distances)) + 1)
        return min((with_top(top, distance) for distance in near), key=error)

    def _relative_error(self, acc: Accumulator, places: list[Place]) -> float:
        return sum(relative_error(acc, self.samples[place]) for place in places)
