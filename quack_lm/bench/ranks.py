"""The training step on several ranks: each turn starts torchrun with a benchmark of one variant and reads its times."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quack_lm.bench.step import Timing
from quack_lm.errors import UserError
from quack_lm.training.stop_signals import follow_parent

# Steps of each start before those that are timed.
WARMUP = 3


class LaunchedStep:
    """The step of some settings on so many ranks of this machine, each with one thread on a CPU."""

    def __init__(self, settings: Sequence[str], trainer: dict[str, Any], ranks: int, directory: Path) -> None:
        self.out = directory / "turn.jsonl"
        self.tokens_per_step = trainer["global_batch_size"] * trainer["seq_len"]
        self.memory_bytes = 0  # of rank 0, in the last turn
        self.command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        self.command += ["-m", "quack_lm", "bench", "suite=step", "rounds=1", f"out={self.out}", *settings]

    def turn(self, steps: int) -> Timing:
        """Start the ranks, make the steps, and end the ranks."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [*self.command, f"steps={steps}", f"warmup={WARMUP}"]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=follow_parent,
        )
        try:
            _, stderr = process.communicate()
        finally:  # also where this command is stopped; torchrun then ends its ranks
            process.terminate()
            process.wait()
        if process.returncode:
            errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
            raise UserError(errors[0].removeprefix("error: ") if errors else f"torchrun failed: {stderr[-1000:]}")
        line = json.loads(self.out.read_text())
        self.memory_bytes = line["memory_bytes"]
        return Timing(line["step_s"], line["phases_s"], line["page_faults"])
