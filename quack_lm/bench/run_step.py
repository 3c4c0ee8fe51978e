"""The training step with what a run does around it: reading data, the log, the probe and checkpoints."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quack_lm.bench.step import Phases, Timing, TrainingStep, random_tokens
from quack_lm.bench.suites import Part
from quack_lm.config import choice, instantiate
from quack_lm.data.batches import EvalBatches, Sequences
from quack_lm.optim.recipe import Recipe
from quack_lm.parallel import World
from quack_lm.probe import Probe
from quack_lm.training.coordinator import Coordinator
from quack_lm.training.loop import Run, due, record_probe, save, write_log
from quack_lm.training.metrics import Clock, LoggerSettings, RunLog
from quack_lm.training.profiler import StepProfiler
from quack_lm.training.run_dir import RunDir
from quack_lm.training.saver import Saver
from quack_lm.training.state import TrainState
from quack_lm.training.watchdog import Watchdog

# Of a data set whose pages do not all lie in a cache of the processor.
DATA_TOKENS = 1 << 24


class RunStep(TrainingStep):
    """A step with some parts of what `training/loop.py` does around it, by its own functions and at its intervals.

    `data`: from memory-mapped shards, where `TrainingStep` has its few sequences in memory. The run never ends, so
    nothing happens for the last step.
    """

    def __init__(self, config: dict[str, Any], world: World, directory: Path, parts: Collection[Part]) -> None:
        super().__init__(config, world)
        self.parts = parts
        self.run = self._make_run(config, RunDir(directory))
        if world.is_main:
            directory.mkdir(parents=True)
        world.barrier()
        if "data" in parts:
            self.batches = self.run.batches = self.batches_of(_shards(config, directory, world), seed=config["seed"])
        # Half an interval ahead: a checkpoint is then written in the middle of a turn and not behind its end.
        self.run.state.step = self.settings.checkpoint_every // 2
        self.clock = Clock(world, self.run.state.outside_s)

    def _make_run(self, config: dict[str, Any], run_dir: RunDir) -> Run:
        settings, world = self.settings, self.world
        logger: LoggerSettings = instantiate(config["logger"])
        recipe: Recipe = instantiate(config["optimizer"])
        tokens = random_tokens(config, n_sequences=settings.probe_sequences)
        held_out = EvalBatches(
            Sequences([tokens], settings.seq_len),
            n_sequences=settings.probe_sequences,
            micro_batch_size=settings.held_out_at_once(settings.probe_sequences, ranks=world.size),
            rank=world.rank,
            world_size=world.size,
        )
        saver = Saver(run_dir.checkpoints, world, keep=settings.keep_checkpoints, is_async=settings.async_checkpoints)
        return Run(
            run_dir=run_dir,
            settings=settings,
            world=world,
            coordinator=Coordinator(world, Watchdog(settings.timeout_s, rank=world.rank), run_dir, parts=[saver]),
            model=self.model,
            optimizers=self.optimizers,
            schedule=recipe.make_schedule(settings.steps),
            max_grad_norm=self.max_grad_norm,
            stabilizer=self.stabilizer,
            stabilizer_name=choice(config["stabilizer"]),
            weights=self.weights,
            batches=self.batches,
            validation=held_out,
            probe=Probe(
                self.model,
                self.model.attentions,
                held_out,
                world,
                eot_id=self.model.eot_id,
                weights=self.weights if settings.probe_parts else None,
            ),
            evaluation=None,
            log=RunLog(
                run_dir.metrics_file,
                logger,
                world,
                batch_tokens=settings.global_batch_size * settings.seq_len,
                total_steps=settings.steps,
            ),
            profiler=StepProfiler(run_dir.path / "profile", None, self.model, rank=world.rank),
            saver=saver,
            state=TrainState(),
            unigram_entropy=float(np.log(config["model"]["vocab_size"])),
            val_tokens_per_byte={},  # random tokens have no text
            flops_per_token=0.0,  # nobody reads the MFU of this log
            peak_flops=1.0,
            facts={},
            lock=None,
        )

    def turn(self, steps: int) -> Timing:
        """Make so many steps; a checkpoint that is still being written at their end is waited for."""
        made = super().turn(steps)
        if "checkpoint" not in self.parts:
            return made
        waiting = Phases(self.world.device)
        self.run.saver.wait()
        self.run.coordinator.sync()
        waiting.mark("checkpoint")
        waited_s = waiting.seconds()["checkpoint"] / steps
        phases_s = {**made.phases_s, "checkpoint": made.phases_s["checkpoint"] + waited_s}
        return Timing(made.step_s + waited_s, phases_s, made.page_faults)

    def __call__(self, phases: Phases) -> tuple[Tensor, Tensor | float]:
        """One step, with the parts in the order of the loop."""
        run, settings, step = self.run, self.settings, self.run.state.step + 1
        is_probed = "probe" in self.parts and due(step, settings.probe_every, 0)
        if is_probed:
            with self.clock.paused("probe"):
                run.probe.before()
            phases.mark("probe")
        loss, grad_norm = super().__call__(phases)
        run.state.step = step
        if "log" in self.parts:
            run.log.add_loss(step, loss)
            run.log.add(step, {"optim/lr": self.lr, "optim/grad_norm": grad_norm})
            phases.mark("logging")
        if is_probed:
            with self.clock.paused("probe"):
                record_probe(run)
            phases.mark("probe")
        # The ranks agree once a step, also where there is nothing to save.
        if not run.coordinator.sync(is_saving=run.saver.is_writing).is_saving:
            run.saver.advance()
        phases.mark("checkpoint" if "checkpoint" in self.parts else "logging")
        is_saved = "checkpoint" in self.parts and due(step, settings.checkpoint_every, 0)
        if "log" in self.parts and (is_saved or due(step, run.log.settings.log_every, 0)):
            write_log(run, self.clock)
            phases.mark("logging")
        if is_saved:
            with self.clock.paused("checkpoint"):
                save(run)
            phases.mark("checkpoint")
        return loss, grad_norm


def _shards(config: dict[str, Any], directory: Path, world: World) -> Sequences:
    """A data set of one shard, memory-mapped; every rank sees the file of the main process."""
    path, seq_len = directory / "tokens.bin", config["trainer"]["seq_len"]
    n_sequences = max(DATA_TOKENS // seq_len, config["trainer"]["global_batch_size"])
    if world.is_main:
        random_tokens(config, n_sequences=n_sequences).tofile(path)
    world.barrier()
    mapped = np.memmap(path, dtype=random_tokens(config, n_sequences=0).dtype, mode="r")
    return Sequences([mapped], seq_len, files=[path])
