"""The benchmark: its steps are the trainer's, its ratios are those of the rounds, and its suites resolve."""

import json
import math
from pathlib import Path

import pytest
import torch
from calls import call

from quack_lm.bench import suites
from quack_lm.bench.peers import make_step
from quack_lm.bench.rounds import Turn, quiet_rounds, summarize
from quack_lm.bench.step import Phases, TrainingStep
from quack_lm.cli.bench import read
from quack_lm.config import choices, compose
from quack_lm.optim.recipe import set_lr
from quack_lm.parallel import World
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train

SMALL = ("model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_ff=48", "model.vocab_size=64")
SMALL += ("trainer.seq_len=16", "trainer.micro_batch_size=2", "trainer.global_batch_size=4", "trainer.device=cpu")
HERE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_variant_of_a_suite_is_a_run_that_could_be_made(suite: str) -> None:
    configs = {name: compose([*suites.BASE, *settings]) for name, settings in suites.variants(suite).items()}
    assert len(configs) == len({json.dumps(config) for config in configs.values()}) or suite == "peers"


def test_a_chosen_model_has_its_own_sizes() -> None:
    chosen = read(["suite=compile", "model=1b", "model.n_layers=8"])[1]["eager"]["model"]
    assert (chosen["d_model"], chosen["n_heads"], chosen["d_ff"], chosen["n_layers"]) == (2048, 32, 8192, 8)


def test_ratios_are_taken_within_a_round_so_that_a_slow_machine_changes_none() -> None:
    speed = (1.0, 3.0, 1.5)
    turns = [Turn(name, i, s * t, {"forward": s * t}, 1.0) for i, s in enumerate(speed) for name, t in TIMES.items()]
    first, second = summarize({"a": "a", "b": "a"}, turns, {0, 1, 2})
    assert (first.ratio, first.interval, first.step_s) == (1.0, None, 3.0)
    assert second.ratio == pytest.approx(1.25)
    assert second.interval == (pytest.approx(1.25), pytest.approx(1.25))
    assert second.phases_s == {"forward": pytest.approx(3.75)}


TIMES = {"a": 2.0, "b": 2.5}


def test_an_interval_is_of_the_logarithms_of_the_ratios() -> None:
    turns = [Turn("a", i, 1.0, {}, 1.0) for i in range(2)]
    turns += [Turn("b", 0, math.exp(0.1), {}, 1.0), Turn("b", 1, math.exp(0.3), {}, 1.0)]
    (_, found) = summarize({"a": "a", "b": "a"}, turns, {0, 1})
    # Two values: mean 0.2, standard error 0.1, t quantile 12.706.
    assert found.ratio == pytest.approx(math.exp(0.2))
    assert found.interval == (
        pytest.approx(math.exp(0.2 - 1.2706), rel=1e-4),
        pytest.approx(math.exp(0.2 + 1.2706), rel=1e-4),
    )


def test_a_round_in_which_the_machine_was_busy_is_left_out() -> None:
    turns = [Turn(name, i, 1.0, {}, 2.0 if (name, i) == ("b", 1) else 1.0) for i in range(5) for name in "ab"]
    assert quiet_rounds(turns) == {0, 2, 3, 4}
    # If nearly every round is busy, that is how the machine is.
    assert quiet_rounds([Turn("a", i, 1.0, {}, 1.0 + i % 2) for i in range(4)]) == {0, 1, 2, 3}


@pytest.mark.parametrize("attention", choices("attention"))
def test_the_step_trains_and_its_phases_are_all_of_its_time(attention: str) -> None:
    settings = ["stabilizer=quack", f"attention={attention}"]
    step = TrainingStep(compose([*suites.BASE, *settings, *SMALL]), HERE)
    set_lr(step.optimizers, 1.0)
    losses: list[float] = []
    step.model.register_forward_hook(lambda *call: losses.append(call[-1].mean().item()))
    for _ in range(30):
        phases = Phases(HERE.device)
        step(phases)
    # Two micro-batches a step, of the same random tokens each time, are learned by heart.
    assert len(losses) == 60
    assert losses[-1] < losses[0] - 0.3
    assert set(phases.seconds()) == {"forward", "backward", "optimizer", "stabilizer"}
    assert sum(phases.seconds().values()) == pytest.approx(phases.marks[-1][1] - phases.marks[0][1])
    assert all(seconds > 0 for seconds in phases.seconds().values())


def test_the_step_is_that_of_a_run(tmp_path: Path, tiny_data: list[str]) -> None:
    settings = ["attention=mla", "stabilizer=quack", *SMALL, "model.vocab_size=512", "optimizer.warmup_steps=0"]
    config = compose([*suites.BASE, *settings, *tiny_data, "trainer.steps=1", f"run_dir={tmp_path}"])
    run = build_run(check_run(config))
    step = TrainingStep(config, HERE)
    step.micro_batches = list(run.batches.micro_batches(0))
    set_lr(step.optimizers, 1.0)
    train(run)
    step(Phases(HERE.device))
    for (name, one), other in zip(run.model.named_parameters(), step.model.parameters(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("peer", suites.PEERS)
def test_a_peer_has_the_parameters_of_our_model(peer: str) -> None:
    variants = suites.variants("peers")
    ours, theirs = (
        make_step(name, compose([*suites.BASE, *variants[name], *SMALL]), HERE) for name in (f"ours, as {peer}", peer)
    )
    assert sum(p.numel() for p in ours.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    assert suites.baselines(list(variants))[f"ours, as {peer}"] == peer
    assert ours.tokens_per_step == theirs.tokens_per_step


def test_the_command_prints_a_table_and_writes_each_turn(tmp_path: Path) -> None:
    out = tmp_path / "new" / "turns.jsonl"
    few = ("rounds=2", "steps=1", "warmup=1", "only=none,quack", f"out={out}")
    code, stdout, stderr = call("bench", "suite=stabilizers", *few, *SMALL)
    assert (code, stderr) == (0, "")
    rows = [line.split() for line in stdout.splitlines()]
    assert [row[0] for row in rows[2:4]] == ["none", "quack"]
    turns = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((turn["round"], turn["variant"]) for turn in turns) == [
        (i, n) for i in (0, 1) for n in ("none", "quack")
    ]
    assert {turn["suite"] for turn in turns} == {"stabilizers"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to compare: suite=stabilizers"),
        (["suite=stabilisers"], "suite=stabilisers is unknown; choose one of: stabilizers"),
        (["suite=compile", "only=eagre"], "has no eagre; it has: eager, compiled"),
        (["suite=compile", "rounds=0"], "rounds=0 must be an integer from 1 to 9999"),
        (["suite=compile", "model.width=3"], "model.width"),
        (["suite=compile", "--fast"], "--fast"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("bench", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr
