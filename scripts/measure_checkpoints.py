"""What a checkpoint costs: the stall of the training loop and the time until it is whole, written beside it or within.

    python scripts/measure_checkpoints.py [PAIRS] [key=value ...]
    python scripts/measure_checkpoints.py 5 experiment=tiny model=proxy data.dir=data/stdlib

Each pair is the same run twice, in alternating order; the ratio is taken within pairs, because machines are shared.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from quack_lm.errors import exit_on_user_error

FEW = ["trainer.val_every=0", "trainer.val_sequences=1", "trainer.probe_every=0", "logger.progress=false"]
DEFAULT = ["experiment=tiny", "attention=mla", "stabilizer=quack", "trainer.steps=60", "trainer.checkpoint_every=5"]


def main(pairs: int, overrides: list[str]) -> None:
    """Print a line per pair, and the median ratio."""
    ratios = []
    print("pair  stall within [s]  stall beside [s]  whole after, within [s]  whole after, beside [s]  stall ratio")
    with tempfile.TemporaryDirectory() as directory:
        for pair in range(pairs):
            order = (False, True) if pair % 2 else (True, False)
            seen = {
                is_async: train_once(Path(directory, f"{pair}_{is_async}"), is_async, overrides) for is_async in order
            }
            stalls = {is_async: summary["outside_s"]["checkpoint"] for is_async, summary in seen.items()}
            totals = {is_async: summary["checkpoint_s"] for is_async, summary in seen.items()}
            ratios.append(stalls[False] / stalls[True])
            print(
                f"{pair:4}  {stalls[False]:16.3f}  {stalls[True]:16.3f}  {totals[False]:23.3f}  {totals[True]:23.3f}"
                f"  {ratios[-1]:11.2f}"
            )
    print(
        f"the loop stalls {statistics.median(ratios):.2f} times as long without async_checkpoints (median of {pairs})"
    )


def train_once(run_dir: Path, is_async: bool, overrides: list[str]) -> dict[str, Any]:
    """The summary of one run."""
    from quack_lm.build import build, check_run
    from quack_lm.config import compose
    from quack_lm.train import summarize, train

    own = [*FEW, *overrides, f"trainer.async_checkpoints={str(is_async).lower()}", f"run_dir={run_dir}"]
    run = build(check_run(compose(own)))
    summary = summarize(run, train(run))
    if run.lock is not None:
        run.lock.close()
    return summary


if __name__ == "__main__":
    arguments = sys.argv[1:]
    count = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 3
    with exit_on_user_error():
        main(count, [*DEFAULT, *arguments])
