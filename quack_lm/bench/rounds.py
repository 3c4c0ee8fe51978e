"""Rounds in which every variant has its turn, in a random order, and what they say together.

Other work on the machine comes and goes, so a time alone says little. Within a round the variants are measured close
together, and their ratio is taken; a matrix product between the turns shows rounds in which the machine was busy.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import torch
from tqdm import tqdm

from quack_lm.bench.decode import DecodeStep
from quack_lm.bench.isolated import IsolatedStep
from quack_lm.bench.ranks import LaunchedStep
from quack_lm.bench.step import Phases, TimedStep
from quack_lm.report.statistics import interval_of_typical, typical
from quack_lm.training.memory import PeakMemory

# A round is left out where the product took this many times its median.
BUSY = 1.25
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Turn:
    """One variant in one round: the means of a step, and the slowest product around it."""

    variant: str
    round: int
    step_s: float
    phases_s: dict[str, float]
    page_faults: float | None
    product_s: float


@dataclass(frozen=True)
class Summary:
    """One variant over the rounds that count, relative to its baseline."""

    variant: str
    step_s: float  # median
    phases_s: dict[str, float]  # medians
    page_faults: float | None  # median
    baseline: str
    ratio: float  # of the times of a step: the median of the geometric means of pairs of rounds
    interval: tuple[float, float] | None  # 95%, by Wilcoxon's signed-rank test
    fastest_ratio: float  # of all turns


class WarmStep(NamedTuple):
    """A step whose caches are filled, and the most bytes that its tensors took at once on the way."""

    step: TimedStep
    memory_bytes: int


def warm_up(makers: Mapping[str, Callable[[], TimedStep]], *, device: torch.device, steps: int) -> dict[str, WarmStep]:
    """Make every variant and give it a turn of so many steps."""
    found = {}
    for name, make in tqdm(makers.items(), desc="warm-up", disable=None, leave=False):
        with PeakMemory(device) as others:
            pass
        with PeakMemory(device) as peak:
            step = make()
            step.turn(steps)
        if isinstance(step, LaunchedStep | IsolatedStep | DecodeStep):
            found[name] = WarmStep(step, step.memory_bytes)
        else:
            found[name] = WarmStep(step, peak.bytes - others.bytes)
    return found


def measure(
    variants: Mapping[str, TimedStep],
    *,
    device: torch.device,
    rounds: int,
    steps: int,
    seed: int = 0,
    after_round: Callable[[Sequence[Turn]], None] = lambda turns: None,
) -> list[Turn]:
    """`rounds` turns of `steps` steps of every variant, each of which is warm; the order differs by round.

    `after_round` gets all turns so far.
    """
    order, shuffle = list(variants), random.Random(seed)
    product = _Product(device)
    turns = []
    with tqdm(total=rounds * len(order), unit="turn", disable=None, leave=False) as bar:
        for number in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                bar.set_postfix_str(f"round {number + 1} of {rounds}, {name}")
                before = product.seconds()
                made = variants[name].turn(steps)
                turns.append(Turn(name, number, *made, product_s=max(before, product.seconds())))
                bar.update()
            after_round(turns)
    return turns


class _Product:
    """A fixed matrix product, whose time says how busy the device is."""

    def __init__(self, device: torch.device) -> None:
        size = 4096 if device.type == "cuda" else 512
        self.device = device
        self.a = torch.randn(size, size, device=device)
        self.seconds()

    def seconds(self) -> float:
        """The median of three."""
        self.a @ self.a  # into the caches, behind what another process did
        found = []
        for _ in range(3):
            phases = Phases(self.device)
            self.a @ self.a
            phases.mark("product")
            found.append(phases.seconds()["product"])
        return median(found)


def busy_rounds(turns: Sequence[Turn]) -> set[int]:
    """The rounds in which a product took long."""
    limit = BUSY * median(turn.product_s for turn in turns)
    return {turn.round for turn in turns if turn.product_s > limit}


def kept_rounds(turns: Sequence[Turn]) -> set[int]:
    """The rounds that are not busy; all of them if fewer than FEWEST_ROUNDS would be left."""
    every = {turn.round for turn in turns}
    quiet = every - busy_rounds(turns)
    return quiet if len(quiet) >= min(FEWEST_ROUNDS, len(every)) else every


def fastest_ratio(own: Sequence[Turn], others: Sequence[Turn]) -> float:
    """The ratio of step times without what else runs, as far as that left each phase alone in some turn.

    The time of each phase is its minimum over the turns; of steps without phases, the minimum is of the whole.
    """
    if not all(turn.phases_s for turn in (*own, *others)):
        return min(turn.step_s for turn in own) / min(turn.step_s for turn in others)
    times = (sum(min(t.phases_s[name] for t in turns) for name in turns[0].phases_s) for turns in (own, others))
    return next(times) / next(times)


def summarize(baselines: Mapping[str, str], turns: Sequence[Turn], kept: set[int]) -> list[Summary]:
    """Each variant over the rounds that are kept, relative to its baseline in the same round."""
    by_round = {(turn.variant, turn.round): turn for turn in turns if turn.round in kept}
    found = []
    for name, baseline in baselines.items():
        own, other = ([by_round[which, number] for number in sorted(kept)] for which in (name, baseline))
        logs = [math.log(a.step_s / b.step_s) for a, b in zip(own, other, strict=True)]
        bounds = interval_of_typical(logs) if name != baseline else None
        found.append(
            Summary(
                variant=name,
                step_s=median(turn.step_s for turn in own),
                phases_s={phase: median(turn.phases_s[phase] for turn in own) for phase in own[0].phases_s},
                page_faults=_median_if_known([turn.page_faults for turn in own]),
                baseline=baseline,
                ratio=math.exp(typical(logs)),
                interval=(math.exp(bounds[0]), math.exp(bounds[1])) if bounds else None,
                fastest_ratio=fastest_ratio(*([t for t in turns if t.variant == which] for which in (name, baseline))),
            )
        )
    return found


def _median_if_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None
