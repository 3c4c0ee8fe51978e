"""The time that the training loop waits for a checkpoint, compared with the copy to host memory that each one needs.

    python scripts/measure_checkpoints.py [REPEATS] [key=value ...]
    python scripts/measure_checkpoints.py 5 model=100m     # settings of quack-lm train; nothing is trained

Each repeat copies the same weights and optimizer state to host memory, saves them asynchronously, and saves them
synchronously. Ratios are taken within a repeat, because machines are shared. Nothing else runs, so `complete after` is
the disk's speed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from quack_lm.cli import exit_on_user_error

DEFAULT = ["experiment=tiny", "attention=mla", "stabilizer=quack", "logger.progress=false"]


def main(repeats: int, overrides: list[str]) -> None:
    """Print a line per repeat, and the median ratios."""
    import torch

    from quack_lm.config import compose
    from quack_lm.parallel import local
    from quack_lm.training.build import build_run
    from quack_lm.training.check import check_run
    from quack_lm.training.checkpoint import create_optimizer_state, named_tensors
    from quack_lm.training.loop import summarize
    from quack_lm.training.saver import Saver

    with tempfile.TemporaryDirectory() as directory:
        run = build_run(check_run(compose([*DEFAULT, *overrides, f"run_dir={directory}/run"])))
        create_optimizer_state(run.optimizers)
        tensors = named_tensors(run.model, run.optimizers, run.stabilizer)
        own = [local(tensor) for tensor in tensors.values()]
        host = [torch.empty_like(tensor, device="cpu") for tensor in own]
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        summarize(run)  # completes the run directory, as in training
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
        print("repeat  copy [s]  async: stall [s]  complete after [s]  sync: stall [s]  async / copy  sync / async")
        to_copy, to_async = [], []
        for number in range(repeats):
            copied = seconds(copy)
            (stall, complete), (sync_stall, _) = (save(saver) for saver in savers)
            to_copy.append(stall / copied)
            to_async.append(sync_stall / stall)
            print(
                f"{number:6}  {copied:8.4f}  {stall:16.4f}  {complete:18.4f}  {sync_stall:15.4f}  {to_copy[-1]:12.2f}"
                f"  {to_async[-1]:12.2f}"
            )
    print(
        f"medians of {repeats}: the loop waits {statistics.median(to_copy):.2f} times as long as for a copy, "
        f"and {statistics.median(to_async):.1f} times longer without trainer.async_checkpoints"
    )


def seconds(work: Callable[[], object]) -> float:
    """The wall time of a call."""
    before = time.perf_counter()
    work()
    return time.perf_counter() - before


if __name__ == "__main__":
    arguments = sys.argv[1:]
    count = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 3
    with exit_on_user_error():
        main(count, arguments)
