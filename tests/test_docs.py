"""What the documentation tells people to type, write and follow is true of the code.

Every command in a `bash` block is checked here as far as it can be without running it for minutes, or carries a comment
that says what it needs or how long it takes: `# needs: slurm`, `# about 36 min`.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml
from test_refusals import TABLES

from quack_lm import __version__
from quack_lm.cli import VERBS, main
from quack_lm.cli.bench import read as read_bench
from quack_lm.cli.eval import read as read_eval
from quack_lm.cli.export import read as read_export
from quack_lm.cli.generate import read as read_generate
from quack_lm.cli.gpu_check import choose, parts
from quack_lm.cli.gpu_check import read as read_gpu_check
from quack_lm.cli.lr_find import read as read_lr_find
from quack_lm.cli.plan import OWN as KEYS_OF_PLAN
from quack_lm.cli.plan import read as read_plan
from quack_lm.cli.sweep import parse
from quack_lm.config import CONFIG_DIR, compose, instantiate, take_keys
from quack_lm.logit_paths import Factor, LogitPath
from quack_lm.paper import claims
from quack_lm.report import collected
from quack_lm.report import page as report_page
from quack_lm.report.comparison import best_settings, losses, over_rates
from quack_lm.report.results import Result, Results
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.sweep.file import load

ROOT = CONFIG_DIR.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
}
README = PAGES["README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
MARK = re.compile(r"needs: \w|about \d+ (s|min)|^\d+ s\b")
# Run by scripts/env.sh and scripts/test.sh themselves.
KNOWN = (["source", ".venv/bin/activate"], ["ruff", "check", "--fix"], ["ruff", "format"], ["mypy"])


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]
    comment: str

    @property
    def is_marked(self) -> bool:
        return MARK.search(self.comment) is not None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    found = []
    for page, text in PAGES.items():
        for language, block in FENCE.findall(text):
            assert language, f"{page}: a block without a language: {block[:60]!r}"
            lines = block.replace("\\\n", " ").splitlines() if language == "bash" else []
            for line in lines:
                code, _, comment = re.sub(r"^#", " #", line).partition(" #")
                words = shlex.split(code)
                while "&&" in words:
                    cut = words.index("&&")
                    found.append(Command(page, tuple(words[:cut]), comment))
                    words = words[cut + 1 :]
                if words:
                    found.append(Command(page, tuple(words), comment))
    return found


COMMANDS = commands()


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("command", dict.fromkeys(COMMANDS), ids=str)
def test_every_command_can_be_given_or_says_what_it_needs(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    words = list(command.words)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    ours = next((n for n, word in enumerate(words) if word in ("quack-lm", "quack_lm")), None)
    if ours is not None:
        assert ours == 0 or command.is_marked, "torchrun and srun are not run here: say what they need"
        check_verb(words[ours + 1 :], command, capsys)
    elif words[0] in ("bash", "python"):
        paths = [word for word in words[1:] if "/" in word]
        assert paths or words[1:3] == ["-m", "pytest"]
        assert all((ROOT / path).exists() for path in paths)
    elif words not in KNOWN and words[:3] != ["python3", "-m", "venv"]:
        assert command.is_marked, "not checked here: say what it needs"


def check_verb(words: list[str], command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Check `quack-lm WORDS`: as far as the config and the plan go, without data, GPUs or a cluster."""
    verb, *arguments = words
    if verb == "completion" or {"--help", "--cfg", "--info"} & set(words):
        with pytest.raises(SystemExit) as end:
            main(words)
        seen = capsys.readouterr()
        assert not end.value.code, seen.err
        assert seen.out.strip()
        return
    assert verb in VERBS
    if verb == "submit":
        assert command.is_marked
        start = next(n for n, word in enumerate(arguments) if not word.startswith("-"))
        check_verb(arguments[start:], command, capsys)
    elif verb == "sweep":
        check_sweep(arguments)
    elif verb == "bench":
        assert read_bench(arguments).configs
    elif verb == "generate":
        assert str(read_generate(arguments).checkpoint).startswith("runs/")
    elif verb == "gpu-check":
        own, is_dry = read_gpu_check(arguments)
        assert is_dry or command.is_marked
        assert choose(parts(Path("DIR"), is_small=False), own.get("only"))
    elif verb == "export":
        assert str(read_export(arguments).source).startswith("runs/")
    elif verb == "plan":
        check_plan(arguments)
    elif verb == "eval":
        assert command.is_marked
        assert str(read_eval(arguments).checkpoint).startswith("runs/")
    elif verb == "lr-find":
        compose_first(read_lr_find(arguments)[3])
    elif verb == "report":
        directories = arguments[: arguments.index("-o")] if "-o" in arguments else arguments
        assert directories
        assert all(name.startswith("runs/") or (ROOT / name / "results.parquet").is_file() for name in directories)
    else:
        if any(word.startswith("--config") for word in arguments):
            assert command.is_marked, "say which file it needs"
            return
        if "data=mixture" in arguments:
            assert command.is_marked, "say which data sets it needs"
            return
        overrides = [word for word in arguments if not word.startswith(("-", "ranks="))]
        config = compose_first([*overrides, *(["experiment=tiny"] if verb == "prepare" else [])])
        if verb != "prepare":
            instantiate(config["trainer"]).check_ranks(ranks_of(list(command.words)))


def ranks_of(words: list[str]) -> int:
    """The number of ranks that a torchrun, srun, submit or preflight line is meant for."""
    counts = dict.fromkeys(("nodes", "per_node"), 1)
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word == "--nproc-per-node":
            counts["per_node"] = int(value)
        if match := re.fullmatch(r"(--nodes|--ntasks-per-node|ranks)=(\d+)", word):
            counts["nodes" if match[1] == "--nodes" else "per_node"] = int(match[2])
    return counts["nodes"] * counts["per_node"]


def check_sweep(arguments: list[str]) -> None:
    # Another sweep's runs are not there.
    given = parse([argument for argument in arguments if not argument.startswith("reuse=")])
    keys = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if "sweep" not in keys:
        assert "dir" in keys or given.overrides
        compose_first(given.overrides)
        return
    sweep = load(keys["sweep"], keys.get("scale"))
    config = compose_first([*sweep.base, *given.overrides, *sweep.points()[0].overrides])
    instantiate(config["trainer"]).check_ranks(int(keys.get("nodes", 1)) * int(keys.get("gpus", 1)))


def check_plan(arguments: list[str]) -> None:
    own, rest = take_keys(arguments, KEYS_OF_PLAN)
    # The run that has measured an MFU is not there.
    ranks = read_plan({key: value for key, value in own.items() if not value.startswith("runs/")}).world_size
    if any(argument.startswith("sweep=") for argument in rest):
        check_sweep(["plan", *rest])
    else:
        instantiate(compose_first(rest)["trainer"]).check_ranks(ranks)


def compose_first(overrides: list[str]) -> dict[str, Any]:
    """Compose with the first of several values."""
    one = [re.sub(r"^([\w.]+=)range\((\d+),.*\)$", r"\1\2", override) for override in overrides]
    one = [re.sub(r"^([\w.]+=[\w.-]+)(,[\w.-]+)+$", r"\1", override) for override in one]
    return composed(tuple(one))


@cache
def composed(overrides: tuple[str, ...]) -> dict[str, Any]:
    return compose(overrides)


def test_no_command_hides_in_an_indented_block() -> None:
    for page, text in PAGES.items():
        prose = FENCE.sub("", text)
        assert not re.search(r"^ {4,}(quack-lm|python|bash|pip|source) ", prose, flags=re.MULTILINE), page


def test_the_run_of_the_readme_trains_and_every_number_it_logs_is_documented(
    tiny_data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = next(c for c in COMMANDS if c.page == "README.md" and c.words[:2] == ("quack-lm", "train"))
    short = ["trainer.steps=2", "trainer.probe_every=1", "trainer.probe_parts=true", "logger.log_every=1"]
    with pytest.raises(SystemExit) as end:
        main([*first.words[1:], *tiny_data, *short, "optimizer.warmup_steps=0", f"run_dir={tmp_path / 'run'}"])
    assert not end.value.code, capsys.readouterr().err
    page = PAGES["docs/metrics.md"]
    logged = {key for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert {"train/loss", "val/loss", "logits/max", "quack/scale/w_uq"} <= logged
    for name in logged:
        general = re.sub(r"\bw_\w+?(?=$|_per_block)", "<weight>", name.removesuffix("_per_head"))
        assert f"`{general}`" in page, name
    written = {path.name for path in (tmp_path / "run").glob("[!.]*") if path.is_file()}
    assert written == set(re.findall(r"^\| `(\w+\.\w+)` \|", page, flags=re.MULTILINE))


# ------------------------------------------------------------------------------------------------ examples


def test_the_stabilizer_shown_works_as_written() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, type] = {}
    exec(code, names)  # our own README
    halved = names["Halved"](rate=0.25)
    assert isinstance(halved, Stabilizer)
    scales = halved.step_scale((LogitPath("qk", (Factor("w_q", 3), Factor("w_k", 3))),), {})
    assert scales == {"w_q": 0.25, "w_k": 0.25}


def test_the_sweep_file_shown_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/sweeps.md"], flags=re.DOTALL)
    file = tmp_path / "shown.yaml"
    file.write_text(text, encoding="utf-8")
    # Two attentions with two stabilizers less the one excluded, and one extra point.
    assert len(load(str(file), "1b").points()) == 4 * 3
    assert len(load(str(file), "proxy").points()) == 4 * 5


# ------------------------------------------------------------------------------------------------ links and names


def test_every_link_leads_to_a_file_and_a_heading_that_exist() -> None:
    checked = 0
    for page, text in PAGES.items():
        own = headings(text)
        assert len(own) == len(set(own)) or page == "CHANGELOG.md", f"{page} has a heading twice"
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = (ROOT / page).parent / name if name else ROOT / page
            assert path.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in headings(path.read_text(encoding="utf-8")), f"{page}: {target}"
            checked += 1
    assert checked > 50


def headings(text: str) -> list[str]:
    """The anchors of a page, as forges and mkdocs make them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_every_file_that_is_named_exists() -> None:
    for page, text in PAGES.items():
        if page in ("CHANGELOG.md", "docs/experiment_log.md"):  # which speak of the past, too
            continue
        named = re.findall(r"`((?:quack_lm|scripts|configs|tests|slurm|docs|examples)/[\w/.\-]*)`", text)
        named += re.findall(r"`([A-Z]+\.(?:md|cff)|[a-z]+\.toml)`", text)
        missing = [name for name in named if not (ROOT / name).exists() and "halved" not in name]
        assert not missing, page


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/]+\.md", json.dumps(site["nav"]))
    assert sorted(f"docs/{name}" for name in listed) == sorted(page for page in PAGES if page.startswith("docs/"))


def test_the_citation_names_the_version_of_the_package() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__


# ------------------------------------------------------------------------------------------------ numbers


def test_the_counts_of_refused_inputs_are_those_of_the_tests() -> None:
    page = PAGES["docs/input_validation.md"]
    shown = {key: int(count) for key, count in re.findall(r"^\| `([\w -]+)`.* \| (\d+) \|$", page, flags=re.MULTILINE)}
    names = {table: table for table in TABLES} | {"config": "train --config", "prepare_data": "prepare"}
    assert {names[table]: len(rows) for table, rows in TABLES.items()} == shown
    assert f"Each of the {sum(shown.values())} is" in page


@cache
def sweep_results(name: str) -> Results:
    return collected.load(ROOT / "docs" / "results" / name)


COLUMNS = ("none", "qk_clip", "fixed", "quack", "qk_norm")
JUDGING = {3, 4, 5, 6, 7}


def cells_of_row(page: str, name: str) -> list[str]:
    """The cells after the first of the one row of a page's tables with this name."""
    (row,) = re.findall(rf"^\| {re.escape(name)} \| (.*) \|$", PAGES[page], flags=re.MULTILINE)
    return row.split(" | ")


def assert_is_loss_of(cell: str, runs: list[Result]) -> None:
    assert losses(runs).keys() == JUDGING
    assert cell.startswith(f"{fmean(losses(runs).values()):.3f}"), runs[0].label
    assert ("**U**" in cell) is not all(run.is_healthy for run in runs)
    if "tau" in cell:
        assert f"(tau {runs[0].cell.config['stabilizer']['tau']:g})" in cell


def test_the_losses_of_the_proxy_are_those_of_the_committed_runs() -> None:
    measured = sweep_results("fig2-proxy")
    assert measured.plan.tune_seeds == [0, 1, 2]
    places = measured.places()
    assert len(places) == 12
    for place in places:
        best = best_settings(measured, place)
        row = cells_of_row("docs/results.md", f"{place.attention.upper()}, {place.lr:g}")
        for name, cell in zip(COLUMNS, row, strict=True):
            assert_is_loss_of(cell, best[name].runs)
    for attention in measured.attentions():
        row = cells_of_row("README.md", f"{attention.upper()}: loss at 0.3")
        top = next(place for place in places if place.attention == attention and place.lr == 0.3)
        for name, cell in zip(COLUMNS, row, strict=True):
            assert_is_loss_of(cell, best_settings(measured, top)[name].runs)


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_best_rates_of_the_proxy_are_those_of_the_committed_runs(page: str) -> None:
    entries = over_rates(sweep_results("fig2-proxy"))
    assert len(entries) == 10
    for entry in entries:
        edge = "≤ " if entry.is_at_edge else ""
        shown = {
            "best loss, at rate": f"{entry.best_loss:.3f}, {edge}{entry.best_rate:g}",
            "plateau": entry.plateau_text,
            "LR sensitivity": f"{entry.sensitivity:.3f}",
        }
        for name, text in shown.items():
            row = cells_of_row(page, f"{entry.attention.upper()}: {name}")
            assert row[COLUMNS.index(entry.stabilizer)] == text, (entry.attention, name)
        assert entry.seeds == sorted(JUDGING)


def test_the_verdicts_on_the_claims_are_those_of_the_committed_runs() -> None:
    table = re.findall(
        r"^\| (.*) \| (holds|does not hold|not decided) \| (.*)\|$", PAGES["docs/results.md"], re.MULTILINE
    )
    by_sweep = {
        name: {claim.text: claim for claim in claims.claims(sweep_results(name))}
        for name in ("fig2-proxy", "fig3-proxy", "speed-proxy")
    }
    source = {"Frobenius": "fig3-proxy", "steps": "speed-proxy"}
    told = [c for c in by_sweep["fig2-proxy"].values() if c.source in ("Fig. 1", "Fig. 2", "Fig. 3", "Fig. 4", "Speed")]
    # These are told in the losses above: stable runs have no U.
    told = [c for c in told if "is stable at" not in c.text and "explode" not in c.text]
    assert len(told) == len(table)
    for claim, (words, verdict, measured) in zip(told, table, strict=True):
        name = next((sweep for word, sweep in source.items() if word in claim.text), "fig2-proxy")
        found = by_sweep[name][claim.text]
        assert verdict == found.verdict, words
        shown = re.findall(r"\[(-?[\d.]+), (-?[\d.]+)\]", measured)
        numbers = found.numbers if "QK clip is unstable" not in found.text else shown_differences()
        intervals = re.findall(r"\[([+-]?[\d.]+), ([+-]?[\d.]+)\]", numbers)
        known = {tuple(sorted(abs(float(bound)) for bound in bounds)) for bounds in intervals}
        assert {tuple(sorted(abs(float(bound)) for bound in bounds)) for bounds in shown} <= known, words


def shown_differences() -> str:
    return (ROOT / "docs" / "results" / "fig2-proxy" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["fig1", "fig2", "fig3", "fig4", "speed", "sensitivity"])
def test_the_committed_pages_are_those_of_the_committed_runs(name: str) -> None:
    directory = ROOT / "docs" / "results" / (name if name == "sensitivity" else f"{name}-proxy")
    measured = sweep_results(directory.name)
    written = (directory / "report.md").read_text(encoding="utf-8")
    expected = report_page.as_markdown(measured, [], "", [claims.recipe(measured), claims.section(measured)])
    # Without the figures, which take minutes to draw, and the command.
    before, after = expected.split("## Figures")
    assert written.startswith(before)
    conclusions = after[after.index("## Differences from") : after.index("## Provenance")]
    assert conclusions in written


def test_the_numbers_of_comparisons_are_those_of_the_pages() -> None:
    prose = " ".join(PAGES["docs/results.md"].split())
    counts = re.search(r"tests (\d+) differences\. (\d+) have p below 5% by themselves; (\d+)", shown_differences())
    assert counts
    assert "Of the {} pairwise differences of Fig. 2's runs, {} have p below 5% by themselves and {} after".format(
        *counts.groups()
    ) in prose  # fmt: skip
    sensitivity = (ROOT / "docs" / "results" / "sensitivity" / "report.md").read_text(encoding="utf-8")
    found = re.search(r"for the (\d+) neighbors.*: (\d+) of them differ at 5% by themselves, (\d+) after", sensitivity)
    assert found
    assert "Of the {} differences between adjacent columns, {} have p below 5% by themselves, and {} after".format(
        *found.groups()
    ) in prose  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_readmes_stabilizer_passes_every_check_as_it_stands(tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    for folder in ("quack_lm", "configs", "tests", "docs", "scripts", "slurm"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (python,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (yaml_text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (copy / "quack_lm/stabilizers/halved.py").write_text(python)
    (copy / "configs/stabilizer/halved.yaml").write_text(yaml_text)
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def call(*words: str) -> str:
        done = subprocess.run([sys.executable, "-m", *words], cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (copy / "docs/configuration.md").write_text(call("quack_lm", "train", "--help=markdown"))
    call("ruff", "check")
    call("ruff", "format", "--check")
    call("mypy")
    call("pytest", "-p", "no:cacheprovider", "tests/test_config.py", "tests/test_stabilizers.py", "tests/test_step.py")
