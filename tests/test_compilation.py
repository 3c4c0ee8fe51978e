"""torch.compile: when it is used, what it needs, and that nothing is compiled again in a run."""

from functools import partial
from pathlib import Path

import pytest
import torch
from calls import call
from test_train import SMALL

from quack_lm.config import choices, compose, instantiate
from quack_lm.training import compilation
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.compilation import LEAST_CPU_FLOPS, is_compiled
from quack_lm.training.loop import train


def changes_the_forward(name: str) -> bool:
    stabilizer = instantiate(compose([f"stabilizer={name}"])["stabilizer"])
    return stabilizer.needs_max_logits or stabilizer.qk_transform(4) is not None


CHANGING_THE_FORWARD = ["none", *(name for name in choices("stabilizer") if changes_the_forward(name))]


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def decision(choice: str, *, device: str = "cpu", share: float = 1.0, ranks: int = 1) -> bool:
    """For a run that takes a core `share` of the FLOPs from which compilation pays."""
    settings = instantiate(compose([*SMALL, f"trainer.compile={choice}", "trainer.steps=100"])["trainer"])
    tokens = 100 * settings.global_batch_size * settings.seq_len
    return is_compiled(settings, device=device, flops_per_token=share * LEAST_CPU_FLOPS / tokens, ranks=ranks)


def test_auto_compiles_on_a_gpu_and_for_long_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decision("auto", share=1.01)
    assert not decision("auto", share=0.99)
    assert not decision("auto", share=1.5, ranks=2)
    assert (decision("true", share=0.0), decision("false", device="cuda", share=9.0)) == (True, False)
    monkeypatch.setattr(compilation, "find_spec", lambda name: name == "triton")
    assert decision("auto", device="cuda", share=0.0)
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert not decision("auto", device="cuda", share=9.0)


def test_without_a_compiler_auto_does_not_and_true_is_refused(no_compiler: None, tiny_data: list[str]) -> None:
    assert not decision("auto", share=9.0)
    code, _, stderr = call("train", *SMALL, *tiny_data, "trainer.compile=true")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "trainer.compile=true needs a C++ compiler; install it, or use trainer.compile=false" in stderr
    code, _, stderr = call("bench", "suite=compile", "only=compiled", "trainer.device=cpu")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "compiled left out: trainer.compile=true needs a C++ compiler" in stderr


@pytest.mark.parametrize("attention", choices("attention"))
@pytest.mark.parametrize("stabilizer", CHANGING_THE_FORWARD)
def test_nothing_is_compiled_again_after_the_first_step(
    attention: str, stabilizer: str, tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # When to compile again is decided before inductor is asked, whose part would take minutes here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    overrides = [*tiny_data, f"attention={attention}", f"stabilizer={stabilizer}", "trainer.steps=4"]
    overrides += [f"trainer.precision={'float32' if stabilizer == 'none' else 'bfloat16'}"]  # bfloat16 is under FSDP
    overrides += [f"trainer.loss_chunk={25 if attention == 'mla' else 'auto'}"]
    overrides += ["trainer.compile=true", "trainer.val_every=2", "trainer.probe_every=2", "data.mask_documents=true"]
    run = build_run(check_run(compose([*SMALL, *overrides, f"run_dir={tmp_path}"])))
    schedule, started = run.schedule, []

    def strict_schedule(step: int) -> float:
        started.append(step)
        if step == 1:
            torch.compiler.set_stance("fail_on_recompile")
        return schedule(step)

    run.schedule = strict_schedule
    try:
        train(run)
    finally:
        torch.compiler.set_stance("default")
        torch.compiler.reset()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert started == list(range(4))
