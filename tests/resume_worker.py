"""Runs that never stop and runs that are continued, many in one group of processes; run by tests/test_train.py.

torchrun --nproc-per-node 2 tests/resume_worker.py DIRECTORY attention/stabilizer ... -- key=value ...
"""

import sys

from quack_lm.config import compose
from quack_lm.parallel import start_world
from quack_lm.training import build
from quack_lm.training.check import check_run
from quack_lm.training.loop import train

# Low enough that heads are clipped at every step.
EXTRA = {"qk_clip": ["stabilizer.threshold=0.1"]}


def main(directory: str, pairs: list[str], overrides: list[str]) -> None:
    """Each pair straight to the end, and in two pieces."""
    # A process group each would take longer than its run.
    world = start_world(device="cpu", is_wrapped=True)
    build.start_process = lambda *_, **__: world
    for pair in pairs:
        attention, stabilizer = pair.split("/")
        for name, more in (("straight", []), ("stopped", ["trainer.steps=4"]), ("stopped", [])):
            own = [f"attention={attention}", f"stabilizer={stabilizer}", *EXTRA.get(stabilizer, []), *more]
            run = build.build_run(check_run(compose([*overrides, *own, f"run_dir={directory}/{pair}/{name}"])))
            train(run)
            if run.lock is not None:
                run.lock.close()  # as the end of its process would
            world.barrier()
    world.shutdown(0)


if __name__ == "__main__":
    at = sys.argv.index("--")
    main(sys.argv[1], sys.argv[2:at], sys.argv[at + 1 :])
