"""Rounds in which every variant has its turn, in a random order, and what they say together.

Other work on the machine comes and goes, so a time alone says little. Within a round the variants are measured close
together, and their ratio is taken; a matrix product between the turns shows rounds in which the machine was busy.
"""

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

import torch
from tqdm import tqdm

from quack_lm.bench.step import Phases
from quack_lm.report.statistics import interval_of_ratios

Step = Callable[[Phases], None]

# A round is left out where the product took this many times its median.
BUSY = 1.25
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Turn:
    """One variant in one round: the mean time of a step and of its phases, and the slowest product around it."""

    variant: str
    round: int
    step_s: float
    phases_s: dict[str, float]
    product_s: float


@dataclass(frozen=True)
class Summary:
    """One variant over the rounds that count, relative to its baseline."""

    variant: str
    step_s: float  # median
    phases_s: dict[str, float]  # medians
    baseline: str
    ratio: float  # of the times of a step; geometric mean over the rounds
    interval: tuple[float, float] | None  # 95% t interval of their logarithm


def measure(
    variants: Mapping[str, Step], *, device: torch.device, rounds: int, steps: int, warmup: int, seed: int = 0
) -> list[Turn]:
    """`rounds` turns of `steps` steps of every variant, after `warmup` steps of each; the order differs by round."""
    order, shuffle = list(variants), random.Random(seed)
    product = _Product(device)
    turns = []
    with tqdm(total=(rounds + 1) * len(order), unit="turn", disable=None, leave=False) as bar:
        for name in order:
            bar.set_postfix_str(f"warm-up, {name}")
            _run(variants[name], device, warmup)
            bar.update()
        for number in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                bar.set_postfix_str(f"round {number + 1} of {rounds}, {name}")
                before = product.seconds()
                step_s, phases_s = _run(variants[name], device, steps)
                turns.append(Turn(name, number, step_s, phases_s, max(before, product.seconds())))
                bar.update()
    return turns


def _run(step: Step, device: torch.device, steps: int) -> tuple[float, dict[str, float]]:
    phases = Phases(device)
    start = time.perf_counter()
    for _ in range(steps):
        step(phases)
    phases_s = {name: seconds / steps for name, seconds in phases.seconds().items()}
    return (time.perf_counter() - start) / steps, phases_s


class _Product:
    """A fixed matrix product, whose time says how busy the device is."""

    def __init__(self, device: torch.device) -> None:
        size = 4096 if device.type == "cuda" else 512
        self.device = device
        self.a = torch.randn(size, size, device=device)
        self.seconds()

    def seconds(self) -> float:
        """The median of three."""
        found = []
        for _ in range(3):
            phases = Phases(self.device)
            self.a @ self.a
            phases.mark("product")
            found.append(phases.seconds()["product"])
        return median(found)


def quiet_rounds(turns: Sequence[Turn]) -> set[int]:
    """The rounds in which no product took long; all of them if fewer than FEWEST_ROUNDS would be left."""
    limit = BUSY * median(turn.product_s for turn in turns)
    every = {turn.round for turn in turns}
    quiet = every - {turn.round for turn in turns if turn.product_s > limit}
    return quiet if len(quiet) >= min(FEWEST_ROUNDS, len(every)) else every


def summarize(baselines: Mapping[str, str], turns: Sequence[Turn], kept: set[int]) -> list[Summary]:
    """Each variant over the rounds that are kept, relative to its baseline in the same round."""
    by_round = {(turn.variant, turn.round): turn for turn in turns if turn.round in kept}
    found = []
    for name, baseline in baselines.items():
        own = [by_round[name, number] for number in sorted(kept)]
        logs = [math.log(turn.step_s / by_round[baseline, turn.round].step_s) for turn in own]
        found.append(
            Summary(
                variant=name,
                step_s=median(turn.step_s for turn in own),
                phases_s={phase: median(turn.phases_s[phase] for turn in own) for phase in own[0].phases_s},
                baseline=baseline,
                ratio=math.exp(fmean(logs)),
                interval=interval_of_ratios(logs) if name != baseline else None,
            )
        )
    return found
