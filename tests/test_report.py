"""The report, on sweep directories that these tests write in the format of the trainer."""

import itertools
import json
import math
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call_here, snapshot

from quack_lm import report
from quack_lm.config import choices, compose
from quack_lm.errors import UserError
from quack_lm.paper import claims
from quack_lm.paper import figures as paper_figures
from quack_lm.report import collected, figures, page, results, runs, sections, table
from quack_lm.report.comparison import best_settings, comparisons, differences_at, over_rates, speeds
from quack_lm.report.draw import draw, point_values
from quack_lm.report.draw import save as save_figure
from quack_lm.report.plateau import Plateaus
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.file import StopRule
from quack_lm.sweep.plan import SweepPlan, write_plan
from quack_lm.training.run_dir import RunDir

ROOT = Path(__file__).resolve().parents[1]
N_LAYERS, N_HEADS = 3, 5
STEPS = 40
SUMMARIES = ("Runs by setting", "All runs")
TARGETS = {"none": "NoStabilizer", "fixed": "Fixed", "qk_norm": "QKNorm", "qk_clip": "QKClip", "quack": "QuacK"}


def make_cell(
    directory: Path, attention: str, stabilizer: str, lr: float = 0.3, seed: int = 0, **settings: Any
) -> Cell:
    config = {
        "run_dir": None,
        "seed": seed,
        "model": {"_target_": "quack_lm.model.ModelSizes", "n_layers": N_LAYERS},
        "attention": {"_target_": f"quack_lm.attention.{attention}.{attention.upper()}", "n_heads": N_HEADS},
        "stabilizer": {"_target_": f"quack_lm.stabilizers.{stabilizer}.{TARGETS.get(stabilizer, 'Other')}", **settings},
        "optimizer": {"_target_": "quack_lm.optim.recipe.Recipe", "lr": lr},
        "trainer": {"steps": STEPS, "global_batch_size": 8, "seq_len": 64},
    }
    setting = "".join(f" stabilizer.{key}={value}" for key, value in settings.items())
    overrides = f"attention={attention} stabilizer={stabilizer}{setting} optimizer.lr={lr} seed={seed}".split()
    identity = f"{abs(hash(json.dumps(config))):012x}"[:12]
    run_dir = directory / f"{attention}-{stabilizer}-lr{lr:g}-seed{seed}-{identity}"
    return Cell(overrides=overrides, config=config, fingerprint=identity, run_dir=RunDir(run_dir))


def write_run(
    cell: Cell,
    *,
    status: str = "completed",
    final: float = 3.78,
    max_logit: float = 71.0,
    last_step: int = STEPS,
    unstable: tuple[str, ...] = (),
    timed_tokens: int = 512,
    tokens_per_byte: float | None = None,
) -> None:
    """A run whose loss falls from 6.2 to `final` and whose logits grow to `max_logit`; null where it diverged."""
    cell.run_dir.path.mkdir(parents=True)
    lines = [_metrics_line(cell, step, final, max_logit) for step in range(0, last_step + 1)]
    if status == "diverged":
        lines[-1] |= {"train/loss": None, "val/loss": None, "logits/max": None}
    cell.run_dir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "status": status,
        "reason": "loss is not finite" if status == "diverged" else None,
        "step": last_step,
        "tokens": last_step * 512,
        "val_loss": None if status == "diverged" else final,
        "val_tokens_per_byte": tokens_per_byte,
        "best_val_loss": final - 0.01,
        "initial_val_loss": 6.2,
        "tokens_per_s": 41234.5,
        "timed_tokens": timed_tokens,
        "max_logit": None if status == "diverged" else max_logit,
        "delta_mean": None if status == "diverged" else max_logit / 100,
        "n_params": 1234,
        "elapsed_s": 12.5,
        "outside_s": {"probe": 5.0, "validation": 1.0},
        "probes": 10,
        "unstable": list(unstable),
        "fingerprint": cell.fingerprint,
    }
    cell.run_dir.summary_file.write_text(json.dumps(summary))
    environment = {"command": ["train.py"], "git_revision": None, "versions": {"torch": "9.9.9"}, "cpu_count": 2}
    cell.run_dir.environment_file.write_text(json.dumps(environment))


def _metrics_line(cell: Cell, step: int, final: float, max_logit: float) -> dict[str, Any]:
    done = step / STEPS
    loss = final + (6.2 - final) * math.exp(-6 * done)
    line: dict[str, Any] = {"step": step, "tokens": 512 * step}
    if step:
        line |= {"train/loss": loss + 0.1 * math.sin(37 * step), "optim/lr": 0.3, "throughput/tokens_per_s": 41234.5}
    if step % 5 == 0:
        line["val/loss"] = loss
    if step % 4 == 0:
        peak = max_logit**done
        # Each head has its own value, so that a wrong index shows.
        heads = [[peak * (1 + layer) * (1 + head) for head in range(N_HEADS)] for layer in range(N_LAYERS)]
        line |= {"logits/max": heads[-1][-1], "logits/max_per_head": heads}
        if step:
            line |= {
                "logits/delta_mean": peak / 100,
                "logits/delta_mean_per_head": [[v / 100 for v in row] for row in heads],
            }
    return line


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes the plan of some cells and returns the sweep directory."""

    def write(*cells: Cell) -> Path:
        command = "quack-lm sweep run sweep=demo"
        write_plan(
            tmp_path,
            SweepPlan(sweep="demo", question="Which one?\nHeld fixed: <all>.", command=command, cells=[*cells]),
        )
        return tmp_path

    return write


def as_markdown(directory: Path) -> str:
    """The page without its pictures, which take seconds to draw."""
    return page.as_markdown(collected.load(directory), [], "")


def lines_of(plots: list[figures.Plot], name: str) -> dict[str, figures.Line]:
    plot = next(plot for plot in plots if plot.name == name)
    return {line.name: line for panel in plot.panels for line in panel.lines}


def test_the_general_report_names_no_stabilizer_and_no_paper() -> None:
    # "none" is the baseline, and an English word.
    names = [name.replace("_", "[_ ]") for name in choices("stabilizer") if name != "none"]
    pattern = re.compile(rf"(?<![\w-])({'|'.join([*names, 'papers?'])})(?![\w-])", re.IGNORECASE)
    paths = list((ROOT / "quack_lm" / "report").glob("*.py"))
    assert len(paths) > 5
    assert {path.name: found for path in paths if (found := pattern.findall(path.read_text()))} == {}


# ------------------------------------------------------------------------------------------------ the table


def test_table_has_one_row_per_cell_by_attention_then_stabilizer_in_the_order_of_the_sweep_file(tmp_path, save):
    order = [("mla", "quack"), ("mha", "quack"), ("mla", "none"), ("mha", "none")]
    cells = [make_cell(tmp_path, *names) for names in order]
    for cell in cells:
        write_run(cell)
    rows = [runs.row(result)[:2] for result in results.from_runs(save(*cells)).results]
    assert rows == [("mla", "quack"), ("mla", "none"), ("mha", "quack"), ("mha", "none")]


def test_table_shows_sensible_digits(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "quack")
    write_run(cell, final=3.78213, max_logit=10234.0)
    row = runs.row(results.from_runs(save(cell)).results[0])
    assert row == ("mha", "quack", "0.3", "0", "3.782", "3.772", "–", "1.02e4", "102", "41.2k", "completed")


def test_losses_are_shown_in_bits_per_byte_too_where_the_bytes_are_known(tmp_path, save, monkeypatch):
    monkeypatch.setattr(sections, "LONG", 1)  # so that there is a table by setting, too
    cells = [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(5)]
    # A data set with one run that diverged, one with another tokenizer, and one that does not know its bytes.
    made = [("most", 0.25, 3.7), ("most", 0.25, 3.9), ("most", 0.25, None), ("other", 0.4, 2.5), ("older", None, 2.5)]
    for cell, (data, ratio, final) in zip(cells, made, strict=True):
        cell.config["data"] = {"dir": data}
        status = "completed" if final else "diverged"
        write_run(cell, final=final or 3.7, status=status, tokens_per_byte=ratio)
    collected.write(save(*cells), tmp_path / "collected")
    for directory in (tmp_path, tmp_path / "collected"):
        made_of = sections.after_figures(collected.load(directory))
        tables = {section.title: section.table for section in made_of if section.table}
        # 0.25 tokens per byte are 0.25 / ln 2 bits for each nat per token; the one that diverged has the initial loss.
        assert column(tables["All runs"], "bits/byte") == ["1.334", "1.407", "–", "1.443", "–"]
        assert column(tables["Runs by setting"], "bits/byte") == ["1.659", "1.443", "–"]
        assert column(tables["Best learning rate and LR sensitivity"], "bits/byte") == ["1.659", "1.443", "–"]
        assert column(tables["Comparison under other settings"], "lowest in bits/byte") == ["1.659", "1.443", "–"]
    assert "bits/byte" not in as_markdown(save(cells[-1]))


def column(of: table.Table, name: str) -> list[str]:
    return [row[of.header.index(name)] for row in of.rows]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.05123, "0.0512"),
        (71.26, "71.3"),
        (318.4, "318"),
        (9996.0, "1.00e4"),
        (-3.14159, "-3.14"),
        (0.0, "0"),
        (2e-7, "2.00e-7"),
        (math.inf, "∞"),
    ],
)
def test_three_significant_digits(value, text):
    assert table.significant(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(412345.0, "412k"), (41234.0, "41.2k"), (1234567.0, "1.23M"), (980.4, "980")]
)
def test_counts_have_three_digits_and_a_unit(value, text):
    assert table.count(value) == text


def test_every_state_of_a_cell_is_named(tmp_path, save):
    done, diverged, quiet, killed, crashed, missing = cells = [
        make_cell(tmp_path, "mha", "none", seed=s) for s in range(6)
    ]
    write_run(done)
    write_run(diverged, status="diverged", last_step=17)
    write_run(quiet, unstable=("logits above 1e4",))
    write_run(killed, status="running", last_step=20)
    crashed.run_dir.path.mkdir()
    crashed.run_dir.log_file.write_text("Traceback\n")
    measured = results.from_runs(save(*cells))
    assert [runs.status(result) for result in measured.results] == [
        "completed",
        "diverged@17",
        "completed, unstable",
        "killed@20",
        "failed",
        "pending",
    ]
    text = runs.as_text(measured)
    assert "6 runs: 2 completed (1 unstable), 1 diverged, 1 killed, 1 failed, 1 pending" in text
    assert "mha none lr 0.3 seed 2: completed, unstable: logits above 1e4" in text
    assert "mha none lr 0.3 seed 1: diverged@17: loss is not finite" in text
    assert missing.name not in text  # the table has settings, the report directories


def test_settings_that_differ_within_a_stabilizer_are_part_of_its_name(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "quack", tau=tau, norm="frobenius") for tau in (0.1, 1.0)]
    cells += [make_cell(tmp_path, "mha", "qk_clip", threshold=30.0)]
    assert [r.label for r in results.from_runs(save(*cells)).results] == ["quack tau=0.1", "quack tau=1", "qk_clip"]


# ------------------------------------------------------------------------------------------------ the figures


def test_curves_have_one_panel_per_attention_and_rate_and_one_line_per_run(tmp_path, save):
    cells = [make_cell(tmp_path, a, s, lr) for a in ("mha", "mla") for s in ("none", "quack") for lr in (0.03, 0.3)]
    for cell in cells:
        write_run(cell)
    plot = next(p for p in figures.plots(results.from_runs(save(*cells))) if p.name == "val_loss")
    assert [panel.title for panel in plot.panels] == ["mha, lr 0.03", "mha, lr 0.3", "mla, lr 0.03", "mla, lr 0.3"]
    assert [[line.label for line in panel.lines] for panel in plot.panels] == [["none", "quack"]] * 4
    first = plot.panels[0].lines[0].points
    assert first[0] == (0, pytest.approx(6.2))
    assert [step for step, _ in first] == list(range(0, STEPS + 1, 5))


def test_middle_head_figures_read_the_middle_head_of_the_middle_layer(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell, max_logit=100.0)
    plots = paper_figures.plots(results.from_runs(save(cell)))
    middle = next(iter(lines_of(plots, "max_logit_middle_head").values()))
    # Layer 1 of 0..2 and head 2 of 0..4: factors 2 and 3 of the fixture.
    assert middle.points[-1] == (STEPS, pytest.approx(100.0 * 2 * 3))
    change = next(iter(lines_of(plots, "delta_middle_head").values()))
    assert change.points[-1] == (STEPS, pytest.approx(100.0 * 2 * 3 / 100))


def test_a_diverged_run_ends_in_a_cross_and_an_unstable_one_in_a_ring(tmp_path, save):
    healthy, diverged, unstable = cells = [make_cell(tmp_path, "mha", s) for s in ("quack", "none", "fixed")]
    write_run(healthy)
    write_run(diverged, status="diverged", last_step=20)
    write_run(unstable, unstable=("stuck",))
    lines = lines_of(figures.plots(results.from_runs(save(*cells))), "val_loss")
    assert not lines["mha, lr 0.3 quack"].diverged
    assert not lines["mha, lr 0.3 quack"].unstable
    # The value at step 20 is null: the cross sits at the last finite one.
    assert [x for x, _ in lines["mha, lr 0.3 none"].diverged] == [15]
    assert math.isnan(lines["mha, lr 0.3 none"].points[-1][1])
    assert [x for x, _ in lines["mha, lr 0.3 fixed"].unstable] == [STEPS]


def test_loss_by_rate_draws_diverged_runs_at_the_top_and_never_drops_them(tmp_path, save):
    rates = (0.003, 0.03, 0.3)
    cells = [make_cell(tmp_path, "mha", s, lr, seed) for s in ("none", "quack") for lr in rates for seed in (0, 1)]
    for cell in cells:
        lr, is_quack = cell.config["optimizer"]["lr"], "quack" in cell.name
        if is_quack or lr < 0.3:
            write_run(cell, final=3.7 + lr + 0.1 * cell.config["seed"])
        else:
            write_run(cell, status="diverged", last_step=10)
    plot = next(p for p in figures.plots(results.from_runs(save(*cells))) if p.name == "loss_by_lr")
    none, quack = plot.panels[0].lines
    assert none.points == [(0.003, pytest.approx(3.753)), (0.03, pytest.approx(3.78))]
    assert none.diverged == [(0.3, None), (0.3, None)]
    assert [lr for lr, _ in quack.points] == list(rates)
    assert not quack.diverged


def test_the_plateau_of_each_stabilizer_is_drawn_over_the_rates(tmp_path, save):
    # Within 0.05 of the best: at 0.03 and above up to the edge; at 0.03 alone, because 0.01 is 0.06 worse.
    finals = {
        "none": {0.01: 3.9, 0.03: 3.53, 0.1: 3.54, 0.3: 3.5},
        "quack": {0.01: 3.56, 0.03: 3.5, 0.1: 3.6, 0.3: 3.9},
    }
    cells = [make_cell(tmp_path, a, s, lr) for a in ("mha", "mla") for s, own in finals.items() for lr in own]
    for cell in cells:
        _, stabilizer, rate, *_ = cell.name.split("-")
        write_run(cell, final=finals[stabilizer][float(rate.removeprefix("lr"))])
    measured = results.from_runs(save(*cells))
    plot = next(p for p in figures.plots(measured) if isinstance(p, Plateaus))
    assert [panel.title for panel in plot.panels] == ["mha", "mla"]
    none, quack = plot.panels[0].bars
    assert (none.low, none.high, none.best, none.is_open) == (0.03, 0.3, 0.3, (False, True))
    assert (quack.low, quack.high, quack.best, quack.is_open) == (0.03, 0.03, 0.03, (False, False))
    drawn = draw(plot)
    save_figure(drawn)
    for axis, panel in zip(drawn.axes, plot.panels, strict=True):
        assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == ["none", "quack"]
        for patch, bar in zip(axis.patches, panel.bars, strict=True):
            low, high = patch.get_x(), patch.get_x() + patch.get_width()
            assert (low, high) == (pytest.approx(bar.low, rel=0.1), pytest.approx(bar.high, rel=0.1))
        assert [line.get_marker() for line in axis.lines].count(">") == 1
        assert "<" not in [line.get_marker() for line in axis.lines]
    shown = [value.text for value in point_values(drawn, plot)]
    assert shown[:2] == ["mha, none: 3.500 at 0.3, plateau 0.03 to ≥ 0.3", "mha, quack: 3.500 at 0.03, plateau 0.03"]
    assert len(shown) == 4


def test_a_large_sweep_is_drawn_in_part_and_tabled_in_full(tmp_path, save, monkeypatch):
    rates = [0.01 * 1.5**i for i in range(7)]
    attentions = ("mha", "mla")
    taus = [0.1 * 1.2**i for i in range(16)]
    cells = [make_cell(tmp_path, a, "quack", lr, tau=tau) for a in attentions for lr in rates for tau in taus]
    for cell in cells:
        write_run(cell, last_step=4)
    measured = results.from_runs(save(*cells))
    plots = {plot.name: plot for plot in figures.plots(measured)}
    # 14 places are more than are drawn: four of each attention, the lowest and the highest rate among them.
    titles = [panel.title for panel in plots["val_loss"].panels]
    at = [0, 2, 4, 6]
    assert titles == [f"{attention}, lr {rates[i]:g}" for attention in attentions for i in at]
    assert plots["val_loss"].caption.count("8 of 14 places are drawn; the tables have all.") == 1
    assert "The curves of all 224 settings are too many to draw" in plots["val_loss"].caption
    assert "val_loss_all" not in plots
    # Over the rates every one is a point.
    assert [len(line.points) for panel in plots["loss_by_lr"].panels for line in panel.lines] == [7, 7]
    assert "places are drawn" not in plots["loss_by_lr"].caption
    assert "Runs by setting" not in as_markdown(tmp_path)
    for module in (sections, page):
        monkeypatch.setattr(module, "LONG", 223)
    text = as_markdown(tmp_path)
    by_setting, all_runs = (text.partition(f"## {title}\n")[2].partition("\n## ")[0] for title in SUMMARIES)
    for section in (by_setting, all_runs):
        assert section.count("\n| mha") == section.count("\n| mla") == 112
        assert "<details><summary>224 entries</summary>\n\n|" in section


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_report_of_5000_runs_fits_in_two_gigabytes(tmp_path, save):
    rates = [0.001 * 3**i for i in range(6)]
    taus = [0.1 * 1.2**i for i in range(42)]
    places = itertools.product(("mha", "mla"), rates, taus, range(10))
    cells = [make_cell(tmp_path, attention, "quack", lr, seed, tau=tau) for attention, lr, tau, seed in places]
    for cell in cells:
        write_run(cell)
    start = time.perf_counter()
    command = [sys.executable, "-m", "quack_lm", "report", str(save(*cells)), "-o", str(tmp_path / "page")]
    subprocess.run(command, check=True, capture_output=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"{len(cells)} runs: {time.perf_counter() - start:.0f} s, {peak / 1e9:.2f} GB")
    assert len(cells) > 5000
    assert peak < 2e9


def test_there_is_no_figure_over_the_rates_with_a_single_rate(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell)
    assert "loss_by_lr" not in [plot.name for plot in figures.plots(results.from_runs(save(cell)))]


def test_values_that_a_log_axis_cannot_show_are_gaps(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell)
    lines = [{"step": 0, "tokens": 0, "logits/max": -0.5}, {"step": 4, "tokens": 9, "logits/max": 2.0}]
    cell.run_dir.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = next(iter(lines_of(figures.plots(results.from_runs(save(cell))), "max_logit").values()))
    assert math.isnan(line.points[0][1])
    assert line.points[1] == (4, 2.0)


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell, status="running", last_step=12)
    with open(cell.run_dir.metrics_file, "a") as file:
        file.write('{"step": 13, "tok')
    assert results.from_runs(save(cell)).results[0].curve("train/loss")[-1][0] == 12


# ------------------------------------------------------------------------------------------------ long runs


def write_long_run(cell: Cell, n_lines: int, every: int = 10) -> None:
    """A run of so many steps whose loss has one spike, of 99 in its middle, and at that step one head has another."""
    cell.config["trainer"] |= {"steps": n_lines, "unstable_logit": 50.0}
    write_run(cell)
    middle = n_lines // 2
    with cell.run_dir.metrics_file.open("w") as file:
        for step in range(1, n_lines + 1):
            heads = [[1.0] * N_HEADS for _ in range(N_LAYERS)]
            heads[1][2] = 99.0 if step == middle else 1.0
            line = {"step": step, "tokens": 512 * step, "train/loss": 99.0 if step == middle else 4.0 + step % 2}
            line |= {"logits/max_per_head": heads} if step % every == 0 else {}
            file.write(json.dumps(line) + "\n")


def test_a_long_curve_has_few_values_and_the_spike_of_a_single_step(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(2)]
    for cell in cells:
        write_long_run(cell, 6000)
    with cells[1].run_dir.metrics_file.open("a") as file:
        file.write('{"step": 7, "train/loss": null}\n')
    collected.write(save(*cells), tmp_path / "collected")
    for directory in (tmp_path, tmp_path / "collected"):
        measured = collected.load(directory)
        loss, heads = (measured.results[0].curves[key] for key in ("train/loss", "logits/max_per_head"))
        assert (len(loss.steps), len(heads.steps)) == (1000, 100)
        # The losses of the steps 3000 to 3005: 99, 5, 4, 5, 4, 5.
        assert loss.steps[499:502].tolist() == [2999, 3005, 3011]
        assert (loss.low[500], loss.mean[500], loss.high[500]) == (4.0, pytest.approx(122 / 6), 99.0)
        assert [i for i, table in enumerate(heads.high) if table.max() == 99] == [50]
        assert measured.results[0].blowup == (3000, 1, 2)
        assert np.flatnonzero(np.isnan(measured.results[1].curves["train/loss"].mean)).tolist() == [1]
        # The seeds have the same parts: their mean is no zigzag.
        line = lines_of(figures.plots(measured), "train_loss")["mha, lr 0.3 none"]
        assert (len(line.points), len(line.band), max(high for *_, high in line.band)) == (1000, 1000, 99.0)


def test_reading_a_run_takes_no_more_memory_for_more_lines(tmp_path, save):
    # A million lines took 1.7 GB.
    cell = make_cell(tmp_path, "mha", "none")
    peaks = []
    for n_lines in (10_000, 40_000):
        shutil.rmtree(cell.run_dir.path, ignore_errors=True)
        write_long_run(cell, n_lines, every=50)
        save(cell)
        tracemalloc.start()
        results.from_runs(tmp_path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


# ------------------------------------------------------------------------------------------------ the page


def test_report_of_a_half_finished_sweep_is_self_contained_and_lists_what_is_missing(tmp_path, save):
    done, diverged, _ = cells = [make_cell(tmp_path, "mha", s) for s in ("quack", "none", "brand_new")]
    write_run(done, final=3.782)
    write_run(diverged, status="diverged", last_step=10)
    path = report.write(
        [save(*cells)],
        tmp_path / "out",
        command="quack-lm report somewhere",
        conclusions=[claims.recipe, claims.section],
        more_plots=[paper_figures.plots],
    )
    html, markdown = path.read_text(), (tmp_path / "out" / "report.md").read_text()
    for text in (html, markdown):
        assert "mha brand_new lr 0.3 seed 0: pending" in text
        assert "diverged@10" in text
        assert "3.782" in text
        assert "QuacK is stable at the top rate" in text
        assert "9.9.9" in text
        assert "cpu count" in text
        assert "git revision" not in text
        assert "command: [" not in text
        assert "quack-lm report somewhere" in text
        assert "quack-lm sweep run sweep=demo" in text
        assert "quack-lm train attention=mha stabilizer=brand_new optimizer.lr=0.3 seed=0" in text
        assert str(tmp_path) not in text  # pages are passed on
    assert "Held fixed: &lt;all&gt;." in html
    # The question, the runs and the figures come before the claims.
    order = [html.index(text) for text in ("Which one?", "pending", "<h2>Figures", "<h2>Claims", "<h2>All runs")]
    assert order == sorted(order)
    assert "prefers-color-scheme: dark" in html
    # The last validation of the healthy run, on hover.
    assert 'title="mha, lr 0.3, quack: 3.788 at 40"' in html
    assert "<script" not in html
    # Nothing is fetched: each image is in the page.
    assert html.count('src="data:image/png;base64,') == html.count("<img ") == 8
    assert "http" not in html
    figure_files = {file.name for file in (tmp_path / "out" / "figures").iterdir()}
    names = ("val_loss", "train_loss", "max_logit", "max_logit_middle_head", "delta", "delta_middle_head")
    names += ("heat_max_mha_lr0.3", "heat_delta_mean_mha_lr0.3")
    assert figure_files == {f"{name}.{suffix}" for name in names for suffix in ("png", "pdf")}


def test_report_of_a_sweep_that_has_not_started_is_a_page_without_figures(tmp_path, save):
    directory = save(make_cell(tmp_path, "mha", "none"))
    html = report.write([directory], tmp_path / "out", command="x").read_text()
    assert "1 runs: 1 pending" in html
    assert "No run has written any metrics yet" in html


def test_a_page_without_the_curves_says_so(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell)
    cell.run_dir.metrics_file.unlink()
    assert (
        "the curves of these runs are missing" in report.write([save(cell)], tmp_path / "out", command="").read_text()
    )


def test_runs_that_the_plan_no_longer_has_are_listed(tmp_path, save):
    kept, dropped = make_cell(tmp_path, "mha", "none"), make_cell(tmp_path, "mha", "none", seed=7)
    write_run(kept)
    write_run(dropped)
    assert dropped.name in as_markdown(save(kept))


def test_the_script_writes_beside_the_runs_and_says_where(tmp_path, save):
    cell = make_cell(tmp_path, "mla", "none")
    write_run(cell)
    directory = save(cell)
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", directory], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"report: {directory / 'report' / 'report.html'}\n"
    wrong = subprocess.run(
        [sys.executable, ROOT / "scripts" / "report.py", tmp_path / "nowhere"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


# ------------------------------------------------------------------------------------------------ collected files


def test_the_report_works_from_the_collected_files_alone(tmp_path, save):
    good, diverged, _ = cells = [make_cell(tmp_path / "a", "mha", s) for s in ("quack", "none", "fixed")]
    write_run(good)
    write_run(diverged, status="diverged", last_step=10)
    (tmp_path / "b").mkdir()
    plan = SweepPlan(
        sweep="demo", question="Which?", command="c", cells=cells, stop=StopRule(loss_above_best=2, for_steps=3)
    )
    write_plan(tmp_path / "a", plan)
    paths = collected.write(tmp_path / "a", tmp_path / "b")
    assert {path.parent for path in paths} == {tmp_path / "b"}
    before, after = collected.load(tmp_path / "a"), collected.load(tmp_path / "b")
    assert after.plan.stop == before.plan.stop
    for old, new in zip(before.results, after.results, strict=True):
        assert (old.status, old.summary, old.label) == (new.status, new.summary, new.label)
        # Paths of this machine are not collected.
        assert new.environment == {k: v for k, v in old.environment.items() if k != "command"}
        for key in ("train/loss", "val/loss", "logits/max", paper_figures.middle_head("logits/max_per_head")):
            was, now = old.curve(key), new.curve(key)
            assert [step for step, _ in was] == [step for step, _ in now]
            assert [v for _, v in was] == pytest.approx([v for _, v in now], rel=1e-6, nan_ok=True)
    rows = (tmp_path / "b" / "results.csv").read_text().splitlines()
    assert len(rows) == 4
    assert "config.optimizer.lr" in rows[0]


# ------------------------------------------------------------------------------------------------ comparison and claims


def claim(measured: results.Results, words: str) -> claims.Claim:
    (found,) = [claim for claim in claims.claims(measured) if words in claim.text]
    return found


def save_losses(tmp_path: Path, save: Callable[..., Path], losses: dict[str, list[float]], lr: float = 3.0) -> Any:
    """A sweep of one rate, in steps x rate the paper's top one, with these final losses per stabilizer and seed."""
    cells = []
    for stabilizer, finals in losses.items():
        for seed, final in enumerate(finals):
            cell = make_cell(tmp_path, "mha", stabilizer, lr=lr, seed=seed)
            write_run(cell, final=final)
            cells.append(cell)
    return results.from_runs(save(*cells))


def test_one_is_better_only_if_its_t_interval_excludes_zero(tmp_path, save):
    measured = save_losses(
        tmp_path, save, {"quack": [3.7, 3.8, 3.9], "fixed": [3.8, 3.85, 4.0], "none": [3.6, 3.9, 4.2]}
    )
    pairs = {(d.a, d.b): d for d in differences_at(measured, measured.places()[0])}
    quack_fixed, quack_none = pairs["quack", "fixed"], pairs["quack", "none"]
    # Differences -0.1, -0.05, -0.1 with a standard error of 1/60: 4.3027 of it to either side.
    assert quack_fixed.interval == (pytest.approx(-0.25 / 3 - 4.302653 / 60), pytest.approx(-0.25 / 3 + 4.302653 / 60))
    assert quack_fixed.p_lower() < 0.05
    assert quack_none.p_lower() > 0.05
    assert claim(measured, "QuacK is better than the fixed factor at the top rate").verdict == "holds"
    assert claim(measured, "QK norm is stable").verdict == "not tested here"
    assert claim(measured, "at the lowest rate").verdict == "not tested here"


@pytest.mark.parametrize(
    ("none", "verdict", "decided"),
    [
        # The other two differences are decided, so that the third needs no more than 5%.
        ([4.5, 4.6001, 4.7], "better", 3),
        ([3.6, 3.9, 4.2], "not decided", 0),
    ],
)
def test_a_difference_among_several_must_be_clearer_than_one_alone(none, verdict, decided, tmp_path, save):
    measured = save_losses(tmp_path, save, {"quack": [3.7, 3.8, 3.9], "fixed": [3.8, 3.85, 4.0], "none": none})
    found = {(c.pair.a, c.pair.b): c for c in comparisons(measured)}["quack", "fixed"]
    assert found.pair.p_lower() < 0.05
    assert found.verdict == verdict
    alone = max(1, decided)
    expected = f"tests 3 differences. {alone} have p below 5% by themselves; {decided} have it after Holm's"
    assert expected in as_markdown(tmp_path)


def test_one_seed_decides_nothing(tmp_path, save):
    measured = save_losses(tmp_path, save, {"quack": [3.0], "fixed": [5.0]})
    (found,) = comparisons(measured)
    assert (found.p, found.detectable, found.verdict) == (None, None, "not decided")
    assert claim(measured, "QuacK is better than the fixed factor").verdict == "not decided"


def test_a_claim_that_the_numbers_contradict_does_not_hold(tmp_path, save):
    measured = save_losses(tmp_path, save, {"quack": [3.9, 3.9, 3.9], "fixed": [3.8, 3.8, 3.8]})
    found = claim(measured, "QuacK is better than the fixed factor")
    assert found.verdict == "does not hold"
    assert "+0.100 [+0.100, +0.100]" in found.numbers


def test_a_low_rate_is_no_evidence_about_the_top_one(tmp_path, save):
    measured = save_losses(tmp_path, save, {"quack": [3.9] * 3, "fixed": [3.8] * 3}, lr=0.03)
    assert claim(measured, "QuacK is better than the fixed factor").verdict == "not tested here"
    assert claim(measured, "at the lowest rate").verdict == "does not hold"


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ({"quack": [3.80, 3.81, 3.82], "fixed": [3.82, 3.82, 3.82]}, "holds"),
        ({"quack": [3.8], "fixed": [3.8]}, "not decided"),  # equal, but one seed says nothing of its spread
        ({"quack": [3.8] * 3, "fixed": [3.8] * 3}, "not decided"),  # the same numbers: both computed the same
        ({"quack": [3.7, 3.8, 3.9], "fixed": [3.8] * 3}, "not decided"),  # the interval is wider than agreement
    ],
)
def test_stabilizers_agree_only_where_the_seeds_show_it(losses, verdict, tmp_path, save):
    assert claim(save_losses(tmp_path, save, losses, lr=0.03), "at the lowest rate").verdict == verdict


def test_rounding_is_no_difference(tmp_path, save):
    measured = save_losses(tmp_path, save, {"quack": [3.8] * 3, "fixed": [3.8 + d for d in (1e-6, 2e-6, 3e-6)]})
    assert claim(measured, "QuacK is better than the fixed factor").verdict == "not decided"
    assert comparisons(measured)[0].verdict == "not decided"


def test_the_difference_of_two_diverged_runs_is_zero(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", s, lr=3.0, seed=seed) for s in ("quack", "fixed") for seed in range(3)]
    for cell in cells:
        write_run(cell, status="diverged", last_step=10)
        summary = json.loads(cell.run_dir.summary_file.read_text())
        # Stabilizers that begin with other weights have another initial loss.
        initial = {"initial_val_loss": 6.2 if "quack" in cell.name else 6.3}
        cell.run_dir.summary_file.write_text(json.dumps(summary | initial))
    measured = results.from_runs(save(*cells))
    assert claim(measured, "QuacK is better than the fixed factor").verdict == "not decided"


LATENT = ("none", "fixed", "qk_clip", "quack")


@pytest.mark.parametrize(
    ("losses", "verdict"),
    [
        ({"none": [4.0] * 3, "fixed": [3.9] * 3, "qk_clip": [3.9] * 3, "quack": [3.8] * 3}, "holds"),
        # Close to fixed, clearly; and unclear against QK clip, which is further away on average.
        ({"none": [4.0] * 3, "fixed": [3.81] * 3, "qk_clip": [3.7, 4.0, 4.1], "quack": [3.8] * 3}, "not decided"),
        ({"none": [4.0] * 3, "fixed": [3.9] * 3, "qk_clip": [3.7] * 3, "quack": [3.8] * 3}, "does not hold"),
        # One stabilizer has not finished; others were not planned.
        ({"none": [4.0] * 3, "fixed": [3.9] * 3, "qk_clip": [None] * 3, "quack": [3.8] * 3}, "not decided"),
        ({"none": [4.0] * 3, "quack": [3.8] * 3}, "not tested here"),
    ],
)
def test_the_best_is_the_one_that_beats_every_other(losses, verdict, tmp_path, save):
    cells = []
    for name, finals in losses.items():
        for seed, final in enumerate(finals):
            cells.append(make_cell(tmp_path, "mla", name, lr=3.0, seed=seed))
            if final is not None:
                write_run(cells[-1], final=final)
    assert claim(results.from_runs(save(*cells)), "QuacK is best in MLA").verdict == verdict


def test_tuning_seeds_select_the_setting_and_the_others_judge_it(tmp_path, save):
    # On the tuning seeds 0 and 1 the first setting is lower, on the others the second.
    losses = {0.1: [3.5, 3.5, 3.9, 3.9, 3.9], 1.0: [3.6, 3.6, 3.7, 3.7, 3.7]}
    cells = [make_cell(tmp_path, "mha", "quack", seed=seed, tau=tau) for tau in losses for seed in range(5)]
    for cell in cells:
        write_run(cell, final=losses[cell.config["stabilizer"]["tau"]][cell.config["seed"]])
    cells += [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(5)]
    for cell in cells[-5:]:
        write_run(cell, final=3.8)
    directory = save(*cells)
    together = results.from_runs(directory)
    best = best_settings(together, together.places()[0])["quack"]
    assert (best.runs[0].label, len(best.runs), best.tries) == ("quack tau=1", 5, 2)
    write_plan(directory, replace(together.plan, tune_seeds=[0, 1]))
    collected.write(directory, tmp_path / "collected")
    for separate in (results.from_runs(directory), collected.load(tmp_path / "collected")):
        best = best_settings(separate, separate.places()[0])["quack"]
        assert (best.runs[0].label, [r.seed for r in best.runs], best.tries) == ("quack tau=0.1", [2, 3, 4], 1)
        (pair,) = differences_at(separate, separate.places()[0])
        assert pair.by_seed == {seed: pytest.approx(0.1) for seed in (2, 3, 4)}
    assert "Seeds 0-1 select the setting" in as_markdown(directory)


def test_the_bytes_at_decode_are_what_attention_and_stabilizer_declare(tmp_path, save):
    expected = {("mha", "none"): "8,192", ("mla", "quack"): "640", ("mla", "qk_norm"): "768"}
    sizes = ["model=1b", f"trainer.steps={STEPS}"]
    cells = [
        replace(
            make_cell(tmp_path, *names), config=compose([*sizes, f"attention={names[0]}", f"stabilizer={names[1]}"])
        )
        for names in expected
    ]
    # One of another version is shown without a number.
    cells.append(make_cell(tmp_path, "mla", "brand_new"))
    for cell in cells:
        write_run(cell)
    lines = as_markdown(save(*cells)).splitlines()
    start = next(n for n, line in enumerate(lines) if "| best lr |" in line)
    assert lines[start].endswith("| at decode: bytes per token and layer |")
    rows = [line.strip("| ").split(" | ") for line in lines[start + 2 : start + 2 + len(cells)]]
    assert {(row[0].split()[0], row[1]): row[-1] for row in rows} == {**expected, ("mla", "brand_new"): table.NO_NUMBER}


def test_a_best_rate_at_the_edge_of_the_grid_is_said_to_be(tmp_path, save):
    # Paper's lowest rate by steps x rate: 0.0375 of 40 steps.
    finals = {0.03: 3.50, 0.3: 3.53, 3.0: 3.90}
    cells = [make_cell(tmp_path, "mha", "quack", lr=lr, seed=seed) for lr in finals for seed in range(3)]
    for cell in cells:
        write_run(cell, final=finals[cell.config["optimizer"]["lr"]] + 0.001 * cell.config["seed"])
    measured = results.from_runs(save(*cells))
    (entry,) = over_rates(measured)
    assert (entry.best_rate, entry.is_at_edge, entry.plateau) == (0.03, True, (0.03, 0.3))
    assert "| 0.03 (edge) | 3.501 [3.497, 3.505] | ≤ 0.03 to 0.3 |" in as_markdown(tmp_path)
    assert claim(measured, "higher rates are better").verdict == "not decided"
    lower = [make_cell(tmp_path, "mha", "quack", lr=0.003, seed=seed) for seed in range(3)]
    for cell in lower:
        write_run(cell, final=3.7 + 0.001 * cell.config["seed"])
    measured = results.from_runs(save(*lower, *cells))
    (entry,) = over_rates(measured)
    assert (entry.best_rate, entry.is_at_edge, entry.plateau) == (0.03, False, (0.03, 0.3))
    assert claim(measured, "higher rates are better").verdict == "does not hold"


def test_the_losses_and_the_sensitivity_of_a_row_are_of_the_same_seeds(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "none", lr=lr, seed=seed) for lr in (0.03, 0.3) for seed in range(3)]
    cells.append(make_cell(tmp_path, "mha", "none", lr=0.03, seed=3))
    for cell in cells:
        write_run(cell, final=3.7 if cell.config["seed"] < 3 else 3.1)
    (entry,) = over_rates(results.from_runs(save(*cells)))
    assert (entry.seeds, entry.best_loss) == ([0, 1, 2], pytest.approx(3.7))


def test_only_the_factors_that_were_run_are_judged(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "fixed", lr=3.0, tau=0.1)]
    write_run(cells[0])
    measured = results.from_runs(save(*cells))
    assert claim(measured, "a query/key factor of 0.1 alone").verdict == "holds"
    assert claim(measured, "a query/key factor of 0.01 alone").verdict == "not tested here"


def test_the_page_says_where_the_recipe_is_not_the_papers(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(2)]
    cells[0].config["optimizer"]["max_grad_norm"] = None
    for cell in cells:
        cell.config["model"]["tied_embeddings"] = False
        write_run(cell)
    lines = claims.recipe(results.from_runs(save(*cells))).lines
    assert lines == [
        "embeddings are not tied to the output layer",
        "gradients are not clipped (1 of 2 runs)",
        "fewer than the paper's 5000 steps",
    ]


def test_the_bound_of_the_change_is_shown_as_a_multiple_of_the_change(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell)
    pairs = [(0.5, 50.0), (0.1, 30.0), (0.2, 30.0), (0.0, 1.0), (0.1, None)]
    with cell.run_dir.metrics_file.open("a") as file:
        for step, (change, bound) in enumerate(pairs, STEPS + 1):
            line = {"step": step, "logits/delta_weights_max": change, "logits/delta_weights_max_bound": bound}
            file.write(json.dumps(line) + "\n")
    assert "| mha, lr 0.3 | none | 100 | 150 | 300 | 3 |" in as_markdown(save(cell))


def test_a_stabilizer_with_a_missing_rate_has_no_sensitivity(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "none", lr=lr) for lr in (0.003, 0.03, 0.3)]
    for cell, final in zip(cells[:2], (3.7, 3.8), strict=True):
        write_run(cell, final=final)
    (entry,) = over_rates(results.from_runs(save(*cells)))
    assert (entry.sensitivity, entry.missing, entry.largest_stable) == (None, [0.3], 0.03)
    write_run(cells[2], final=4.5)
    (entry,) = over_rates(results.from_runs(save(*cells)))
    assert (entry.sensitivity, entry.missing, entry.largest_stable) == (pytest.approx(0.3), [], 0.3)
    uneven = replace(cells[2], run_dir=RunDir(cells[2].run_dir.path.with_name("uneven")))
    uneven.config["optimizer"]["lr"] = 0.04
    write_run(uneven, final=4.5)
    (entry,) = over_rates(results.from_runs(save(*cells[:2], uneven)))
    assert entry.sensitivity is None


def test_the_settings_of_a_stabilizer_are_averaged_in_its_speed(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(3)]
    cells += [make_cell(tmp_path, "mha", "quack", seed=seed, tau=tau) for seed in range(3) for tau in (0.1, 1.0)]
    for cell in cells:
        write_run(cell)
    quack = next(speed for speed in speeds(results.from_runs(save(*cells))) if speed.stabilizer == "quack")
    assert (len(quack.logs), quack.ratio) == (3, pytest.approx(1.0))


def test_a_speed_that_includes_warm_up_is_compared_with_nothing(tmp_path, save):
    cells = [make_cell(tmp_path, "mha", stabilizer, seed=seed) for stabilizer in ("none", "quack") for seed in range(3)]
    for cell, timed_tokens in zip(cells, (512, 512, 0, 512, 0, 512), strict=True):
        write_run(cell, timed_tokens=timed_tokens)
    quack = next(speed for speed in speeds(results.from_runs(save(*cells))) if speed.stabilizer == "quack")
    assert len(quack.logs) == 1


def test_a_baseline_that_diverged_without_a_number_is_infinitely_large(tmp_path, save):
    cells = [make_cell(tmp_path, "mla", stabilizer) for stabilizer in ("none", "quack")]
    for cell in cells:
        cell.config["trainer"]["unstable_logit"] = 1000.0
    write_run(cells[0], status="diverged", last_step=10, max_logit=1e30)
    write_run(cells[1])
    measured = results.from_runs(save(*cells))
    found = claim(measured, "logits explode")
    assert (found.verdict, "∞" in found.numbers) == ("holds", True)


def test_the_first_head_above_the_threshold_is_found(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    cell.config["trainer"]["unstable_logit"] = 50.0
    write_run(cell, max_logit=100.0)
    (result,) = results.from_runs(save(cell)).results
    # Head 4 of layer 2 has 15 times the base, which passes 50 once 100 ** (step / 40) > 3.3: from step 10.5 on.
    assert result.blowup == (12, 2, 4)
    row = "| mha, lr 0.3 | none | 1 of 1 | 12 | 2 | 4 | 0 |"
    for directory in (tmp_path, tmp_path / "without_curves"):
        if directory != tmp_path:
            collected.write(tmp_path, directory)
            (directory / collected.CURVES_FILE).unlink()
        text = as_markdown(directory)
        assert row in text
        assert "first head above the threshold: layer 2, head 4, at step 12" in text


def collected_runs(directory: Path) -> list[tuple[Any, ...]]:
    """What the collected files say of each run, read where there is no plan."""
    with tempfile.TemporaryDirectory() as elsewhere:
        for name in (collected.RESULTS_FILE, collected.CURVES_FILE):
            shutil.copy(directory / name, elsewhere)
        found = collected.load(Path(elsewhere)).results
    return [(r.cell.fingerprint, r.status, r.summary, r.curve("val/loss"), r.blowup) for r in found]


@pytest.mark.parametrize("out", ["sweep", "out"])
def test_a_run_of_which_less_is_left_stays_in_the_collected_files(out, tmp_path, monkeypatch, capsys):
    # Collected again, such runs became "pending", and their curves went.
    directory, target = tmp_path / "sweep", tmp_path / out
    names = (
        "deleted",
        "begun anew",
        "out of the plan and deleted",
        "out of the plan",
        "without curves",
        "cut",
        "whole",
    )
    cells = {name: make_cell(directory, "mha", "quack", seed=seed) for seed, name in enumerate((*names, "interrupted"))}
    for name, cell in cells.items():
        write_run(cell, **({"status": "interrupted", "last_step": 20} if name == "interrupted" else {}))
    every = SweepPlan(sweep="demo", question="Which?", command="c", cells=[*cells.values()])
    write_plan(directory, every)
    line = ["collect", f"dir={directory}", f"out={target}"]
    assert call_here("sweep", line, monkeypatch, capsys)[0] == 0
    results_file, before = target / collected.RESULTS_FILE, collected_runs(target)
    for name in ("deleted", "begun anew", "out of the plan and deleted", "interrupted"):
        shutil.rmtree(cells[name].run_dir.path)
    write_run(cells["begun anew"], status="running", last_step=5)
    cells["without curves"].run_dir.metrics_file.unlink()
    lines = cells["cut"].run_dir.metrics_file.read_text().splitlines(keepends=True)
    cells["cut"].run_dir.metrics_file.write_text("".join(lines[:3]))
    write_plan(directory, replace(every, cells=[cell for name, cell in cells.items() if "out of" not in name]))
    code, stdout, _ = call_here("sweep", line, monkeypatch, capsys)
    assert code == 0
    assert f"7 runs of which {directory} has less than was collected, or nothing, are kept" in stdout
    assert f"remove {results_file} first" in stdout
    assert collected_runs(target) == before
    # As the line says.
    results_file.unlink()
    assert call_here("sweep", line, monkeypatch, capsys)[0] == 0
    known = ["pending", "killed", "completed", "completed", "completed", "pending"]
    assert [status for _, status, *_ in collected_runs(target)] == known


def test_the_collected_files_of_another_sweep_are_not_replaced(tmp_path, monkeypatch, capsys):
    for name, stabilizer in (("one", "quack"), ("other", "none")):
        cell = make_cell(tmp_path / name, "mha", stabilizer)
        write_run(cell)
        write_plan(tmp_path / name, SweepPlan(sweep=name, question="Which?", command="c", cells=[cell]))
    assert call_here("sweep", ["collect", f"dir={tmp_path}/one", f"out={tmp_path}/out"], monkeypatch, capsys)[0] == 0
    before = snapshot(tmp_path)
    line = ["collect", f"dir={tmp_path}/other", f"out={tmp_path}/out"]
    code, _, stderr = call_here("sweep", line, monkeypatch, capsys)
    assert (code, stderr.count("\n")) == (2, 1)
    assert "out has the collected results of another sweep, one, and none of" in stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("room", ["for nothing", "for all but the last file"])
def test_on_a_full_disk_the_collected_files_stay_as_they_were(room, small_disk, tmp_path, save, monkeypatch, capsys):
    # The old files were cut before the new ones met the end of the disk.
    cells = [make_cell(tmp_path, "mha", "quack", seed=seed) for seed in range(8)]
    write_run(cells[0])
    line = ["collect", f"dir={save(*cells)}"]
    assert call_here("sweep", [*line, f"out={small_disk}"], monkeypatch, capsys)[0] == 0
    before = snapshot(small_disk)
    for cell in cells[1:]:  # of other curves, so that they are not compressed to the size of one
        write_run(cell, final=3.0 + cell.config["seed"] / 7, max_logit=71.0 + cell.config["seed"])
    pages = [-(-path.stat().st_size // 4096) for path in collected.write(tmp_path, tmp_path / "elsewhere")]
    left = 0 if room == "for nothing" else 4096 * (sum(pages) - 1)
    (small_disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - left))
    code, _, stderr = call_here("sweep", [*line, f"out={small_disk}"], monkeypatch, capsys)
    assert (code, stderr.count("\n")) == (2, 1)
    assert re.search(rf"{small_disk}/\S*: No space left on device; free some space, or choose another", stderr)
    (small_disk / "ballast").unlink()
    assert snapshot(small_disk) == before


def test_changed_bytes_in_the_collected_files_are_detected(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell)
    collected.write(save(cell), tmp_path / "out")
    path = tmp_path / "out" / collected.CURVES_FILE
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"curves\.parquet is invalid"):
        collected.load(tmp_path / "out")


def test_entries_of_the_wrong_type_are_ignored(tmp_path, save):
    summaries = [{"step": "abc"}, {"step": -1}, {"unstable": 5}, {"reason": 5}, {"outside_s": [1]}, {"probes": None}]
    values = ["abc", [], [[]], [[1.0], [1.0, 2.0]], [["a"]], {"a": 1}, [1.0]]
    keys = ("val/loss", "train/loss", "logits/max", "logits/max_per_head", "logits/delta_mean_per_head")
    cells = [make_cell(tmp_path, "mha", "none", seed=seed) for seed in range(len(summaries) + 1)]
    for cell in cells:
        write_run(cell)
    for cell, change in zip(cells, summaries, strict=False):
        summary = json.loads(cell.run_dir.summary_file.read_text())
        cell.run_dir.summary_file.write_text(json.dumps(summary | change))
    with cells[-1].run_dir.metrics_file.open("a") as file:
        for value in values:
            file.write(json.dumps({"step": 50, "tokens": 9} | dict.fromkeys(keys, value)) + "\n")
    measured = results.from_runs(save(*cells)).results
    assert [bool(result.summary) for result in measured] == [False] * len(summaries) + [True]
    assert {key: int(measured[-1].curves[key].steps[-1]) for key in keys} == dict.fromkeys(keys, STEPS)
    report.write([tmp_path], tmp_path / "out", command="")


def test_control_characters_in_a_name_do_not_reach_the_terminal(tmp_path, save):
    cell = make_cell(tmp_path, "mha", "none")
    write_run(cell, unstable=("\x1b]0;title\x07",))
    text = runs.as_text(results.from_runs(save(cell)))
    assert "\x1b" not in text
    assert "\\x1b]0;title" in text


def test_the_cost_of_a_probe_is_given_in_steps_of_the_run(tmp_path, save):
    own = make_cell(tmp_path, "mla", "quack")
    write_run(own)
    # 5 s for 10 probes, beside 12.5 s for 40 steps.
    assert "| mla | probe | 500 ms | 1.60 | 1 |" in as_markdown(save(own))


def test_stabilizers_are_compared_under_each_setting(tmp_path, save):
    usual = [make_cell(tmp_path, "mla", name, seed=seed) for name in ("none", "quack") for seed in (0, 1)]
    usual += [make_cell(tmp_path, "mla", "none", seed=2), make_cell(tmp_path, "mla", "quack", seed=2)]
    other = [make_cell(tmp_path, "mla", name) for name in ("none", "quack")]
    for cell in other:
        cell.config["optimizer"]["max_grad_norm"] = 1.0
    other = [replace(cell, run_dir=RunDir(cell.run_dir.path.with_name(cell.name + "-other"))) for cell in other]
    for cell in usual:
        cell.config["optimizer"]["max_grad_norm"] = None
        write_run(cell, final=3.9 if "none" in cell.name else 3.7)
    for cell in other:
        write_run(cell, final=3.5 if "none" in cell.name else 3.6)
    text = as_markdown(save(*usual, *other))
    assert "| mla, lr 0.3 | most common settings | 3.900 [3.900, 3.900] | 3.700 [3.700, 3.700] | quack < none |" in text
    assert "| mla, lr 0.3 | max_grad_norm=1 | 3.500 | 3.600 | none ~ quack |" in text
