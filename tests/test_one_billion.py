"""One optimizer step of the 1B models on a CPU, for real: bash scripts/test.sh tests/test_one_billion.py -m slow -s

About a quarter of an hour each on two cores, and up to about 22 GiB of memory and 15 GiB of disk (the checkpoint), so
never two at a time.
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# The model, optimizer and vocabulary of the paper; one short sequence in float32.
ONE_STEP = [
    "experiment=paper",
    "model.vocab_size=49152",
    "trainer.steps=1",
    "trainer.seq_len=64",
    "trainer.precision=float32",
    # Many CPUs have no bfloat16 products; those that imitate them would take hours.
    "optimizer.ns_dtype=float32",
    "trainer.global_batch_size=1",
    "trainer.micro_batch_size=1",
    "trainer.val_sequences=1",
    "trainer.probe_sequences=1",
    # A copy of everything beside the training is more than this memory holds.
    "trainer.async_checkpoints=false",
    "logger.progress=false",
]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.xdist_group("one_billion")
@pytest.mark.parametrize(("attention", "parameters"), [("mha", (0.9e9, 1.2e9)), ("mla", (0.9e9, 1.3e9))])
def test_the_full_model_takes_one_step(
    attention: str, parameters: tuple[float, float], tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir = tmp_path / attention
    command = [sys.executable, "scripts/train.py", *ONE_STEP, *tiny_data, f"attention={attention}", "stabilizer=quack"]
    start = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    try:
        done = subprocess.run(
            [*command, f"run_dir={run_dir}"], cwd=REPOSITORY, capture_output=True, text=True, env=environment
        )
        elapsed_s = time.monotonic() - start
        assert done.returncode == 0, done.stderr
        summary = json.loads((run_dir / "summary.json").read_text())
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)
    # The largest of all children so far: of this run, where the machine's memory holds one only.
    peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(
        f"\n{attention}: {summary['n_params']:,} parameters, one step in {summary['elapsed_s']:.0f} s, "
        f"the run {elapsed_s:.0f} s, peak memory {peak_gib:.1f} GiB, outside of the step {summary['outside_s']}"
    )
    assert summary["status"] == "completed"
    assert parameters[0] < summary["n_params"] < parameters[1]
    # The first loss of an untrained model is close to that of a uniform guess.
    assert summary["initial_val_loss"] == pytest.approx(math.log(49152), rel=0.1)
    last = lines[-1]
    assert math.isfinite(last["train/loss"])
    assert last["logits/delta_mean"] > 0
    assert len(last["logits/max_per_head"]) == 14
