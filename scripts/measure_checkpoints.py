"""What a checkpoint costs: how long the training loop stands still for one, beside the copy that it cannot do without.

    python scripts/measure_checkpoints.py [TIMES] [key=value ...]
    python scripts/measure_checkpoints.py 5 model=100m     # settings as of scripts/train.py; nothing is trained

Each time, the same weights and optimizer state are copied to host memory, saved beside the loop, and saved within it;
ratios are taken within a time, because machines are shared. Nothing else runs, so `whole after` is the disk's speed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from quack_lm.cli import exit_on_user_error

DEFAULT = ["experiment=tiny", "attention=mla", "stabilizer=quack", "logger.progress=false"]


def main(times: int, overrides: list[str]) -> None:
    """Print a line per time, and the median ratios."""
    import torch

    from quack_lm.config import compose
    from quack_lm.parallel import local
    from quack_lm.training.build import build
    from quack_lm.training.check import check_run
    from quack_lm.training.checkpoint import create_optimizer_state, named_tensors
    from quack_lm.training.loop import summarize
    from quack_lm.training.saver import Saver

    with tempfile.TemporaryDirectory() as directory:
        run = build(check_run(compose([*DEFAULT, *overrides, f"run_dir={directory}/run"])))
        create_optimizer_state(run.optimizers)
        tensors = named_tensors(run.model, run.optimizers, run.stabilizer)
        own = [local(tensor) for tensor in tensors.values()]
        host = [torch.empty_like(tensor, device="cpu") for tensor in own]
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        summarize(run, "running")  # makes the run directory whole, as in training
        savers = [Saver(Path(directory, str(a)), run.world, keep=1, is_async=a) for a in (True, False)]
        step = 0

        def save(saver: Saver) -> tuple[float, float]:
            nonlocal step
            step += 1
            state = {"stabilizer_state": sorted(run.stabilizer.state_dict()), "progress": {}, **run.facts}
            before = time.perf_counter()
            saver.save(step, tensors, state)
            stalled = time.perf_counter() - before
            saver.wait()
            return stalled, time.perf_counter() - before

        def copy() -> None:
            torch._foreach_copy_(host, own)
            run.world.synchronize()

        for saver in savers:  # the first one allocates the memory that the later ones copy to
            save(saver)
        print(f"{size / 1e9:.3g} GB of weights and optimizer state on this rank, in {len(own)} tensors")
        print("time  copy [s]  beside: stall [s]  whole after [s]  within: stall [s]  beside / copy  within / beside")
        to_copy, to_beside = [], []
        for number in range(times):
            copied = seconds(copy)
            (beside, whole), (within, _) = (save(saver) for saver in savers)
            to_copy.append(beside / copied)
            to_beside.append(within / beside)
            print(
                f"{number:4}  {copied:8.4f}  {beside:17.4f}  {whole:15.4f}  {within:17.4f}  {to_copy[-1]:13.2f}"
                f"  {to_beside[-1]:15.2f}"
            )
    print(
        f"medians of {times}: the loop stands still for {statistics.median(to_copy):.2f} times a copy, "
        f"and {statistics.median(to_beside):.1f} times longer without trainer.async_checkpoints"
    )


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


if __name__ == "__main__":
    arguments = sys.argv[1:]
    count = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 3
    with exit_on_user_error():
        main(count, arguments)
