"""Under torchrun with gloo, on 2 and 3 ranks and as HSDP on 2 x 2, everything is what it is in a single process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import LONE, small_config, small_model, tokens
from sharding_worker import ATTENTIONS, COUNTS, N_STEPS, SHAPES, combinations, compose_configs, everything
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode

from quack_lm.parallel import World
from quack_lm.training.loop import accumulate_gradients

ROOT = Path(__file__).resolve().parents[1]
# (ranks, replicas): 3 heads on 2 ranks cut the middle one; 2 rows on 3 ranks leave one without any.
WORLDS = {"2 ranks": (2, 1), "3 ranks": (3, 1), "HSDP 2x2": (4, 2)}


@pytest.fixture(scope="session")
def single() -> dict[str, Any]:
    """The results of one plain process."""
    return everything(compose_configs(), LONE)


@pytest.fixture(scope="session", params=WORLDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of every rank of a world."""
    size, replicas = WORLDS[request.param]
    directory = tmp_path_factory.mktemp("ranks")
    (directory / "configs.json").write_text(json.dumps(compose_configs()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    command += [str(ROOT / "tests" / "sharding_worker.py"), f"--replicas={replicas}", f"--directory={directory}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-4000:]
    return [torch.load(directory / f"rank_{rank}.pt", weights_only=False) for rank in range(size)]


@pytest.mark.parametrize("case", combinations())
def test_stabilized_steps_give_the_single_process_weights(
    case: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    expected = single["steps"][case]
    start = {name: p.detach() for name, p in small_model(compose_configs()[case]).named_parameters()}
    for rank in ranks:
        got = rank["steps"][case]
        for name, value in expected["weights"].items():
            # Relative to the way travelled, since a rate that is wrong by a tenth changes the weights by a thousandth.
            way = (value - start[name]).norm()
            assert way > 0, name
            assert (got["weights"][name] - value).norm() < 1e-3 * way, name
        torch.testing.assert_close(got["grad_norms"], expected["grad_norms"], rtol=1e-4, atol=0)
        assert got["metrics"].keys() == expected["metrics"].keys()
        for name, value in expected["metrics"].items():
            torch.testing.assert_close(got["metrics"][name], value, rtol=1e-3, atol=0, msg=name)
    assert len(expected["grad_norms"]) == N_STEPS
    if "qk_clip" in case:
        assert (expected["metrics"]["gamma"] < 0.9).any()


@pytest.mark.parametrize("case", combinations())
def test_all_ranks_hold_the_same_bits(case: str, ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["steps"][case]
    for other in ranks[1:]:
        for group in ("weights", "metrics"):
            for name, value in first[group].items():
                assert torch.equal(other["steps"][case][group][name], value), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_norms_do_not_depend_on_the_sharding(
    attention: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    expected = single["norms"][attention]
    for rank in ranks:
        got = rank["norms"][attention]
        for weight, norms in expected["frobenius"].items():
            assert torch.equal(got["frobenius"][weight], norms), weight
        for weight, norms in expected["spectral"].items():
            # Batched products round differently for batches of different size.
            torch.testing.assert_close(got["spectral"][weight], norms, rtol=1e-6, atol=0, msg=weight)
    assert expected["frobenius"].keys() == expected["spectral"].keys()


@pytest.mark.parametrize("kind", ["map", "measure"])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_matrix_is_worked_on_once_by_one_rank(
    shape: tuple[int, int], count: int, kind: str, ranks: list[dict[str, Any]], single: dict[str, Any]
) -> None:
    n_ranks, expected = len(ranks), single["work"][shape, count]
    each = -(-count // n_ranks)
    for rank in ranks:
        work = rank["work"][shape, count]
        torch.testing.assert_close(work[kind], expected[kind], rtol=1e-6, atol=1e-6)
        # An equal share each, padded with zero matrices: the sum over ranks is the padded count, and not N per rank.
        assert [len(handed[kind]) for handed in work["handed"]] == [each] * n_ranks
        sizes = sorted(size for handed in work["handed"] for size in handed[kind])
        padding = n_ranks * each - count
        assert sizes == pytest.approx([0.0] * padding + [i + 1 for i in range(count)], rel=1e-5)


def test_the_cases_cut_heads_and_leave_a_rank_without_rows(ranks: list[dict[str, Any]]) -> None:
    rows = [rank["work"][(1, 4), 1]["rows_here"] for rank in ranks]
    assert sorted(set(rows)) == [0, 1]
    # 3 heads of 10 rows: 15 and 15, or with HSDP the same in each replica; on 3 ranks the 6 heads of 4 rows in two
    # groups of keys are 8 rows, 3 + 3 + 2, so that both key blocks are cut.
    assert (3 * 10 // 2) % 10 != 0
    assert -(-8 // 3) % 4 != 0


@pytest.mark.parametrize(("every", "expected"), [(True, 3), (False, 1)])
def test_gradients_are_reduced_as_often_as_asked(every: bool, expected: int) -> None:
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        world = World(0, 2, 0, torch.device("cpu"), init_device_mesh("cpu", (2,)))
        model = small_model(small_config("mla"), world=world)
        numbers = tokens(6)
        batches = [numbers[start : start + 2] for start in (0, 2, 4)]
        run: Any = SimpleNamespace(
            model=model,
            world=world,
            settings=SimpleNamespace(reduce_every_micro_batch=every),
            state=SimpleNamespace(step=0),
            batches=SimpleNamespace(
                micro_batches=lambda step: batches,
                sources=lambda step: [torch.zeros(2, dtype=torch.long)] * 3,
                n_micro_batches=3,
                names=[""],
                is_mixed=False,
            ),
            batch_tokens=12 * 8,
        )
        with CommDebugMode() as seen:
            accumulate_gradients(run)
    finally:
        dist.destroy_process_group()
    # Once for each block, and once for what is outside of them.
    n_groups = len(model.blocks) + 1
    assert seen.get_comm_counts()[torch.ops.c10d._reduce_scatter_base_] == expected * n_groups
