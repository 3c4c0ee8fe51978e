"""Sweep files, plans, and real runs of a few steps."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from quack_lm.cli.sweep import KEYS
from quack_lm.config import compose, fingerprint, flatten, split_axes
from quack_lm.errors import UserError
from quack_lm.model import count_parameters
from quack_lm.report.status import status_table
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.cost import Speed, count_flops, estimate
from quack_lm.sweep.file import Point, StopRule, known_sweeps, load, override_value
from quack_lm.sweep.label import describe_differences, titles
from quack_lm.sweep.multirun import unnamed_name, unnamed_sweep, with_axes
from quack_lm.sweep.plan import SweepPlan, make_cells, read_plan, write_plan
from quack_lm.sweep.rule import Watch, forget_other_rules, record_stop, should_stop
from quack_lm.training.build import make_model
from quack_lm.training.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "sweep.py"

GRID = """\
# Which one? Held fixed: the rest.
base: [experiment=tiny]
grid:
  attention: [mha, mla]
  optimizer.lr: [0.003, 0.3]
  stabilizer:
    none: [stabilizer=none]
    loose: [stabilizer=qk_clip, stabilizer.threshold=100.0]
exclude:
  - {attention: mha, optimizer.lr: 3e-3}
extra:
  - [attention=mha, stabilizer=quack, stabilizer.tau=0.5]
seeds: [0, 1]
"""


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file and returns its path."""

    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


# ------------------------------------------------------------------------------------------------ the file


def test_grid_is_the_product_without_exclusions_and_with_extra_points_for_every_seed(write, tmp_path):
    cells = make_cells(load(write(GRID)), tmp_path)
    seen = [
        (
            cell.name.split("-")[0],
            cell.config["optimizer"]["lr"],
            cell.name.split("-")[1],
            cell.config["seed"],
        )
        for cell in cells
    ]
    expected = [("mha", 0.3), ("mla", 0.003), ("mla", 0.3)]
    # mha at 0.003 is excluded, written as 3e-3: numbers are compared as numbers.
    own_lr = compose(["experiment=tiny"])["optimizer"]["lr"]
    grid = [(a, lr, s) for a, lr in expected for s in ("none", "qk_clip")]
    # The whole sweep for one seed after the other.
    assert seen == [(*point, seed) for seed in (0, 1) for point in (*grid, ("mha", own_lr, "quack"))]
    assert cells[-1].config["stabilizer"]["tau"] == 0.5


def test_hydra_composes_each_choice_of_groups_once_and_every_cell_is_what_compose_makes(write, tmp_path, monkeypatch):
    # Hydra composed every cell: a plan of 5000 took eight minutes.
    module, composed = sys.modules["quack_lm.config.compose"], []
    hydra = module.hydra_compose
    monkeypatch.setattr(module, "hydra_compose", lambda *args, **options: composed.append(0) or hydra(*args, **options))
    cells = make_cells(load(write(GRID)), tmp_path)
    # Two attentions with none and qk_clip, and mha with quack.
    assert (len(cells), len(composed)) == (14, 5)
    monkeypatch.undo()
    assert [cell.config for cell in cells] == [compose(cell.overrides[2:]) for cell in cells]


def test_seeds_that_tune_and_seeds_that_judge_are_all_run_and_told_apart(write, tmp_path):
    sweep = load(write("# Why?\nbase: [experiment=tiny]\nseeds: {tune: [0, 1], judge: [2, 5]}\n"))
    assert [cell.config["seed"] for cell in make_cells(sweep, tmp_path)] == [0, 1, 2, 5]
    assert sweep.tune_seeds == [0, 1]
    plan = SweepPlan(sweep="s", question="q", command="c", cells=[], tune_seeds=sweep.tune_seeds)
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path).tune_seeds == [0, 1]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("{tune: [0, 1], judge: [1, 2]}", "both have 1"),
        ("{tune: [0, 1]}", r"seeds\.judge.*for example"),
        ("{tune: [], judge: [1]}", r"seeds\.tune.*for example"),
        ("{tune: [0], judge: [1], jury: [2]}", r"seeds\.jury.*for example"),
        ("{tune: [-1], judge: [1]}", r"seeds\.tune\.0=-1"),
    ],
)
def test_a_mistake_in_separate_seeds_is_named(seeds, message, write):
    with pytest.raises(UserError, match=message):
        load(write(f"# Why?\nseeds: {seeds}\n"))


def test_the_opening_comment_is_the_question(write):
    assert load(write(GRID)).question == "Which one? Held fixed: the rest."


def test_a_file_with_extra_points_only_has_no_bare_base_run(write):
    loaded = load(write("# Why?\nextra: [[seed=3], [seed=4]]\n"))
    assert loaded.points() == [Point(labels={}, overrides=[f"seed={s}"], seed=0) for s in (3, 4)]


@pytest.mark.parametrize(
    "value",
    ["plain", "with space", "it's", 'say "x"', "a=b, [c]", "back\\slash", "ends\\", "\\'", "", "$HOME;`ls`", "é"],
)
def test_any_text_survives_as_an_override(value):
    assert compose(["experiment=tiny", f"data.dir={override_value(value)}"])["data"]["dir"] == value


@pytest.mark.parametrize("value", [True, False, 3, 0.25, "3e-3"])
def test_plain_values_stay_as_they_are(value):
    assert override_value(value) == str(value).lower()


SCALES = """\
# Why?
base: [experiment=tiny]
grid: {attention: [mha, mla], optimizer.lr: [0.003, 0.3]}
seeds: [0]
scales:
  big: [model=100m]
  small: {base: [trainer.steps=7], grid: {optimizer.lr: [0.1]}, seeds: [0, 1], exclude: [{attention: mha, seed: 1}]}
"""


def test_a_scale_joins_its_overrides_and_replaces_axes_and_seeds(write, tmp_path):
    big = make_cells(load(write(SCALES), "big"), tmp_path)
    assert len(big) == 4
    assert {cell.config["model"]["n_layers"] for cell in big} == {10}
    small = make_cells(load(write(SCALES), "small"), tmp_path)
    seen = [(c.name.split("-")[0], c.config["optimizer"]["lr"], c.config["seed"]) for c in small]
    # The seed is an axis that an exclusion may name.
    assert seen == [("mha", 0.1, 0), ("mla", 0.1, 0), ("mla", 0.1, 1)]
    assert {cell.total_steps for cell in small} == {7}
    assert load(write(SCALES), "small").name == "mine-small"


# ------------------------------------------------------------------------------------------------ the paper's sweeps


def test_fig_2_at_full_size_is_72_runs_a_seed_that_all_build(tmp_path):
    cells = make_cells(load("paper/fig2", "1b"), tmp_path)
    assert len(cells) == 72
    places = {(c.name.split("-")[0], c.config["optimizer"]["lr"]) for c in cells}
    assert places == {(a, lr) for a in ("mha", "mla") for lr in (3e-4, 3e-3, 3e-2)}
    shapes = {}
    for cell in cells:
        assert cell.config["trainer"]["steps"] == 5000
        assert cell.tokens_per_step == 196_608
        n_parameters = count_parameters(make_model(cell.config))["total"]
        kind = (cell.config["attention"]["_target_"], "qk_norm" in cell.name)
        assert shapes.setdefault(kind, n_parameters) == n_parameters
    assert all(0.9e9 < n < 1.3e9 for n in shapes.values())


# The tests before and after this one resolve Fig. 2, the largest.
@pytest.mark.parametrize("name", [n for n in known_sweeps() if n.startswith("paper/") and n != "paper/fig2"])
def test_the_papers_sweeps_resolve_at_both_scales(name, tmp_path):
    for scale in ("1b", "proxy"):
        assert make_cells(load(name, scale), tmp_path)


def test_fig_2_at_proxy_scale_has_the_papers_rates_by_steps_times_rate_and_others_about_them():
    sweep = load("paper/fig2", "proxy")
    rates = sorted(float(lr) for lr in sweep.grid["optimizer.lr"])
    steps = compose(["experiment=tiny"])["trainer"]["steps"]
    for paper in (3e-4, 3e-3, 3e-2):
        nearest = min(rates, key=lambda lr: abs(math.log(lr * steps / (paper * 5000))))
        assert nearest != rates[0]
        assert nearest == pytest.approx(paper * 5000 / steps, rel=0.26)
    assert (sweep.tune_seeds, len(sweep.seeds), len(sweep.points())) == ([0, 1, 2], 8, 2 * 6 * 12 * 8)


# ------------------------------------------------------------------------------------------------ rule and cost

RULE = StopRule(loss_above_best=2.0, for_steps=3)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9, 9, 9], True),
        ([9, 9], False),  # not for long enough
        ([9, 9, 9, 1], False),  # it has recovered
        ([9, 9, 8], False),  # twice the best is not above twice the best
        ([math.inf] * 3, True),
    ],
)
def test_a_cell_is_hopeless_after_enough_steps_in_a_row_above_the_best(losses, expected):
    best = dict.fromkeys(range(1, 5), 4.0)
    assert should_stop(dict(enumerate(losses, start=1)), best, RULE) is expected


def test_flops_are_counted_once_per_distinct_model(write, tmp_path):
    cells = make_cells(load(write(GRID)), tmp_path)
    counted = []
    flops = count_flops(cells, lambda config: counted.append(config) or 2.0)
    assert flops == {cell.name: 2.0 * cell.total_tokens for cell in cells}
    # Two attentions with none and qk_clip, and mha with quack.
    assert len(counted) == 5


def test_hours_come_from_an_assumed_speed_or_from_the_runs_that_were_made(write, tmp_path):
    cells = make_cells(load(write(TWO)), tmp_path)
    flops = dict.fromkeys((cell.name for cell in cells), 3.6e15)
    assert estimate(cells, flops).hours is None
    assert estimate(cells, flops, Speed(mfu=0.5, tflops=1.0)).hours == pytest.approx(2 * 3.6e15 / 0.5e12 / 3600)
    cells[0].run_dir.path.mkdir()
    # 50 tokens/s of training, and with what is done between the steps 40.
    summary = {"status": "completed", "tokens": 1000, "elapsed_s": 20.0, "outside_s": {"probe": 2.0, "validation": 3.0}}
    cells[0].run_dir.summary_file.write_text(json.dumps(summary))
    cost = estimate(cells, flops)
    hours = cells[0].total_tokens / 40 / 3600
    assert (cost.hours, cost.hours_left) == (pytest.approx(2 * hours), pytest.approx(hours))


def test_the_rule_reads_past_a_damaged_line(write, tmp_path):
    good, bad = make_cells(load(write(TWO)), tmp_path)
    for cell, loss in ((good, 1.0), (bad, 9.0)):
        cell.run_dir.path.mkdir()
        lines = [json.dumps({"step": step, "train/loss": loss}) for step in range(1, 5)]
        lines[1:1] = ["garbage", "[" * 5000, '{"step": "x", "train/loss": 1}'] if loss > 1 else []
        cell.run_dir.metrics_file.write_text("\n".join(lines) + "\n")
    assert Watch(RULE, [good, bad]).cells_to_stop([good, bad]) == [bad]


def test_runs_are_told_apart_by_what_they_have_and_others_have_not(write, tmp_path):
    text = """\
# Why?
base: [experiment=tiny, attention=mla, stabilizer=quack]
grid: {stabilizer.tau: [0.1, 1.0], optimizer.max_grad_norm: [null, 1.0]}
"""
    cells = make_cells(load(write(text)), tmp_path)
    assert list(titles(cells).values()) == [
        "mla quack tau=0.1 lr 0.03 seed 0",
        "mla quack tau=0.1 lr 0.03 max_grad_norm=1 seed 0",
        "mla quack tau=1 lr 0.03 seed 0",
        "mla quack tau=1 lr 0.03 max_grad_norm=1 seed 0",
    ]


def test_differences_are_split_into_the_stabilizers_settings_and_the_others():
    base = ["experiment=tiny", "attention=mla", "stabilizer=quack"]
    varied = [["stabilizer.tau=0.1"], ["stabilizer.tau=1.0"], ["stabilizer.tau=0.1"], ["stabilizer.tau=1.0"]]
    varied[3].append("attention.v_dim=16")
    differences = describe_differences([compose([*base, *own]) for own in varied])
    assert differences == [("tau=0.1", ""), ("tau=1", ""), ("tau=0.1", ""), ("tau=1", "v_dim=16")]


# ------------------------------------------------------------------------------------------------ from a command line

LINE = ["experiment=tiny", "attention=mha,mla", "stabilizer=none,quack", "optimizer.lr=3e-3,3e-2", "seed=range(0,2)"]


def line_cells(line, directory):
    return make_cells(unnamed_sweep(line), directory, split_axes(line)[0])


def test_a_line_with_several_values_is_the_same_runs_as_a_file(write, tmp_path):
    text = """\
# Why?
base: [experiment=tiny]
grid: {attention: [mha, mla], stabilizer: [none, quack], optimizer.lr: [0.003, 0.03]}
seeds: [0, 1]
"""
    from_file = make_cells(load(write(text)), tmp_path)
    from_line = line_cells(LINE, tmp_path)
    assert [cell.run_dir for cell in from_line] == [cell.run_dir for cell in from_file]
    assert from_line[0].fingerprint == fingerprint(compose(from_line[0].arguments()))


def test_a_line_has_one_directory_whatever_the_order_of_its_keys():
    assert unnamed_name(LINE) == unnamed_name(LINE[::-1])
    assert unnamed_name(LINE) != unnamed_name([*LINE, "trainer.steps=9"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["trainer=tiny,paper"], [("trainer.steps", 400), ("trainer.steps", 5000)]),
        (["seed=choice(3,5)"], [("seed", 3), ("seed", 5)]),
        (["trainer.steps=range(5,8)", "seed=4"], [("trainer.steps", 5), ("trainer.steps", 6), ("trainer.steps", 7)]),
        (["logger.tags=[a,b],[c]"], [("logger.group", None)]),  # tags are no part of what a run computes
        (["data.dir='it,s','b'"], [("data.dir", "it,s"), ("data.dir", "b")]),
        (["optimizer=glob(muon*)"], [("optimizer.momentum", 0.95), ("optimizer.momentum", 0.95)]),
    ],
)
def test_several_values_follow_hydras_grammar(line, expected, tmp_path):
    cells = line_cells(["experiment=tiny", *line], tmp_path)
    assert [(key, flatten(cell.config)[key]) for cell, (key, _) in zip(cells, expected, strict=True)] == expected


def test_a_line_adds_axes_to_a_file_and_to_its_extra_points(write, tmp_path):
    text = "# Why?\nbase: [experiment=tiny, optimizer.lr=0.3]\ngrid: {attention: [mha]}\nextra: [[stabilizer=quack]]\n"
    grown = with_axes(load(write(text)), split_axes(["optimizer.lr=0.1,0.2", "seed=1,2"])[1])
    cells = make_cells(grown, tmp_path)
    seen = [(c.name.split("-")[1], c.config["optimizer"]["lr"], c.config["seed"]) for c in cells]
    assert seen == [(s, lr, seed) for seed in (1, 2) for s in ("none", "quack") for lr in (0.1, 0.2)]
    assert "Varied on the command line: optimizer.lr = 0.1, 0.2; seed = 1, 2." in grown.question
    with pytest.raises(UserError, match="attention=mha,mla: the sweep mine sets attention itself"):
        with_axes(load(write(text)), split_axes(["attention=mha,mla"])[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["seed=3"], r"say which sweep: sweep=quickstart, or give a key several values"),
        (["seed=1,x"], r"seed=1,x: a seed is an integer"),
        (["seed=1,2", "seed=3"], r"seed=3: the sweep multirun-\w+ sets this key itself"),
        (["seed=1,2", "seed=3,4"], r"seed=3,4: seed has several values already"),
        (["run_dir=a,b"], r"run_dir=a: a sweep names the directories of its runs itself"),
        (["optimizer.lr=interval(0,1)"], r"interval is continuous"),
        (["seed=range(0,20000)"], r"make 10001 runs, above 10000"),
        (["optimizer=glob(x*)"], r"optimizer: the list of values is empty"),
        (["stabilizer=none,quak"], r"stabilizer=quak: did you mean quack\?"),
        (["seed=0,1", "hydra.sweep.dir=x"], r"dir=\.\.\. is the directory of several runs"),
    ],
)
def test_a_mistake_in_a_line_is_named(line, message, tmp_path):
    with pytest.raises(UserError, match=message):
        line_cells(["experiment=tiny", *line], tmp_path)


def test_a_run_stopped_by_a_rule_that_is_gone_goes_on(write, tmp_path):
    cell = make_cells(load(write(TWO)), tmp_path)[0]
    cell.run_dir.path.mkdir()
    cell.run_dir.summary_file.write_text(json.dumps({"status": "interrupted", "step": 3}))
    record_stop(cell, RULE)
    forget_other_rules([cell], RULE)
    assert cell.run_dir.status() == "stopped by rule"
    assert cell.is_finished()
    forget_other_rules([cell], None)
    assert cell.run_dir.status() == "interrupted"
    assert not cell.is_finished()


# ------------------------------------------------------------------------------------------------ the plan


def test_growing_a_grid_keeps_the_directories_it_had(write, tmp_path):
    small = make_cells(load(write("# Why?\nbase: [experiment=tiny]\ngrid: {attention: [mha]}\n")), tmp_path)
    grown = """\
# Why?
base: [experiment=tiny]
grid:
  optimizer.warmup_steps: [40, 50]
  attention: [mla, mha]
seeds: [1, 0]
"""
    large = make_cells(load(write(grown)), tmp_path)
    assert len(large) == 8
    assert small[0].config["optimizer"]["warmup_steps"] == 40
    assert small[0].run_dir in [cell.run_dir for cell in large]


def test_a_cell_is_identified_by_its_config_and_duplicates_are_one_run(write, tmp_path):
    text = "# Why?\nbase: [experiment=tiny]\ngrid: {attention: [mha, mla]}\nextra: [[attention=mla]]\n"
    cells = make_cells(load(write(text)), tmp_path)
    assert len(cells) == 2
    for cell in cells:
        assert cell.fingerprint == fingerprint(compose(cell.arguments()))
        assert cell.name.endswith(cell.fingerprint)


def test_a_plan_survives_being_written_moved_and_read(write, tmp_path):
    cells = make_cells(load(write(GRID)), tmp_path / "old")
    write_plan(tmp_path / "old", SweepPlan(sweep="s", question="q", command="c", cells=cells))
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["plan.json"]
    (tmp_path / "old").rename(tmp_path / "new")
    plan = read_plan(tmp_path / "new")
    assert (plan.sweep, plan.question, plan.command) == ("s", "q", "c")
    assert [cell.config for cell in plan.cells] == [cell.config for cell in cells]
    assert [cell.run_dir for cell in plan.cells] == [RunDir(tmp_path / "new" / cell.name) for cell in cells]


def test_a_plan_shows_its_progress_on_a_terminal_and_nothing_in_a_file(write, tmp_path):
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    with open(tmp_path / "log", "wb") as log:
        for output in (stderr, log):
            command = [sys.executable, SCRIPT, "plan", f"sweep={write(TWO)}", f"dir={tmp_path}"]
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=output, check=True)
    os.set_blocking(terminal, False)
    assert b"plan:   0%" in os.read(terminal, 10_000)
    assert (tmp_path / "log").read_bytes() == b""


def test_the_quickstart_compares_every_stabilizer_on_both_attentions(tmp_path):
    cells = make_cells(load("quickstart"), tmp_path)
    names = {tuple(cell.name.split("-")[:2]) for cell in cells}
    stabilizers = ("none", "fixed", "qk_norm", "qk_clip", "quack")
    assert names == {(a, s) for a in ("mha", "mla") for s in stabilizers}
    assert len(cells) == 10


def test_a_run_that_no_sweep_started_is_running_too(tmp_path):
    run_dir = RunDir(tmp_path)
    assert run_dir.status() == "pending"
    with run_dir.claim():
        assert run_dir.status() == "running"
    run_dir.summary_file.write_text(json.dumps({"status": "running", "step": 1}))
    assert run_dir.status() == "killed"


def test_status_reads_step_loss_and_rate_from_lines_of_any_length(write, tmp_path):
    # The last line was longer than the part of the file that was read.
    cell = make_cells(load(write(TWO)), tmp_path)[0]
    cell.run_dir.path.mkdir()
    heads = [[1.0] * 128] * 200
    lines = [
        {"step": 1, "train/loss": 4.0, "throughput/tokens_per_s": 41234.5},
        {"step": 2, "train/loss": 3.5, "logits/max_per_head": heads},
        {"step": 3, "val/loss": 3.25, "logits/max_per_head": heads, "logits/delta_mean_per_head": heads},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + json.dumps({"step": 4, "train/loss": 3.0})[:-3]
    cell.run_dir.metrics_file.write_text(text)
    assert re.search(r"pending +3 +400 +3\.500 +41\.2k ", status_table([cell]))


def test_the_end_of_a_log_counts_a_repainted_progress_bar_once(tmp_path):
    run_dir = RunDir(tmp_path)
    run_dir.log_file.write_bytes(b"start\n 1%|#\r 2%|##\r 3%|###\nTraceback\n\nValueError: x\n")
    assert run_dir.last_log_lines(3) == [" 3%|###", "Traceback", "ValueError: x"]


# ------------------------------------------------------------------------------------------------ real runs


SMALL = [
    "trainer.seq_len=16",
    "trainer.global_batch_size=2",
    "trainer.micro_batch_size=2",
    "trainer.val_sequences=2",
    "trainer.probe_sequences=2",
    "trainer.val_every=5",
    "trainer.probe_every=5",
    "trainer.checkpoint_every=5",
    "optimizer.warmup_steps=2",
]
TWO = "# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [none, quack]}\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A small prepared data set, in a directory whose name has a space and a quote."""
    folder = tmp_path_factory.mktemp("it's text")
    (folder / "source").mkdir()
    for i in range(40):
        lines = [f"def function_{i}_{j}(x): return x * {i + j} + {j}  # {'spam ' * (j % 7)}" for j in range(60)]
        (folder / "source" / f"{i}.txt").write_text("\n".join(lines))
    directory = folder / "data"
    command = [
        *(sys.executable, ROOT / "scripts" / "prepare_data.py", "data=local"),
        f"data.dir={override_value(str(directory))}",
        f"data.files=[{override_value(str(folder / 'source' / '*.txt'))}]",
        *("data.vocab_size=300", "data.val_fraction=0.2", "data.probe_fraction=0.2"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return directory


@pytest.fixture
def start(write, tmp_path, data):
    """Starts scripts/sweep.py on a sweep file as a process of its own."""

    def start(text: str, *more: str, steps: int = 10) -> subprocess.Popen[str]:
        overrides = [*SMALL, f"trainer.steps={steps}", "data.vocab_size=300"]
        overrides += [] if "data.dir" in text else [f"data.dir={override_value(str(data))}"]
        command = [sys.executable, SCRIPT, "run", f"sweep={write(text)}", f"dir={tmp_path / 'runs'}", *overrides, *more]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def test_a_sweep_trains_its_cells_and_a_second_call_reuses_them(start, tmp_path):
    code, out, err = finish(start(TWO))
    assert code == 0, err
    assert "2 runs: 2 completed" in out
    cells = read_plan(tmp_path / "runs").cells
    times = [cell.run_dir.metrics_file.stat().st_mtime_ns for cell in cells]
    assert [cell.steps_done() for cell in cells] == [10, 10]

    code, again, err = finish(start(TWO))
    assert code == 0, err
    assert again == out
    assert [cell.run_dir.metrics_file.stat().st_mtime_ns for cell in cells] == times

    status = subprocess.run(
        [sys.executable, SCRIPT, "status", f"dir={tmp_path / 'runs'}"], capture_output=True, text=True
    )
    assert "2 runs: 2 completed" in status.stdout
    assert "10  10" in status.stdout

    # A sweep that shares one of the runs, beside one of its own.
    mixed = TWO.replace("[none, quack]", "[quack, qk_norm]")
    code, out, err = finish(start(mixed, f"dir={tmp_path / 'other'}", f"reuse={tmp_path / 'runs'}"))
    assert code == 0, err
    assert f"1 runs reused from {tmp_path / 'runs'}" in out
    assert "2 runs: 2 completed" in out
    quack = next(cell for cell in cells if "quack" in cell.name)
    copy = tmp_path / "other" / quack.name
    assert (copy / "metrics.jsonl").read_bytes() == quack.run_dir.metrics_file.read_bytes()
    assert not (copy / "checkpoints").exists()


@pytest.mark.slow
def test_only_settings_that_the_tuning_seeds_select_are_judged(start, tmp_path):
    text = """# Why?
base: [experiment=tiny, optimizer.lr=0.3]
grid:
  method:
    none: [stabilizer=none]
    slow: [stabilizer=fixed, stabilizer.tau=0.001]
    full: [stabilizer=fixed, stabilizer.tau=1]
seeds: {tune: [0], judge: [1, 2]}
"""
    file = tmp_path / "runs/plan.json"
    code, out, err = finish(start(text, "jobs=2"))
    assert code == 0, err
    assert "7 runs: 7 completed" in out
    cells = read_plan(tmp_path / "runs").cells
    losses = {
        c.config["stabilizer"].get("tau"): c.run_dir.summary()["val_loss"] for c in cells if c.config["seed"] == 0
    }
    selected = min((loss, tau) for tau, loss in losses.items() if tau)[1]
    judged = sorted((c.config["seed"], c.config["stabilizer"].get("tau") or 0) for c in cells if c.config["seed"])
    assert judged == [(1, 0), (1, selected), (2, 0), (2, selected)]
    before = file.read_bytes()
    assert finish(start(text))[0] == 0
    assert file.read_bytes() == before.replace(b" jobs=2", b"")


def test_train_m_makes_an_unnamed_sweep_that_the_same_line_continues(tmp_path, data):
    fixed = [
        *SMALL,
        "experiment=tiny",
        "trainer.steps=2",
        f"data.dir={override_value(str(data))}",
        "data.vocab_size=300",
    ]
    line = [*fixed, "logger.progress=false", "stabilizer=none,quack"]

    def call(*arguments):
        command = [sys.executable, "-m", "quack_lm", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    directory = f"runs/{unnamed_name(line)}"
    out = call("train", "-m", *line)
    assert f"2 runs in {directory}" in out
    assert "2 runs: 2 completed" in out
    assert f"quack-lm sweep status dir={directory}" in out
    assert f"quack-lm report {directory}" in out
    # As a sweep, in another order: the same runs in the same directory.
    assert "2 runs, 0 unfinished" in call("sweep", "plan", *line[::-1])
    assert "2 runs: 2 completed" in call("sweep", "status", f"dir={directory}")


def test_a_crashed_cell_is_named_with_its_log_and_stops_nothing(start, tmp_path, data):
    # The first cell's kernel does not run here, which only its own process notices.
    own = f"data.dir={override_value(str(data))}"
    points = [[own, "attention.backend=flash", "trainer.device=cpu"], [own]]
    code, out, err = finish(start(f"# Why?\nbase: [experiment=tiny]\nextra: {json.dumps(points)}\n", "jobs=1"))
    assert code == 1
    assert "1 completed" in out
    assert "1 failed" in out
    assert "FAILED (exit code 2)" in err
    assert "attention.backend=flash" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_stopped_sweep_leaves_a_state_that_the_next_call_continues(start, tmp_path, how):
    process = start(TWO, steps=3000)
    wait_for_steps(tmp_path / "runs", 10)
    process.send_signal(how)
    code, _, err = finish(process)
    assert code == 128 + how, err
    assert "the same command continues" in err
    cells = read_plan(tmp_path / "runs").cells
    assert [cell.run_dir.status() for cell in cells] == ["interrupted", "interrupted"]


def test_runs_left_by_a_killed_sweep_are_waited_for_and_not_started_twice(start, tmp_path):
    process = start(TWO, steps=60)
    wait_for_steps(tmp_path / "runs", 1)
    process.kill()
    process.communicate()
    cells = read_plan(tmp_path / "runs").cells
    assert any(cell.run_dir.status() == "running" for cell in cells)
    code, out, err = finish(start(TWO, steps=60))
    assert code == 0, err
    assert "2 runs: 2 completed" in out
    for cell in cells:
        steps = [line["step"] for line in metrics(cell)]
        assert steps == sorted(set(steps))


ONE = TWO.replace("none, quack", "none")


def is_loaded(pid: int, library: str) -> bool:
    return library in Path(f"/proc/{pid}/maps").read_text()


# Moments of a run's start, each as a condition on its process and its directory.
MOMENTS = {
    "its log is made": lambda pid, run_dir: run_dir.log_file.exists(),
    "torch is imported": lambda pid, run_dir: is_loaded(pid, "libtorch_cpu.so"),
    "its directory is claimed": lambda pid, run_dir: run_dir.lock_file.exists(),
}


# A sweep passes the signal on; slurm sends it to the task itself, which becomes the run.
@pytest.mark.parametrize(
    ("verb", "moment", "number"),
    [
        ("run", "its log is made", signal.SIGINT),
        pytest.param("run", "its directory is claimed", signal.SIGHUP, marks=pytest.mark.slow),
        ("task", "its log is made", signal.SIGTERM),
        ("task", "torch is imported", signal.SIGTERM),
        pytest.param("run", "torch is imported", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("task", "its directory is claimed", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_stopped_at_its_start_is_interrupted_and_not_failed(verb, moment, number, write, tmp_path, data):
    # Without a handler yet, it ended like a crash: a log, and no summary.
    runs, settings = tmp_path / "runs", [*SMALL, "trainer.steps=4", "data.vocab_size=300"]
    settings += [f"data.dir={override_value(str(data))}"]
    (cell,) = make_cells(load(write(ONE)), runs, settings)
    write_plan(runs, SweepPlan(sweep="mine", question="Why?", command="c", cells=[cell]), "submitted/0001.json")
    arguments = {
        "run": ["run", f"sweep={write(ONE)}", f"dir={runs}", *settings],
        "task": ["task", f"file={runs / 'submitted/0001.json'}", "index=0"],
    }
    command, run_dir = [sys.executable, SCRIPT, *arguments[verb]], cell.run_dir
    # A git that takes its time keeps a run at the end of its start.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "bin/git").chmod(0o755)
    slow = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    with subprocess.Popen(command, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not run_dir.log_file.exists() or (verb == "run" and not children_of(process.pid)):
            assert time.monotonic() < deadline
        pid = child_of(process.pid) if verb == "run" else process.pid
        while not MOMENTS[moment](pid, run_dir):
            assert time.monotonic() < deadline
            assert process.poll() is None, run_dir.log_file.read_text()
        process.send_signal(number)
        code, _, err = finish(process)
    log = run_dir.log_file.read_text()
    assert code == 128 + number, err + log
    assert log == f"stopped by {number.name} before the first step; the same command starts it again\n"
    assert run_dir.status() == "interrupted"
    assert run_dir.summary()["reason"] == f"asked to stop by {number.name}"
    if moment != "its directory is claimed":
        return
    code, _, err = finish(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    assert code == 0, err + run_dir.log_file.read_text()
    assert run_dir.status() == "completed"
    assert [line["step"] for line in metrics(cell)] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_run_that_is_killed_starts_again_from_its_checkpoint(start, tmp_path):
    process = start(ONE, "jobs=1", steps=400)
    wait_for_steps(tmp_path / "runs", 10)
    (cell,) = read_plan(tmp_path / "runs").cells
    os.kill(child_of(process.pid), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert ": killed by signal 9, restarts from step_000" in err
    assert "1 completed" in out
    steps = [line["step"] for line in metrics(cell)]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 400)


@pytest.mark.slow
def test_a_run_that_is_killed_before_it_got_anywhere_counts_as_stopped_and_is_continued(start, tmp_path):
    process = start(ONE, "jobs=1", "trainer.checkpoint_every=0", steps=400)
    wait_for_steps(tmp_path / "runs", 10)
    (cell,) = read_plan(tmp_path / "runs").cells
    os.kill(child_of(process.pid), signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 1
    assert "killed by signal 9" in err
    assert "1 killed" in out
    assert 0 < cell.steps_done() < 400
    code, out, err = finish(start(ONE, "jobs=1", "trainer.checkpoint_every=0", steps=400))
    assert code == 0, err
    assert metrics(cell)[0]["step"] == 0
    assert metrics(cell)[-1]["step"] == 400


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or os.cpu_count() == 1, reason="needs two cores to tell apart")
@pytest.mark.slow
def test_runs_are_pinned_to_disjoint_cores_with_their_own_threads(start, tmp_path):
    process = start(TWO, "jobs=2", steps=3000)
    wait_for_steps(tmp_path / "runs", 1)
    children = children_of(process.pid)
    masks = [os.sched_getaffinity(child) for child in children]
    environments = [Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children]
    process.send_signal(signal.SIGINT)
    finish(process)
    assert len(masks) == 2
    assert all(len(mask) == 1 for mask in masks)
    assert not masks[0] & masks[1]
    assert all(b"OMP_NUM_THREADS=1" in environment for environment in environments)


@pytest.mark.slow
def test_a_hopeless_run_is_stopped_by_the_rule_of_the_file(start, tmp_path):
    text = """\
# Why?
base: [experiment=tiny, trainer.diverged_patience=9999]
extra: [[optimizer.adamw_lr=0.01], [optimizer.adamw_lr=50.0]]
stop: {loss_above_best: 1.5, for_steps: 5}
"""
    rarely = [f"trainer.{key}_every=0" for key in ("val", "probe", "checkpoint")]
    code, out, err = finish(start(text, "jobs=1", *rarely, steps=1500))
    assert code == 0, err
    assert "1 completed" in out
    assert "1 stopped by rule" in out
    (stopped,) = [cell for cell in read_plan(tmp_path / "runs").cells if cell.run_dir.stop_record()]
    assert stopped.run_dir.stop_record()["rule"] == {"loss_above_best": 1.5, "for_steps": 5}
    assert 5 <= stopped.run_dir.summary()["step"] < 1500


def test_help_and_mistakes_on_the_command_line():
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)

    usage = call("--help").stdout
    assert "plan|run|resume|submit|status|cancel|collect" in usage
    assert all(f"{key}=" in usage for key in KEYS)
    for arguments, message in [
        (["rnu", "sweep=quickstart"], "unknown verb rnu"),
        (["run"], "say which sweep"),
        (["sweep=quickstart", "jobs=0"], "jobs=0"),
        (["run", "sweep=quickstart", "--fast"], "--fast"),
        (["run", "sweep=quickstart", "nodes=2"], "nodes=2 has no meaning for run, only for submit"),
        (["task", "index=0"], "file=... is missing"),
        (["task", "file=/nowhere/submitted/0001.json"], "0001.json"),
    ]:
        done = call(*arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def metrics(cell: Cell) -> list[dict]:
    return [json.loads(line) for line in cell.run_dir.metrics_file.read_text().splitlines()]


def wait_for_steps(directory: Path, steps: int) -> None:
    """Wait until every run of the sweep has gone so far."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (directory / "plan.json").is_file():
            cells = read_plan(directory).cells
            if all(cell.steps_done() >= steps for cell in cells):
                return
        time.sleep(0.2)
    raise AssertionError(f"no run reached step {steps}")


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def child_of(pid: int) -> int:
    (child,) = children_of(pid)
    return child
