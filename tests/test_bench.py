"""The benchmark: its steps are the trainer's, its ratios are those of the rounds, and its suites resolve."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from calls import call

from quack_lm.bench import suites
from quack_lm.bench.build import make_step
from quack_lm.bench.isolated import IsolatedStep
from quack_lm.bench.kernels import count_kernels, count_stabilizer_calls
from quack_lm.bench.muon import MuonStep
from quack_lm.bench.peers import make_peer_step
from quack_lm.bench.plot import decode_plot
from quack_lm.bench.ranks import LaunchedStep
from quack_lm.bench.rounds import Summary, Turn, busy_rounds, kept_rounds, measure, summarize
from quack_lm.bench.run_step import RunStep
from quack_lm.bench.step import Phases, Timing, TrainingStep
from quack_lm.bench.trace import STEPS, trace
from quack_lm.cli.bench import read
from quack_lm.config import choices, compose
from quack_lm.errors import UserError
from quack_lm.files import take_lock
from quack_lm.model import Transformer, count_parameters
from quack_lm.optim.recipe import set_lr
from quack_lm.parallel import World
from quack_lm.training.build import build_run, make_model
from quack_lm.training.check import check_run
from quack_lm.training.checkpoint import list_checkpoints
from quack_lm.training.loop import train

SMALL = ("model.d_model=32", "model.n_layers=2", "model.n_heads=4", "model.d_ff=48", "model.vocab_size=64")
SMALL += ("trainer.seq_len=16", "trainer.micro_batch_size=2", "trainer.global_batch_size=4", "trainer.device=cpu")
HERE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_variant_of_a_suite_is_a_run_that_could_be_made(suite: str) -> None:
    command = read([f"suite={suite}"])
    seen = {
        json.dumps([{**vars(one), "settings": None}, command.configs[name]]) for name, one in command.variants.items()
    }
    assert len(seen) == len(command.variants)
    assert set(suites.baselines(command.variants).values()) <= set(command.variants)


def test_what_the_chosen_variants_have_anyway_may_be_said() -> None:
    assert list(read(["suite=stabilizers", "only=quack", "stabilizer=quack"]).variants) == ["quack"]


def test_a_chosen_model_or_experiment_has_its_own_sizes() -> None:
    for chosen, seq_len in (("model=1b", 512), ("experiment=paper", 2048)):
        config = read(["suite=compile", chosen, "model.n_layers=8"]).configs["eager"]
        sizes = [config["model"][key] for key in ("d_model", "n_heads", "d_ff", "n_layers")]
        assert (sizes, config["trainer"]["seq_len"]) == ([2048, 32, 8192, 8], seq_len)
        assert not config["trainer"]["compile"]


def test_ratios_are_taken_within_a_round_so_that_a_slow_machine_changes_none() -> None:
    speed = (1.0, 3.0, 1.5, 1.2, 2.0, 5.0)
    turns = [
        Turn(name, i, s * t, {"forward": s * t}, None, 1.0) for i, s in enumerate(speed) for name, t in TIMES.items()
    ]
    first, second = summarize({"a": "a", "b": "a"}, turns, set(range(6)))
    assert (first.ratio, first.interval, first.step_s) == (1.0, None, 3.5)
    assert second.ratio == pytest.approx(1.25)
    assert second.interval == (pytest.approx(1.25), pytest.approx(1.25))
    assert second.phases_s == {"forward": pytest.approx(4.375)}


TIMES = {"a": 2.0, "b": 2.5}


def test_the_fastest_ratio_is_of_the_fastest_time_of_each_phase() -> None:
    phases = {"a": [(1.0, 4.0), (3.0, 2.0)], "b": [(2.0, 9.0), (2.5, 3.0)]}
    turns = [
        Turn(name, i, sum(own), dict(zip(("forward", "backward"), own, strict=True)), None, 1.0)
        for name, rounds in phases.items()
        for i, own in enumerate(rounds)
    ]
    (_, found) = summarize({"a": "a", "b": "a"}, turns, {0, 1})
    assert found.fastest_ratio == pytest.approx((2.0 + 3.0) / (1.0 + 2.0))
    without = [Turn(turn.variant, turn.round, turn.step_s, {}, None, 1.0) for turn in turns]
    (_, found) = summarize({"a": "a", "b": "a"}, without, {0, 1})
    assert found.fastest_ratio == pytest.approx(5.5 / 5.0)


def test_a_round_in_which_the_machine_was_busy_is_left_out() -> None:
    turns = [Turn(name, i, 1.0, {}, None, 2.0 if (name, i) == ("b", 1) else 1.0) for i in range(5) for name in "ab"]
    assert (kept_rounds(turns), busy_rounds(turns)) == ({0, 2, 3, 4}, {1})
    # If nearly every round is busy, that is how the machine is.
    turns = [Turn("a", i, 1.0, {}, None, 1.0 + i % 2) for i in range(4)]
    assert (kept_rounds(turns), busy_rounds(turns)) == ({0, 1, 2, 3}, {1, 3})


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
    assert set(phases.seconds()) == {"data", "forward", "backward", "optimizer", "stabilizer"}
    assert sum(phases.seconds().values()) == pytest.approx(phases.marks[-1][1] - phases.marks[0][1])
    assert all(seconds > 0 for seconds in phases.seconds().values())


@pytest.mark.parametrize("masks", ["true", "false"])
def test_the_step_is_that_of_a_run(masks: str, tmp_path: Path, tiny_data: list[str]) -> None:
    settings = ["attention=mla", "stabilizer=quack", *SMALL, "model.vocab_size=512", "optimizer.warmup_steps=0"]
    settings.append(f"data.mask_documents={masks}")
    config = compose([*suites.BASE, *settings, *tiny_data, "trainer.steps=1", f"run_dir={tmp_path}"])
    run = build_run(check_run(config))
    step = TrainingStep(config, HERE)
    assert (step.model.eot_id is None) == (run.model.eot_id is None)
    step.batches, step.model.eot_id = run.batches, run.model.eot_id
    set_lr(step.optimizers, 1.0)
    train(run)
    step(Phases(HERE.device))
    for (name, one), other in zip(run.model.named_parameters(), step.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_the_parts_around_the_step_are_those_of_a_run(tmp_path: Path, tiny_data: list[str]) -> None:
    settings = ["stabilizer=quack", *SMALL, *tiny_data, "model.vocab_size=512", "optimizer.warmup_steps=0"]
    settings += ["trainer.steps=6", "trainer.probe_every=3", "trainer.checkpoint_every=3", "logger.log_every=2"]
    config = compose([*suites.BASE, *settings, f"run_dir={tmp_path / 'run'}"])
    run = build_run(check_run(config))
    step = RunStep(config, HERE, tmp_path / "step", ("data", "log", "probe", "checkpoint"))
    assert 0 < step.run.state.step < 3  # so that a checkpoint does not end a turn
    step.run.state.step = 0
    step.batches = step.run.batches = run.batches
    step.run.probe.batches = run.probe.batches
    step.lr = set_lr(step.optimizers, 1.0)
    train(run)
    timing = step.turn(6)
    assert {"data", "logging", "probe", "checkpoint"} < set(timing.phases_s)
    theirs, ours = (
        [json.loads(line) for line in place.metrics_file.open()] for place in (run.run_dir, step.run.run_dir)
    )
    theirs = [line for line in theirs if line["step"]]
    clock = {"throughput/tokens_per_s", "throughput/mfu"}
    validation = {"val/loss", "val/bits_per_byte"}
    of_ends = {*validation, *(key for key in theirs[0] if key.startswith(("logits/", "quack/", "norms/")))}
    for one, other in zip(theirs, ours, strict=True):
        # A run probes its first step too, and validates.
        assert one.keys() - other.keys() <= (of_ends if one["step"] == 1 else validation)
        assert other == {key: other[key] if key in clock else one[key] for key in other}
    assert "logits/max" in ours[2]
    for place in (run.run_dir, step.run.run_dir):
        assert [path.name for path in list_checkpoints(place.checkpoints)] == ["step_00000003", "step_00000006"]


PEERS = {name: one for name, one in suites.SUITES["peers"].variants.items() if one.peer}


@pytest.mark.parametrize("peer", PEERS)
def test_a_peer_trains_the_parameters_of_our_model(peer: str, tmp_path: Path) -> None:
    package = PEERS[peer].package
    if package and not find_spec(package):
        pytest.skip(f"{package} is not installed: {suites.INSTALL}")
    config = compose([*suites.BASE, *PEERS[peer].settings, *SMALL])
    ours = TrainingStep(config, HERE)
    theirs = make_peer_step(peer, config, HERE, tmp_path)
    assert sum(p.numel() for p in ours.model.parameters()) == sum(p.numel() for p in theirs.model.parameters())
    assert ours.tokens_per_step == theirs.tokens_per_step
    before = [p.detach().clone() for p in theirs.model.parameters()]
    assert theirs.turn(2).step_s > 0
    assert all(not torch.equal(p, old) for p, old in zip(theirs.model.parameters(), before, strict=True))


def test_a_turn_of_several_ranks_is_made_by_so_many_processes(tmp_path: Path) -> None:
    command = read(["suite=ranks", "only=ranks weak 2", *SMALL])
    config, settings = command.configs["ranks weak 2"], command.settings["ranks weak 2"]
    step = LaunchedStep(settings, config["trainer"], 2, tmp_path)
    assert step.tokens_per_step == 2 * 4 * 16
    assert step.turn(1).phases_s.keys() == {"data", "forward", "backward", "optimizer", "stabilizer"}
    assert step.memory_bytes > 0


def test_ranks_share_a_batch_or_have_as_much_each() -> None:
    trainers = {name: config["trainer"] for name, config in read(["suite=ranks"]).configs.items()}
    batches = {name: (one["global_batch_size"], one["micro_batch_size"]) for name, one in trainers.items()}
    assert batches == {
        "ranks strong 1": (8, 8),
        "ranks strong 2": (8, 4),
        "ranks strong 4": (8, 2),
        "ranks weak 2": (16, 8),
        "ranks weak 4": (32, 8),
    }


def test_the_kernels_of_a_graph_are_counted_with_the_bytes_that_they_move() -> None:
    table = torch.randn(50, 7, requires_grad=True)
    weight = torch.randn(7, 11, requires_grad=True)

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return ((table[:30] @ weight).sin() + tokens[:, None]).square().sum()

    found = count_kernels(loss, torch.arange(30))
    # Forward: one product, and one kernel for all behind it. Backward: one kernel before two products, and one that
    # puts the 30 rows of a gradient among the 50.
    assert (found.forward, found.backward, found.matrix_products) == (1, 2, 3)
    product, rows = 30 * 11 * 4, 30 * 8
    forward = product + rows + 4
    backward = 4 + rows + 2 * product + (30 + 50) * 7 * 4
    assert found.bytes == forward + backward
    assert (found.attentions, found.other_calls) == (0, 0)


def test_a_stabilizer_calls_operators_only_for_what_it_does() -> None:
    counts = {}
    for name in ("none", "quack"):
        for layers in (1, 3):
            step = TrainingStep(compose([*suites.BASE, *SMALL, f"stabilizer={name}", f"model.n_layers={layers}"]), HERE)
            counts[name, layers] = count_stabilizer_calls(step)
    # The optimizers' own operators are not among them, and the layers are stacked.
    assert counts["none", 1] == counts["none", 3] == 0
    assert counts["quack", 1] == counts["quack", 3] > 0


def test_the_optimizers_of_the_suite_muon_make_the_same_step() -> None:
    config = compose([*suites.BASE, *SMALL, "optimizer=muon", "optimizer.lr=1"])
    ours, theirs = (MuonStep(config, HERE, is_ours=is_ours) for is_ours in (True, False))
    before = [p.detach().clone() for p in theirs.optimizer.param_groups[0]["params"]]
    assert ours.turn(1).phases_s.keys() == theirs.turn(1).phases_s.keys() == {"optimizer"}
    groups = [step.optimizer.param_groups[0]["params"] for step in (ours, theirs)]
    assert len(before) == 14
    for one, other, start in zip(*groups, before, strict=True):
        # In bfloat16, like the iteration.
        assert (one - other).norm() < 0.02 * (other - start).norm()


def test_a_decode_step_adds_a_token_behind_the_context_of_the_cache() -> None:
    names = ("mla 128", "mla qk_norm absorbed 128", "mla qk_norm materialized 128", "mha 128", "gqa 128")
    command = read(["suite=decode", f"only={','.join(names)}", *(one for one in SMALL if "seq_len" not in one)])
    sizes = {}
    for name in names:
        config = command.configs[name]
        config["attention"] |= {"n_kv_heads": 2} if name.startswith("gqa") else {}
        step = make_step(command.variants[name], config, command.settings[name], HERE, Path("nowhere"))
        for _ in range(2):
            assert step.turn(2).phases_s.keys() == {"forward"}
            assert step.cache.length == step.cache.layers[0].length == 128 + 1
        sizes[name] = step.cache_bytes
    # Width 32, 4 heads: a latent of 16 and a rotary key of 8; keys of 16 and values of 16; keys and values of 8.
    assert list(sizes.values()) == [4 * n for n in (16 + 8, 16 + 8 + 4, 4 * (16 + 16), 4 * (8 + 8), 2 * (8 + 8))]


def test_variants_that_differ_in_the_context_alone_share_a_model() -> None:
    command = read(["suite=decode", *(setting for setting in SMALL if "seq_len" not in setting)])
    names = ("mla 128", "mla 512", "mla qk_norm absorbed 128", "mla qk_norm materialized 128")
    steps = [make_step(command.variants[n], command.configs[n], command.settings[n], HERE, Path(n)) for n in names]
    assert [step.context for step in steps] == [128, 512, 128, 128]
    assert steps[0].model is steps[1].model
    assert len({id(step.model) for step in steps}) == 3


def test_the_plot_of_decoding_has_a_line_for_each_cache(tmp_path: Path) -> None:
    names = "mla 128,mla 512,mha 128,mha 512"
    few = ("rounds=2", "steps=1", "warmup=1", f"only={names}", f"out={tmp_path}/turns.jsonl")
    sizes = [setting for setting in SMALL if "seq_len" not in setting]
    code, stdout, stderr = call("bench", "suite=decode", *few, *sizes, f"plot={tmp_path}/new/decode.png")
    assert (code, stderr) == (0, "")
    header, _, *rows = stdout.splitlines()
    assert "cache B" in header
    assert [row.split()[:2] for row in rows[:4]] == [name.split() for name in names.split(",")]
    assert stdout.splitlines()[-1] == f"plot: {tmp_path}/new/decode.png"
    assert (tmp_path / "new" / "decode.png").read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines()]
    assert {(line["variant"], line["cache_bytes"]) for line in lines} == {
        *(("mla 128", 96), ("mla 512", 96), ("mha 128", 256), ("mha 512", 256))
    }
    found = [Summary(name, 1 / (i + 1), {}, None, "mla 128", 1.0, None, 1.0) for i, name in enumerate(names.split(","))]
    first, second = (
        decode_plot(found, {name: 96 if "mla" in name else 256 for name in names.split(",")}).panels[0].lines
    )
    assert (first.label, first.points) == ("mla: 96 B/token", [(128, 1.0), (512, 2.0)])
    assert (second.label, second.points) == ("mha: 256 B/token", [(128, 3.0), (512, 4.0)])


@pytest.mark.parametrize(
    ("suite", "only"),
    [("stabilizers", "none,quack"), ("checkpoint", "none,asynchronous"), ("kernels", "mha none")],
)
def test_the_command_prints_a_table_and_writes_each_turn(suite: str, only: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "turns.jsonl"
    few = ("rounds=2", "steps=2", "warmup=2", f"only={only}", f"out={out}", "trainer.checkpoint_every=2")
    code, stdout, stderr = call("bench", f"suite={suite}", *few, *SMALL, "model.n_layers=1")
    # A CUDA build of torch may say once that there is no GPU, when inductor is loaded.
    assert (code, [line for line in stderr.splitlines() if "No CUDA runtime" not in line]) == (0, [])
    names = only.split(",")
    header, _, *rows = stdout.splitlines()
    assert [row[: len(name)] for row, name in zip(rows, names, strict=False)] == names
    assert header.startswith("variant")
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["suite"] for line in lines} == {suite}
    assert list(out.parent.iterdir()) == [out]  # what the variants wrote is gone
    if suite == "kernels":
        assert [line["variant"] for line in lines] == names
        return
    assert sorted((line["round"], line["variant"]) for line in lines) == [(i, n) for i in (0, 1) for n in sorted(names)]
    for line in lines:
        assert line["tokens_per_s"] == pytest.approx(4 * 16 / line["step_s"])
        assert line["mfu"] > 0
        # Weights, their gradients, and two moments of some: in float32, and more for activations.
        assert line["memory_bytes"] > 3 * 4 * count_parameters(small_model())["total"]


def small_model() -> Transformer:
    return make_model(compose([*suites.BASE, *SMALL, "model.n_layers=1"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to compare: suite=stabilizers"),
        (["suite=stabilisers"], "suite=stabilisers is unknown; choose one of: stabilizers"),
        (["suite=stabilizers", "only=none,"], "the suite has no ''; it has: none,"),
        (["suite=stabilizers", "trainer.micro_batch_size=auto"], "trainer.micro_batch_size=auto is chosen where a run"),
        (["suite=kernels", "trace=a.json"], "trace=a.json: suite=kernels has no steps to trace here"),
        (["suite=ranks", "trace=a.json"], "trace=a.json: suite=ranks has no steps to trace here"),
        (["suite=compile", "only=eagre"], "has no 'eagre'; it has: eager, compiled"),
        (["suite=compile", "rounds=0"], "rounds=0 must be an integer from 1 to 9999"),
        (["suite=probe", "steps=60"], "steps=60 must be a multiple of trainer.probe_every=50"),
        (["suite=ranks", "trainer.global_batch_size=12"], "trainer.global_batch_size=12 must be a multiple of"),
        (["suite=compile", "model.width=3"], "model.width"),
        (["suite=compile", "trainer.compile=true"], "trainer.compile is what suite=compile sets; leave it out"),
        (["suite=compile", "--fast"], "--fast"),
        (["suite=compile", "plot=a.png"], "plot=a.png: suite=compile has no figure; decode and scaling have one"),
        (["suite=decode", "plot=a.svg"], "plot=a.svg must name a file that ends in .png or .pdf"),
        (["suite=compile", "suite=loss"], "suite=loss: suite=compile is given, too; choose one"),
        (["suite=loss", "trainer.seq_len=64"], "in pieces of 1024: a micro-batch has 512 tokens, which"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("bench", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["suite=backends", "only=flash,flex"], "flash, flex left out: no GPU here"),
        (
            ["suite=peers", "only=llama", "attention=mla"],
            "attention is what suite=peers sets; leave it out, or measure",
        ),
        (
            ["suite=peers", "only=llama", "optimizer=muon"],
            "optimizer is what suite=peers sets; leave it out, or measure",
        ),
        (["suite=muon", "optimizer=adamw"], "optimizer is what suite=muon sets; leave it out, or measure"),
        (
            ["suite=muon", "optimizer.ns_dtype=float32"],
            "mha torch has optimizer.ns_dtype=bfloat16, as torch's Muon has",
        ),
        (
            ["suite=peers", "only=llama", "trainer.activation_checkpointing=true"],
            "llama has trainer.activation_checkpointing=false; leave trainer.activation_checkpointing out",
        ),
        (["suite=peers", "only=llama", "attention.head_dim=7"], "attention.head_dim=7 must be even"),
        (["suite=stabilizers", "only=quack", "stabilizer=none"], "stabilizer is what suite=stabilizers sets"),
        (["suite=step", "trainer.init_from=x"], "trainer.init_from has no effect: a benchmark makes steps on random"),
        (
            ["suite=step", "trainer.seq_len=1000000000"],
            "trainer.micro_batch_size=2 sequences of trainer.seq_len=1000000",
        ),
        (
            ["suite=step", "trainer.global_batch_size=4000000000000"],
            "trainer.global_batch_size=4000000000000 sequences",
        ),
        (["suite=muon", "only=mha torch,mla ours"], "mla ours is relative to mla torch; name that, too"),
        (["suite=step", "out=a.json", "trace=a.json"], "trace=a.json is the file of out=, too"),
        (["suite=step", f"out={'a' * 300}"], "File name too long"),
        (["suite=peers", "only=llama", "data.mask_documents=true"], "llama masks no documents; leave data.mask_"),
        (["suite=step", "model.vocab_size=100000000", "model.d_model=1000000"], "model.vocab_size=100000000 is too"),
    ],
)
def test_what_cannot_be_compared_here_is_said_in_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("bench", *SMALL, *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


def test_a_result_replaces_no_pipe_and_no_link(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe.json", tmp_path / "link.json"
    os.mkfifo(pipe)
    link.symlink_to("elsewhere")
    for key, path in (("out", pipe), ("out", link), ("trace", pipe)):
        code, stdout, stderr = call("bench", "suite=step", f"{key}={path}", *SMALL)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1)
        assert f"{key}={path} must name a file, not a directory, a link, a pipe" in stderr


def test_two_benchmarks_do_not_write_one_file(tmp_path: Path) -> None:
    with (tmp_path / ".turns.jsonl.lock").open("w") as lock:
        assert take_lock(lock)
        code, stdout, stderr = call("bench", "suite=step", f"out={tmp_path}/turns.jsonl", *SMALL)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"out={tmp_path}/turns.jsonl is being written by another process" in stderr


class Step:
    tokens_per_step = 1
    steps = 0

    def turn(self, steps: int) -> Timing:
        self.steps += steps
        return Timing(1.0, {})


def test_every_rank_makes_the_steps_of_a_trace_and_the_first_writes_it(tmp_path: Path) -> None:
    step = Step()
    assert trace(step, tmp_path / "trace.json", World(1, 2, 1, HERE.device)) == []
    assert (step.steps, list(tmp_path.iterdir())) == (STEPS, [])
    trace(step, tmp_path / "trace.json", HERE)
    assert (step.steps, [path.name for path in tmp_path.iterdir()]) == (2 * STEPS, ["trace.json"])


def test_every_round_is_written_when_it_ends() -> None:
    seen: list[int] = []
    variants = {"a": Step(), "b": Step()}
    turns = measure(variants, device=HERE.device, rounds=3, steps=1, after_round=lambda turns: seen.append(len(turns)))
    assert (seen, len(turns)) == ([2, 4, 6], 6)


def test_a_step_in_a_process_of_its_own_is_timed_and_its_errors_are_told(tmp_path: Path) -> None:
    config = compose([*suites.BASE, *SMALL])
    variant = suites.Variant(is_isolated=True)
    step = make_step(variant, config, [], HERE, tmp_path)
    assert isinstance(step, IsolatedStep)
    timing = step.turn(2)
    assert sum(timing.phases_s.values()) == pytest.approx(timing.step_s, rel=0.1)
    # A float32 weight with its gradient, at least.
    assert step.memory_bytes > 8 * count_parameters(make_model(config))["total"]
    step.close()
    with pytest.raises(RuntimeError, match="ended with exit code 0"):
        step.turn(1)
    refused = make_step(variant, compose([*suites.BASE, *SMALL, "attention.backend=flash"]), [], HERE, tmp_path)
    with pytest.raises(UserError, match="flash"):
        refused.turn(1)
