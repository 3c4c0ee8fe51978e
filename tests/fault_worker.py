"""Trains like `quack-lm train`, with a NaN in one micro-batch on the last rank; run by tests/test_faults.py.

torchrun --nproc-per-node 2 tests/fault_worker.py NaN_STEP key=value ...
"""

import sys
from typing import Any

import torch

from quack_lm.cli import exit_on_user_error
from quack_lm.config import compose
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train


def main(nan_step: int, overrides: list[str]) -> None:
    """Train, and print this rank's status."""
    run = build_run(check_run(compose(overrides)))
    forwards = 0

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal forwards
        if not torch.is_grad_enabled() or run.world.rank != run.world.size - 1 or run.state.step != nan_step:
            return output
        forwards += 1
        return output * float("nan") if forwards == 2 else output

    run.model.register_forward_hook(spoil)
    status = train(run)
    print(f"rank {run.world.rank}: {status.name}, NaN in {forwards} forwards seen", flush=True)
    run.world.shutdown(0)


if __name__ == "__main__":
    with exit_on_user_error():
        main(int(sys.argv[1]), sys.argv[2:])
