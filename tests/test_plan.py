"""Plans: memory as a step takes it, and the numbers of a run and of a sweep without its hardware."""

import json
import re
from pathlib import Path

import pytest
from calls import call

from quack_lm.config import compose
from quack_lm.errors import UserError
from quack_lm.training.accelerators import ACCELERATORS, named_accelerator
from quack_lm.training.step_memory import CATEGORIES, fake_step

SMALL = ("model.d_model=64", "model.n_layers=2", "model.d_ff=160", "model.vocab_size=1000", "trainer.seq_len=128")
SMALL += ("model.tied_embeddings=true",)
GIB = 2**30


def table(stdout: str) -> dict[str, list[str]]:
    """The cells of each line, by the first of them; columns are two spaces apart."""
    rows = [re.split(r" {2,}", line.strip()) for line in stdout.splitlines() if line.strip()]
    return {first: rest for first, *rest in rows}


def test_planned_memory_is_that_of_twelve_measured_configs() -> None:
    code, stdout, stderr = call("plan", "measure=true", "sweep=memory", *SMALL)
    assert (code, stderr) == (0, "")
    rows = [line.split() for line in stdout.splitlines()[2:]]
    assert len(rows) == 12
    for *config, planned, measured, ratio in rows:
        assert float(planned) / float(measured) == pytest.approx(float(ratio), abs=0.01)
        assert 0.98 < float(ratio) < 1.01, config


@pytest.mark.parametrize("world_size", [1, 8])
def test_the_parts_of_a_step_are_what_they_are_named_for(world_size: int) -> None:
    settings = ["trainer.precision=bfloat16", "trainer.micro_batch_size=1", "optimizer=adamw", "attention=mla"]
    config = compose(["experiment=tiny", *SMALL, *settings])
    with fake_step(config, world_size=world_size, device="cuda") as step:
        parts = {
            way: step.memory(micro_batch_size=1, activation_checkpointing=way).parts
            for way in (False, "selective", True)
        }
        double = step.memory(micro_batch_size=2, activation_checkpointing=False).parts
        parameters = sum(p.numel() for p in step.model.parameters())
    kept, selective, recomputed = parts.values()
    # FSDP pads what does not divide; AdamW has two moments, and a step for each parameter.
    for one in parts.values():
        assert set(one) == set(CATEGORIES)
        assert one["weights"] == pytest.approx(4 * parameters / world_size, rel=0.01)
        assert one["optimizer"] == pytest.approx(2 * one["weights"], rel=0.01)
        # The gathered weights of the model, in bfloat16.
        assert one["communication"] >= 2 * parameters * (world_size > 1)
    assert kept["activations"] > 1.3 * selective["activations"] > 1.3 * recomputed["activations"]
    # The logits in bfloat16, their float32 copy, and its softmax.
    assert kept["logits"] == pytest.approx(128 * 1000 * (2 + 4 + 4), rel=0.25)
    assert double["activations"] == pytest.approx(2 * kept["activations"], rel=0.05)


def test_a_norm_on_a_gpu_keeps_its_input_and_a_number_per_row() -> None:
    taken = {}
    for stabilizer in ("none", "qk_norm"):
        config = compose(["experiment=tiny", *SMALL, f"stabilizer={stabilizer}"])
        with fake_step(config, world_size=1, device="cuda") as step:
            taken[stabilizer] = step.memory(micro_batch_size=4).parts["activations"]
    n_heads = config["model"]["n_heads"]
    of_a_layer = 2 * 4 * 128 * (64 + n_heads) * 4
    assert taken["qk_norm"] - taken["none"] == pytest.approx(2 * of_a_layer, rel=0.01)


def test_gradients_that_are_reduced_once_a_step_are_those_of_all_ranks() -> None:
    settings = ["trainer.reduce_every_micro_batch=false", "trainer.micro_batch_size=1"]
    with fake_step(compose(["experiment=tiny", *SMALL, *settings]), world_size=4, device="cuda") as step:
        gradients = step.memory(micro_batch_size=1).parts["gradients"]
        assert gradients == pytest.approx(sum(4 * p.numel() for p in step.model.parameters()), rel=0.01)


def test_the_largest_micro_batch_is_the_largest_divisor_that_fits() -> None:
    config = compose(["experiment=tiny", *SMALL, "trainer.global_batch_size=12"])
    with fake_step(config, world_size=2, device="cpu") as step:
        totals = {size: step.memory(micro_batch_size=size).total for size in (1, 2, 3, 6)}
        assert sorted(totals.values()) == list(totals.values())
        found = step.largest_micro_batch(totals[3] + step.probe_bytes)
        assert found is not None
        assert (found[0], found[1].total) == (3, totals[3])
        assert step.largest_micro_batch(totals[1] + step.probe_bytes - 1) is None


def test_a_plan_prints_what_the_run_will_be(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "throughput/mfu": mfu}) for step, mfu in ((1, 0.1), (2, 0.5), (3, 0.2))]
    # A run that is going on may have written a part of a line.
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "throu']))
    (tmp_path / "environment.json").write_text('{"device_type": "cuda"}')
    small = [*SMALL, "trainer.global_batch_size=48", "trainer.micro_batch_size=auto"]
    small.append("trainer.precision=bfloat16")
    code, stdout, stderr = call("plan", "experiment=tiny", *small, "world_size=8", "card=H200 NVL", f"mfu={tmp_path}")
    assert (code, stderr) == (0, "")
    rows = table(stdout)
    # 2 x parameters x 3 for the products, of which the tied embedding is one.
    parameters = int(rows["parameters"][0].split()[0].replace(",", ""))
    d_model, length, layers = 64, 128, 2
    pairs = 3 * 2 * 2 * layers * length * d_model
    expected = 6 * (parameters - d_model * (2 * layers + 1)) + pairs
    assert float(rows["FLOPs"][0].split()[0]) == pytest.approx(expected, rel=1e-3)
    assert f"{expected - pairs / 2:.4g}" in rows["FLOPs"][0]
    assert "MiB of a rank, micro-batch 6" in rows
    assert "trainer.micro_batch_size=6 trainer.activation_checkpointing=false" in rows["cheapest"][0]
    assert "all_gather" in rows["communication"][0]
    tokens_per_s = 0.2 * 8 * 835e12 / expected
    assert f"at an MFU of 0.2: {48 * length / tokens_per_s:.3g} s a step" in rows["time"][0]


def test_a_plan_of_which_nothing_fits_says_what_it_would_take() -> None:
    sizes = ["trainer.micro_batch_size=auto", "trainer.precision=bfloat16", "trainer.loss_chunk=null", "mfu=0.4"]
    for vocab_size, advice in (
        (50_000_000, r"weights, gradients and optimizer alone take 4\d\.\d GiB; use more ranks or a smaller model"),
        (15_000_000, r"use more ranks, or trainer\.loss_chunk=1024"),
    ):
        code, stdout, stderr = call(
            "plan", "experiment=tiny", *SMALL, *sizes, f"model.vocab_size={vocab_size}", "card=RTX 4090"
        )
        assert (code, stderr) == (0, "")
        rows = table(stdout)
        assert float(rows["total"][0]) > 21.6
        assert rows["largest micro-batch in 21.6 GiB"] == ["–"] * 3
        assert re.fullmatch(f"nothing fits: {advice}", rows["cheapest"][0]), rows["cheapest"]
        assert re.fullmatch(r"none: a step takes \d+\.\d GiB, and may take 21\.6", rows["time"][0])


def test_a_sweep_of_which_a_run_does_not_fit_has_no_time() -> None:
    sizes = ["model.vocab_size=1000,50000000", "trainer.precision=bfloat16", "card=RTX 4090", "mfu=0.4"]
    code, stdout, _ = call("plan", "experiment=tiny", *sizes)
    assert code == 0
    assert stdout.splitlines()[-1].startswith("time: none, for 1 of 2 kinds of runs take more than 21.6 GiB")


def test_the_mfu_of_a_run_on_a_cpu_is_not_that_of_a_card(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "throughput/mfu": 0.5}\n')
    (tmp_path / "environment.json").write_text('{"device_type": "cpu"}')
    code, _, stderr = call("plan", "experiment=tiny", "trainer.precision=bfloat16", "card=H100", f"mfu={tmp_path}")
    assert (code, stderr) == (2, f"error: mfu={tmp_path}: the run there did not train on a GPU; give a number\n")


def test_the_plan_of_a_sweep_is_the_cost_of_its_runs() -> None:
    where = ["trainer.micro_batch_size=auto", "world_size=2", "card=A100", "mfu=0.5"]
    axes = ["attention=mha,mla", "stabilizer=none,quack", "optimizer.lr=0.1,0.2", "trainer.precision=bfloat16"]
    code, stdout, stderr = call("plan", "experiment=tiny", *SMALL, *axes, *where)
    assert (code, stderr) == (0, "")
    lines = [line.split() for line in stdout.splitlines()[2:6]]
    assert [line[:3] for line in lines] == [[a, s, "2"] for a in ("mha", "mla") for s in ("none", "quack")]
    flops = sum(2 * float(line[4]) for line in lines) * 400 * 8 * 128
    assert "8 runs, 3.28e+06 tokens" in stdout
    hours = flops / (0.5 * 312e12) / 3600
    found = re.search(r"^(\S+) card-hours, (\S+) hours", stdout, flags=re.MULTILINE)
    assert found
    assert float(found[1]) == pytest.approx(hours, rel=0.02)
    assert float(found[2]) == pytest.approx(hours / 2, rel=0.02)


def test_runs_of_a_sweep_that_differ_in_more_than_attention_and_stabilizer_have_a_column_for_it() -> None:
    code, stdout, _ = call("plan", "experiment=tiny", "model.n_layers=2,3", "optimizer.lr=0.1,0.2")
    header, _, most, other = [line.split() for line in stdout.splitlines()[:4]]
    assert (code, header[:4]) == (0, ["attention", "stabilizer", "settings", "runs"])
    assert (most[:3], other[:4]) == (["mha", "none", "2"], ["mha", "none", "n_layers=3", "2"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["world_size=0"], "world_size=0 must be an integer from 1"),
        (["card=H1000"], "card=H1000 is unknown"),
        (["card=80GB"], "card=80GB is unknown"),
        (["card=H100", "mfu=0.4"], "not for float32; set that, or leave mfu out"),
        (["mfu=1.5"], "mfu=1.5 must be above 0 and at most 1"),
        (["mfu=no/run"], "mfu=no/run must be a share of the peak"),
        (["world_size=3"], "trainer.global_batch_size=8 must be a multiple of ranks"),
        (["trainer.micro_batch_size=auto"], "trainer.micro_batch_size=auto needs a card=NAME"),
        (["trainer.micro_batch_size=auto", "seed=0,1"], "trainer.micro_batch_size=auto needs a card=NAME"),
        (["--dry-run"], "unknown flag --dry-run"),
        (["card=H100", "trainer.device=cpu"], "trainer.device=cpu: card=NVIDIA H100 80GB HBM3 is a GPU"),
        (["world_size=2", "world_size=4"], "world_size=4: world_size=2 is given, too; choose one"),
        (["measure=yes"], "measure=yes must be true or false"),
        (["measure=true", "world_size=2"], "world_size=2: measure=true measures on the ranks"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("plan", "experiment=tiny", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


@pytest.mark.slow
def test_a_run_of_which_no_sequence_fits_is_refused(tiny_data: list[str], tmp_path: Path) -> None:
    # The vocabulary's logits are too large, and not the weights.
    settings = [*tiny_data, f"run_dir={tmp_path}", "trainer.device=cpu", "trainer.micro_batch_size=auto"]
    settings += ["trainer.seq_len=1024", "model.vocab_size=8000000", "model.d_model=8", "model.n_heads=2"]
    settings += ["trainer.loss_chunk=null"]
    code, stdout, stderr = call("train", "experiment=tiny", *settings)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(
        r"auto: a step of one sequence takes more than 50% of the .* GiB .*; set trainer\.activation_", stderr
    )


def test_a_card_is_found_by_its_full_name_or_by_words_of_it() -> None:
    for name, accelerator in ACCELERATORS.items():
        assert named_accelerator(name) == (name, accelerator)
    assert named_accelerator("h200 nvl")[0] == "NVIDIA H200 NVL"
    assert named_accelerator("GH200")[1].memory_gib == 96
    assert named_accelerator("NVIDIA H100 80GB HBM3 MIG 3g.40gb")[1].memory_gib == 40
    with pytest.raises(UserError, match="card=00 is unknown"):
        named_accelerator("00")
