"""From a variant to what makes its steps."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from quack_lm.bench.decode import DecodeStep
from quack_lm.bench.isolated import IsolatedStep
from quack_lm.bench.muon import MuonStep
from quack_lm.bench.peers import make_peer_step
from quack_lm.bench.ranks import LaunchedStep
from quack_lm.bench.run_step import RunStep
from quack_lm.bench.step import TimedStep, TrainingStep
from quack_lm.bench.suites import Variant
from quack_lm.errors import UserError
from quack_lm.parallel import World


def make_step(
    variant: Variant, config: dict[str, Any], settings: Sequence[str], world: World, directory: Path
) -> TimedStep:
    """The step of a variant; what it writes goes to the directory, which is its own."""
    if world.size > 1 and (variant.peer or variant.ranks):
        raise UserError("this suite begins in one process; start it without torchrun")
    if variant.ranks:
        return LaunchedStep(settings, config["trainer"], variant.ranks, directory)
    if variant.is_isolated:
        make, device = partial(make_here, variant, config, directory), world.device.type
        return IsolatedStep(make, config["trainer"], device=device, keeps_freed_memory=variant.keeps_freed_memory)
    return make_here(variant, config, directory, world)


def make_here(variant: Variant, config: dict[str, Any], directory: Path, world: World) -> TimedStep:
    """The step in this process."""
    if variant.muon:
        return MuonStep(config, world, is_ours=variant.muon == "ours", shape=variant.shape)
    if variant.decode:
        return DecodeStep(config, world, keeps_keys=variant.decode == "keys")
    if variant.peer:
        return make_peer_step(variant.peer, config, world, directory)
    return RunStep(config, world, directory, variant.parts) if variant.parts else TrainingStep(config, world)
