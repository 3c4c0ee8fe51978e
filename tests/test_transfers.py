"""No tensor travels between host and device in a step but the micro-batches: seen on the meta device as a stand-in.

A meta tensor is on another device than the host, as on a GPU, and has no values: whatever would wait for them raises.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quack_lm.config import choices, compose, instantiate
from quack_lm.data.batches import TrainBatches
from quack_lm.data.manifest import TokenData
from quack_lm.logit_paths import declared_weights
from quack_lm.parallel import World, clip_gradients, materialize
from quack_lm.stabilizers.base import Paths, Scales, Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.build import initialize_stabilizer, make_model
from quack_lm.training.loop import accumulate_gradients
from quack_lm.training.settings import TrainerSettings
from quack_lm.training.state import TrainState

DEVICE = World(0, 1, 0, torch.device("meta"))
SMALL = ["experiment=tiny", "model.d_model=32", "model.n_layers=1", "model.n_heads=4", "model.d_ff=48"]
SMALL += ["trainer.seq_len=16", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
MICRO_BATCHES = ["aten._to_copy.default: cpu [2, 17] int64 -> meta [2, 17] int64"] * 2  # from the host, as they must


class Transfers(TorchDispatchMode):
    """Records each operation that has tensors of the host beside tensors of the device, or reads a value of one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = op(*args, **(kwargs or {}))
        before, after = (
            [x for x in tree_leaves(part) if isinstance(x, torch.Tensor)] for part in ((args, kwargs), result)
        )
        if len({x.device.type for x in (*before, *after)}) > 1:
            self.seen.append(f"{op}: {_named(before)} -> {_named(after)}")
        return result


class FromPython(TorchFunctionMode):
    """Records each tensor of Python values: it is made on the host, and what takes it to a device is no operation."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.tensor, torch.as_tensor, torch.asarray):
            self.seen.append(f"{function.__name__}{args}")
        return function(*args, **(kwargs or {}))


def _named(tensors: list[torch.Tensor]) -> str:
    return ", ".join(f"{x.device.type} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in tensors)


def transfers(stabilizer: Stabilizer | None, data: list[str], *overrides: str) -> list[str]:
    """What travels in the timed part of a second step, as `training/loop.py` makes it."""
    config = compose([*SMALL, *data, *overrides])
    settings: TrainerSettings = instantiate(config["trainer"])
    stabilizer = stabilizer or instantiate(config["stabilizer"])
    model = make_model(config, stabilizer)
    tokens = TokenData.open(Path(config["data"]["dir"]), verify_checksums=False)
    model.eot_id = tokens.manifest.eot_id if config["data"]["mask_documents"] else None
    materialize(model, None, DEVICE.device)
    optimizers = instantiate(config["optimizer"]).build(model)
    weights = LogitWeights(model.attentions)
    initialize_stabilizer(stabilizer, weights)
    batches = TrainBatches(
        tokens.sequences("train", settings.seq_len),
        seed=0,
        global_batch_size=4,
        micro_batch_size=2,
        rank=0,
        world_size=1,
    )
    run: Any = SimpleNamespace(
        model=model, settings=settings, world=DEVICE, batches=batches, state=TrainState(), batch_tokens=64
    )
    for _ in range(2):  # the first makes the optimizers' state
        with Transfers() as mode, FromPython(mode.seen):
            accumulate_gradients(run)
            clip_gradients(list(model.parameters()), 1.0)
            stabilized_step(optimizers, stabilizer, weights, DEVICE)
            for optimizer in optimizers:
                optimizer.zero_grad()
    return mode.seen


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("stabilizer", choices("stabilizer"))
@pytest.mark.parametrize("attention", choices("attention"))
def test_nothing_but_the_micro_batches_travels_in_a_step(
    attention: str, stabilizer: str, optimizer: str, tiny_data: list[str]
) -> None:
    own = [f"attention={attention}", f"stabilizer={stabilizer}", f"optimizer={optimizer}"]
    assert transfers(None, tiny_data, *own) == MICRO_BATCHES


@pytest.mark.parametrize(
    "settings",
    [
        ["data.mask_documents=true"],
        ["data.mask_documents=true", "attention.backend=eager"],
        ["trainer.loss_chunk=8"],
        ["trainer.activation_checkpointing=true"],
        ["stabilizer=quack", "stabilizer.norm=spectral"],
    ],
    ids=" ".join,
)
def test_nothing_more_travels_with_other_settings(settings: list[str], tiny_data: list[str]) -> None:
    assert transfers(None, tiny_data, "attention=mla", "stabilizer=qk_clip", *settings) == MICRO_BATCHES


class HostScale(Stabilizer):
    """Makes its scale on the host, from where it has to travel."""

    def step_scale(self, paths: Paths, norms: Mapping[str, torch.Tensor]) -> Scales:
        return {name: torch.full((1, blocks), 0.5) for name, blocks in declared_weights(paths).items()}


class PythonScale(Stabilizer):
    """Makes its scale of Python numbers."""

    def step_scale(self, paths: Paths, norms: Mapping[str, torch.Tensor]) -> Scales:
        return {"w_q": torch.tensor([[0.5]], device=DEVICE.device)}


class ReadValue(Stabilizer):
    """Asks the device for a value."""

    needs_max_logits = True

    def weight_scale(self, paths: Paths, max_logits_LH: torch.Tensor) -> Scales:
        return {"w_q": 0.5} if max_logits_LH.amax() > 1.0 else {}


def test_a_scale_made_on_the_host_is_seen(tiny_data: list[str]) -> None:
    seen = transfers(HostScale(), tiny_data)
    assert len(seen) > len(MICRO_BATCHES)
    assert "cpu [1, 4] float32 -> meta [1, 4] float32" in " ".join(seen)
    assert "tensor([[0.5]],)" in transfers(PythonScale(), tiny_data)


def test_a_value_that_is_read_is_seen(tiny_data: list[str]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        transfers(ReadValue(), tiny_data)
