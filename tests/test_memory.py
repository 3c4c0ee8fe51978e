"""The peak of memory is what torch's allocator handed out at once."""

import torch

from quack_lm.training.memory import PeakMemory

MIB = 2**20
CPU = torch.device("cpu")


def floats(mib: int) -> torch.Tensor:
    return torch.zeros(mib * MIB // 4)


def test_the_peak_is_of_what_exists_at_once_and_of_what_was_there_before() -> None:
    with PeakMemory(CPU) as nothing:
        pass
    before = floats(5)
    with PeakMemory(CPU) as peak:
        first = floats(7)
        view = before[:10], first.view(7, -1)
        del first, view
        second = floats(3)
        # Squares are a temporary of 8 MiB beside their argument.
        third = floats(4).square().sum()
        del second, third
        late = floats(2)
    del late
    assert (peak.bytes - nothing.bytes) / MIB == 5 + 3 + 8
