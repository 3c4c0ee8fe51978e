"""Raise the learning rate exponentially over a short training, and show where the loss turns up and the logits grow.

    quack-lm lr-find experiment=tiny attention=mla stabilizer=quack
    quack-lm lr-find experiment=tiny stabilizer=none from=1e-4 to=10 steps=200
    torchrun --nproc-per-node 8 -m quack_lm lr-find model=1b attention=mla stabilizer=quack   # needs: GPUs

from=1e-5   optimizer.lr of the first step
to=1        optimizer.lr of the last step; the ramp ends before where the loss is far above its best, or not finite
steps=200   of the ramp
out=DIR     where ramp.jsonl and ramp.png go, runs/lr_find/<attention>-<stabilizer> unless given

Every other key=value is a setting, as of quack-lm train. The rates of all optimizers rise in their ratio in the config.
The model, data, batches and stabilizer are those of a run. Each step of the ramp is taken at weights that smaller rates
made, so it says where a sweep could start and not which stabilizer is better: for that, quack-lm sweep.
"""

import difflib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from quack_lm.cli.flags import check_writable, read_number
from quack_lm.config import choice, compose, groups, take_keys
from quack_lm.errors import UserError, explaining
from quack_lm.files import finite, user_path, write_together
from quack_lm.text import echo

DEFAULTS = {"from": "1e-5", "to": "1", "steps": "200"}
OWN = (*DEFAULTS, "out")
# The weight of the past in the running mean of the loss, which is divided by the sum of its weights.
SMOOTHING = 0.9
# Nats above the smallest mean loss at which it has turned up, and at which the ramp ends.
TURNED, ENDED = 0.1, 2.0
PROBES = 50
# So that ratios of rates are finite.
LEAST_RATE = 1e-36
FILES = ("ramp.jsonl", "ramp.png")
# Settings of a run that a ramp does not have, with what to do instead.
ELSEWHERE = {
    "optimizer.lr": "is what the ramp changes; give from=... and to=...",
    "trainer.steps": "is steps=... here",
    "run_dir": "is out=... here",
    "trainer.init_from": "has no effect: a ramp begins with random weights; leave it out",
    "trainer.init_stabilizer": "has no effect: a ramp begins with random weights; leave it out",
    "trainer.profile": "has no effect: a ramp writes no trace; leave it out",
    "eval.every": "has no effect: a ramp has no evaluation; leave it out",
    "logger.tensorboard": "has no effect: a ramp writes its own files alone; leave it out",
    "logger.trackio": "has no effect: a ramp writes its own files alone; leave it out",
    "logger.wandb": "has no effect: a ramp writes its own files alone; leave it out",
    "trainer.val_every": "has no effect: a ramp has no validation; leave it out",
    "trainer.checkpoint_every": "has no effect: a ramp writes no checkpoints; leave it out",
}


class Point(NamedTuple):
    """A step of the ramp; `max_logit` where it was probed."""

    lr: float
    loss: float
    smoothed: float
    max_logit: float | None


def main(arguments: list[str]) -> int:
    """Make the ramp, print what it shows and draw it."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").splitlines())
        return 0
    start, end, steps, overrides, out = read(arguments)
    config = compose([*overrides, f"trainer.steps={steps}", "trainer.val_every=0", "trainer.checkpoint_every=0"])
    names = [choice(config[section]) for section in ("attention", "stabilizer")]
    out = out or user_path("runs/lr_find") / "-".join(names)
    if taken := [name for name in FILES if (out / name).exists()]:
        raise UserError(f"out={out} has {taken[0]} of an earlier ramp; choose another out")
    check_writable(out / FILES[0], f"out={out}")
    points, is_main = ramp({**config, "run_dir": str(out / "run")}, start, end, steps)  # which is not made
    if is_main:
        with explaining(f"out={out}", "or choose another out"):
            write(out, points, names, config["trainer"]["unstable_logit"])
        echo(*conclusions(points, config["trainer"]["unstable_logit"]), f"curve and figure: {out}")
    return 0


def read(arguments: list[str]) -> tuple[float, float, int, list[str], Path | None]:
    """The first and the last rate, the steps between them, the settings, and where the results go."""
    given, overrides = take_keys(arguments, OWN)
    own = DEFAULTS | given
    for override in overrides:
        name, _, value = override.partition("=")
        if (key := name.lstrip("+")) in ELSEWHERE:
            raise UserError(f"{key} {ELSEWHERE[key]}")
        if name not in groups() and (close := difflib.get_close_matches(name, OWN, n=1)):
            raise UserError(f"unknown key {name}: did you mean {close[0]}={value}?")
    rates = [_rate(name, own[name]) for name in ("from", "to")]
    if rates[0] >= rates[1]:
        raise UserError(f"from={own['from']} must be below to={own['to']}")
    if not own["steps"].isdecimal() or not 10 <= int(own["steps"][:9]) <= 100_000:
        raise UserError(f"steps={own['steps']} must be an integer from 10 to 100000")
    return rates[0], rates[1], int(own["steps"]), overrides, user_path(own["out"]) if "out" in own else None


def _rate(name: str, text: str) -> float:
    rate = read_number(text)
    if not (LEAST_RATE <= rate <= 1 / LEAST_RATE):
        raise UserError(f"{name}={text} must be a learning rate from {LEAST_RATE:g} to {1 / LEAST_RATE:g}")
    return rate


def ramp(config: dict[str, Any], start: float, end: float, steps: int) -> tuple[list[Point], bool]:
    """The steps of the ramp, and whether this is the main process."""
    # Imported late: a mistake in the settings need not wait for it.
    from quack_lm.bench.step import Phases, TrainingStep
    from quack_lm.optim.recipe import set_lr
    from quack_lm.probe import Probe
    from quack_lm.training.build import build_data
    from quack_lm.training.check import check_run
    from quack_lm.training.process import start_process

    plan = check_run(config)
    world = start_process([plan.settings], device=plan.device)
    trainer = {**config["trainer"], "micro_batch_size": plan.settings.micro_batch_size, "compile": plan.is_compiled}
    step = TrainingStep({**config, "trainer": trainer}, world)
    data = build_data(plan, world)
    step.batches, step.model.eot_id = data.batches, plan.model.eot_id
    probe = Probe(step.model, step.model.attentions, data.probe, world, eot_id=step.model.eot_id)
    points: list[Point] = []
    mean = weight = 0.0
    for number in tqdm(range(steps), unit="step", disable=None if world.is_main else True, leave=False):
        lr = start * (end / start) ** (number / (steps - 1))
        set_lr(step.optimizers, lr / config["optimizer"]["lr"])
        is_probed = number % max(1, steps // PROBES) == 0
        if is_probed:
            probe.before()
        share, _ = step(Phases(world.device))
        # Before: each rank has its share of the loss. After: the loss.
        loss = world.sum(share).item()
        max_logit = probe.after()["logits/max"].item() if is_probed else None
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * loss, SMOOTHING * weight + 1 - SMOOTHING
        points.append(Point(lr, loss, mean / weight, max_logit))
        if not math.isfinite(loss) or mean / weight > min(p.smoothed for p in points) + ENDED:
            break
    world.shutdown(0)
    return points, world.is_main


def lowest(points: Sequence[Point]) -> Point:
    """The step with the smallest mean loss."""
    return min((p for p in points if math.isfinite(p.smoothed)), key=lambda p: p.smoothed, default=points[0])


def turning(points: Sequence[Point]) -> Point | None:
    """The first step after the lowest at which the mean loss is `TURNED` nats above it, or not finite."""
    best = lowest(points)
    after = points[points.index(best) :]
    return next((p for p in after if not p.smoothed <= best.smoothed + TURNED), None)


def first_above(points: Sequence[Point], max_logit: float) -> Point | None:
    """The first probed step whose max logit is above a threshold, or not finite."""
    return next((p for p in points if p.max_logit is not None and not p.max_logit <= max_logit), None)


def conclusions(points: Sequence[Point], unstable_logit: float) -> list[str]:
    """What the ramp shows, as lines."""
    best, turned, unstable = lowest(points), turning(points), first_above(points, unstable_logit)
    top = (turned or points[-1]).lr
    # Two rates a decade, 1 and 3, the last of which is below the rate at which the loss turns up.
    last = math.floor(2 * math.log10(top))
    grid = ",".join(f"{10.0 ** (k // 2) * (3 if k % 2 else 1):g}" for k in range(last - 4, last + 1))
    has_learned = best.smoothed < points[0].smoothed - TURNED
    return [
        f"lowest loss      {best.smoothed:.3f} at optimizer.lr={best.lr:.2g} (running mean)",
        f"loss turns up    {_at(turned)} (by {TURNED:g} nats)",
        f"max logit        {_at(unstable)} above trainer.unstable_logit={unstable_logit:g}",
        f"a sweep to start optimizer.lr={grid}"
        if has_learned
        else f"no sweep to start: the loss never fell by {TURNED:g} nats; give a lower from or to, or more steps",
    ]


def _at(point: Point | None) -> str:
    return f"at optimizer.lr={point.lr:.2g}" if point else "nowhere in the ramp"


def write(out: Path, points: Sequence[Point], names: Sequence[str], unstable_logit: float) -> None:
    """The steps as JSON lines, and loss and max logit against the rate as a figure."""
    from quack_lm.report.draw import Ramp, draw_ramps, save

    lines = [json.dumps(finite({"step": number, **p._asdict()})) for number, p in enumerate(points, start=1)]
    probed = [(p.lr, p.max_logit) for p in points if p.max_logit is not None and 0 < p.max_logit < math.inf]
    marks = [turning(points), first_above(points, unstable_logit)]
    ramps = [
        Ramp("training loss, running mean", [(p.lr, p.smoothed) for p in points], marks[0] and marks[0].lr),
        Ramp("max logit", probed, marks[1] and marks[1].lr, log_y=True),
    ]
    out.mkdir(parents=True, exist_ok=True)
    figure = save(draw_ramps(ramps, title=", ".join(names)))
    write_together({out / FILES[0]: "".join(line + "\n" for line in lines).encode(), out / FILES[1]: figure})
