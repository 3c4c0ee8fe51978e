"""The bytes of each collective of a step, as torch dispatches them, against the formula."""

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from models import small_config
from torch.utils._python_dispatch import TorchDispatchMode

from quack_lm.bench.step import Phases, TrainingStep
from quack_lm.config import instantiate
from quack_lm.parallel import fake_world
from quack_lm.training.build import make_model
from quack_lm.training.traffic import KINDS, step_traffic


class SentBytes(TorchDispatchMode):
    """Adds up what rank 0 sends in every collective below it."""

    def __init__(self) -> None:
        super().__init__()
        self.total = Counter(dict.fromkeys(KINDS, 0.0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind, n_bytes = self._sent(func.overloadpacket.__name__, args)
            self.total[kind] += n_bytes
        return func(*args, **(kwargs or {}))

    def _sent(self, name: str, args: Any) -> tuple[str, float]:
        n = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject)).size()
        match name:
            case "_allgather_base_":
                return "all_gather", args[1].nbytes * (n - 1)
            case "allgather_":
                return "all_gather", args[1][0].nbytes * (n - 1)
            case "_reduce_scatter_base_":
                return "reduce_scatter", args[0].nbytes * (n - 1)
            case "allreduce_":
                return "all_reduce", 2 * (n - 1) / n * sum(tensor.nbytes for tensor in args[0])
            case "alltoall_base_":
                return "all_to_all", args[1].nbytes - args[4][0] * args[1].element_size()
        raise AssertionError(f"{name} is no collective that a step should have")


class Case(NamedTuple):
    ranks: int
    attention: str
    stabilizer: str
    optimizer: str
    overrides: tuple[str, ...] = ()


HALF = ("trainer.precision=bfloat16", "trainer.reduce_dtype=bfloat16", "optimizer.ns_dtype=bfloat16")
FREED = "trainer.reshard_after_forward=always"
CASES = {
    "8 ranks, Muon": Case(8, "mha", "none", "muon"),
    "8 ranks, blocks freed": Case(8, "mla", "quack", "muon", (FREED, "model.n_layers=3")),
    "8 ranks, AdamW, one reduction": Case(8, "mha", "qk_clip", "adamw", ("trainer.reduce_every_micro_batch=false",)),
    "8 ranks, HSDP": Case(8, "mla", "qk_clip", "muon", ("trainer.replicas=2", FREED, *HALF)),
    "8 ranks, replicas alone": Case(8, "gqa", "quack", "muon", ("trainer.replicas=8",)),
    "64 ranks, half the bytes": Case(64, "mha", "quack", "muon", (*HALF, "model.tied_embeddings=false")),
    "64 ranks, AdamW": Case(64, "mla", "quack", "adamw", ("trainer.micro_batch_size=1",)),
    "64 ranks, HSDP, spectral norms": Case(
        64, "mla", "quack", "muon", ("trainer.replicas=4", "stabilizer.norm=spectral")
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_step_sends_the_bytes_of_the_formula(case: Case) -> None:
    batch = ["trainer.global_batch_size=256", "trainer.micro_batch_size=2", "trainer.seq_len=4"]
    overrides = [*batch, *(o for o in case.overrides if case.optimizer == "muon" or "ns_dtype" not in o)]
    config = small_config(case.attention, case.stabilizer, *overrides, optimizer=case.optimizer)
    settings, stabilizer = instantiate(config["trainer"]), instantiate(config["stabilizer"])
    meta_model = make_model(config, stabilizer)
    optimizers = instantiate(config["optimizer"]).build(meta_model)
    expected = step_traffic(meta_model, optimizers, stabilizer, settings, ranks=case.ranks)
    with fake_world(size=case.ranks, is_wrapped=True, replicas=settings.replicas) as world:
        step = TrainingStep(config, world)
        with SentBytes() as sent:
            step(Phases(world.device))
    assert dict(sent.total) == pytest.approx(expected, rel=1e-12)
    assert sum(expected.values()) > 0
