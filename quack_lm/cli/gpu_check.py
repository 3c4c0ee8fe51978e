"""Check quack_lm on this machine's GPU: tests, benchmarks, a run of 20 steps at 1B and a trace, and a page about them.

    quack-lm gpu-check                  # needs: GPU. At most 10 min
    quack-lm gpu-check --dry-run        # print the commands, run nothing
    quack-lm gpu-check only=data,run,trace

dir=DIR     where the results go, runs/gpu_check unless given: page.md, to attach to an issue, and what it is made of
only=A,B    some of the parts: {parts};
            or of those that are run only where they are named: {more}
minutes=10  for all parts together: what does not fit is left out, and the page says so

A part that fails or takes more than 5 minutes is on the page too, and the next one starts. A checkout of the
repository is needed for the tests.
Exit codes: 0 no part failed and some passed; 1 one failed or took too long; 2 no GPU, or a mistake in the command line.
"""

import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from quack_lm.cli.flags import check_writable, read_number
from quack_lm.config import take_keys
from quack_lm.errors import UserError, explaining
from quack_lm.files import metrics_line, read_json, user_path, write_atomically
from quack_lm.report.table import Table, duration, significant
from quack_lm.text import echo, shell_line
from quack_lm.training.stop_signals import leaving

REPOSITORY = Path(__file__).parents[2]
# No part may keep the others from running.
LIMIT_S = 300.0
LINES_SHOWN = 40

# The 1B model: at depths at which all variants of a suite with their optimizers fit into 80 GB, and whole in a run like
# the paper's but for the number of sequences. A step of 24 is that of a rank in the paper's runs on 4 GPUs. The
# vocabulary is that of the paper's data.
BENCH = [
    "experiment=paper",
    "model.n_layers=8",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=24",
]
COMPILED = "trainer.compile=true"
SHALLOW = ["model.n_layers=2"]
ONE_MICRO_BATCH = ["model.n_layers=4", "trainer.micro_batch_size=6", "trainer.global_batch_size=6"]
RUN = [
    "model=1b",
    "model.vocab_size=49152",
    "trainer.steps=20",
    "trainer.micro_batch_size=auto",
    "trainer.global_batch_size=32",
    "trainer.val_sequences=8",
    "logger.log_every=5",
    COMPILED,
]
# For the tests of this command, on a CPU.
SMALL = [
    "model.d_model=32",
    "model.n_layers=2",
    "model.n_heads=4",
    "model.d_ff=48",
    "model.vocab_size=512",
    "trainer.device=cpu",
    "trainer.seq_len=16",
    "trainer.micro_batch_size=2",
    "trainer.global_batch_size=4",
    "trainer.val_sequences=2",
]
AROUND = ("loader", "probe", "checkpoint")
# For which ten minutes are too short.
MORE = ("optimizers", "loss", *AROUND)
PEERS = "ours as llama,llama,ours as deepseek_v3,deepseek_v3"


Command = tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """A command, and what the page calls it."""

    name: str
    title: str
    command: Command


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, None where its time was over; and what it printed."""

    part: Part
    code: int | None
    seconds: float
    stdout: str = ""
    stderr: str = ""

    @property
    def is_left_out(self) -> bool:
        """Whether the time of all parts was over before it ended."""
        return self.code is None and self.seconds < LIMIT_S

    @property
    def verdict(self) -> str:
        """`passed`, how it failed, or that there was no time."""
        if self.code is None:
            if not self.is_left_out:
                return "stopped: too slow"
            return "cut off: no time left" if self.seconds else "left out: no time left"
        return f"FAILED (exit code {self.code})" if self.code else "passed"


def main(arguments: list[str]) -> int:
    """Run the parts one after another, and write the page."""
    if {"-h", "--help"} & set(arguments):
        every = parts(Path("DIR"), is_small=False)
        named = {kind: ", ".join(one.name for one in every if (one.name in MORE) == kind) for kind in (False, True)}
        echo(*(__doc__ or "").format(parts=named[False], more=named[True]).splitlines())
        return 0
    own, is_dry = read(arguments)
    end = time.monotonic() + 60 * minutes(own.get("minutes", "10"))
    directory, is_small = user_path(own.get("dir", "runs/gpu_check")), own.get("small") == "true"
    chosen = choose(parts(directory, is_small=is_small), own.get("only"))
    check_writable(directory / "page.md", f"dir={directory}")
    if not is_dry and (directory / "page.md").exists():
        raise UserError(f"dir={directory} holds the page of an earlier check; choose another dir")
    if is_dry:
        echo(*(shell_line(part.command) for part in chosen))
        return 0
    if not is_small:
        refuse_without_gpu()
    with explaining(f"dir={directory}", "or choose another"):
        directory.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    with leaving():
        for number, part in enumerate(chosen, start=1):
            echo(f"[{number}/{len(chosen)}] {part.title}")
            outcome = run(part, directory, limit_s=min(LIMIT_S, end - time.monotonic()))
            echo(f"      {outcome.verdict}, {duration(outcome.seconds)}")
            outcomes.append(outcome)
            # After each part: if this command is ended, the page has the parts before.
            write_atomically(directory / "page.md", page(facts(directory), outcomes))
    echo(f"page: {directory / 'page.md'}")
    if left_out := [one.part.name for one in outcomes if one.is_left_out]:
        needed = ["data"] if "run" in left_out and "data" not in left_out else []
        again = f"only={','.join([*needed, *left_out])} minutes=30 dir=ANOTHER"
        echo(f"no time was left for some: quack-lm gpu-check {again}")
    is_fine = all(one.code == 0 or one.is_left_out for one in outcomes)
    return 0 if is_fine and any(one.code == 0 for one in outcomes) else 1


def read(arguments: list[str]) -> tuple[dict[str, str], bool]:
    """The keys of a command line, and whether it is only to be shown; UserError for anything unknown."""
    own, others = take_keys([one for one in arguments if one != "--dry-run"], ("dir", "only", "minutes", "small"))
    if others:
        raise UserError(f"{others[0]}: quack-lm gpu-check has the keys dir=, only= and minutes=")
    if own.get("small", "false") not in ("true", "false"):
        raise UserError(f"small={own['small']} must be true or false")
    return own, "--dry-run" in arguments


def minutes(text: str) -> float:
    """The value of minutes=; UserError where it is no time."""
    value = read_number(text)
    if not 0 < value < math.inf:
        raise UserError(f"minutes={text} must be a number above 0, the minutes that all parts may take together")
    return value


def parts(directory: Path, *, is_small: bool) -> list[Part]:
    """Everything that is run, in order."""
    cli = (sys.executable, "-m", "quack_lm")
    short, compiled = ((), ()) if is_small else (ONE_MICRO_BATCH, (COMPILED,))

    def bench(
        name: str, *settings: str, rounds: int = 1 if is_small else 6, steps: int = 1 if is_small else 2
    ) -> Command:
        counts = (f"rounds={rounds}", f"steps={steps}", f"warmup={steps}")
        return (*cli, "bench", *(SMALL if is_small else BENCH), *counts, *settings, f"out={directory / name}.jsonl")

    # A turn is a whole number of the intervals at which something happens around the step.
    around = ("attention=mha", *SHALLOW, "trainer.probe_every=10", "trainer.checkpoint_every=10", *compiled)
    long = ("trainer.seq_len=1024",) if is_small else ()  # so that the loss has pieces
    suites = {
        "stabilizers": ("Stabilizers, MHA", ("suite=stabilizers", "attention=mha", *compiled)),
        "stabilizers_mla": ("Stabilizers, MLA", ("suite=stabilizers", "attention=mla", *compiled)),
        "max_logits": ("Max logits of QK clip, MLA", ("suite=max_logits", "attention=mla", *compiled)),
        "backends": ("Attention kernels, MHA", ("suite=backends", "attention=mha", *compiled)),
        "compile": ("Compiled blocks, MHA", ("suite=compile", "attention=mha")),
        "peers": ("transformers in a plain loop, compiled", ("suite=peers", f"only={PEERS}", *short, *compiled)),
        "optimizers": ("Optimizers, MHA", ("suite=optimizers", "only=adamw,muon", "attention=mha", *compiled)),
        "loss": ("The loss, whole and in pieces, MHA", ("suite=loss", "attention=mha", *SHALLOW, *long, *compiled)),
        "loader": ("Reading data, MHA", ("suite=loader", *around)),
        "probe": ("Logging and the probe, MHA", ("suite=probe", *around)),
        "checkpoint": ("Checkpoints, MHA", ("suite=checkpoint", "only=none,asynchronous", *around)),
    }
    data = f"data.dir={directory / 'data'}"
    sizes = ("experiment=tiny", *SMALL, "trainer.steps=8", "logger.log_every=2") if is_small else RUN
    train = (*cli, "train", data, *sizes)
    quiet = ("trainer.val_every=0", "trainer.probe_every=0", "trainer.checkpoint_every=0", "logger.progress=false")
    # Each test is mostly start-up and compilation, so several share the GPU.
    workers = str(min(12, os.cpu_count() or 1))
    tests = ("-m", "gpu", "-n", workers, "-rfs", "-p", "no:cacheprovider", f"--junitxml={directory / 'tests.xml'}")
    trace = ("suite=stabilizers", "only=none", *compiled, f"trace={directory / 'trace.json.gz'}")
    return [
        Part("tests", "Tests that need a GPU", (sys.executable, "-m", "pytest", str(REPOSITORY / "tests"), *tests)),
        Part("data", "Data of the run", (*cli, "prepare", "data=stdlib", data)),
        Part(
            "run",
            "20 steps of the 1B model, MHA",
            (*train, *quiet, f"run_dir={directory / 'run'}"),
        ),
        Part("trace", "Trace of a step, MHA", bench("trace", *trace, rounds=1)),
        *(
            Part(name, title, bench(name, *settings, **({"steps": 10} if name in AROUND else {})))
            for name, (title, settings) in suites.items()
        ),
    ]


def choose(all_parts: list[Part], only: str | None) -> list[Part]:
    """The parts that `only=` names; UserError for one that does not exist."""
    if only is None:
        return [part for part in all_parts if part.name not in MORE]
    names = [part.name for part in all_parts]
    if unknown := [name for name in only.split(",") if name not in names]:
        raise UserError(f"only={only}: there is no part '{unknown[0]}'; the parts are: {', '.join(names)}")
    return [part for part in all_parts if part.name in only.split(",")]


def refuse_without_gpu() -> None:
    """UserError where torch sees no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            "torch sees no GPU here, and everything that gpu-check does needs one; --dry-run prints its commands"
        )


def run(part: Part, directory: Path, *, limit_s: float = LIMIT_S) -> Outcome:
    """Run a part in a process group of its own, and keep what it prints in the directory."""
    if limit_s <= 0:
        return Outcome(part, None, 0.0)
    out, err = directory / f"{part.name}.log", directory / f"{part.name}.err"
    start, code, command = time.monotonic(), None, list(part.command)
    with out.open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, start_new_session=True)
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this command itself is interrupted
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    texts = (path.read_text(encoding="utf-8", errors="replace") for path in (out, err))
    return Outcome(part, code, time.monotonic() - start, *texts)


def facts(directory: Path) -> dict[str, str]:
    """What the page says of the machine and of the run, as far as there is one."""
    import torch

    from quack_lm.attention import flash
    from quack_lm.training.environment import package_versions

    found = {"GPU": "none", "torch's CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        found["GPU"] = f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, {torch.cuda.device_count()} of them"
    flash_attn = ", ".join(map(str, sorted(flash.installed_versions()))) or "none"
    found |= {"flash-attn": flash_attn, "machine": platform.platform()}
    found |= {name: text for name, text in package_versions().items() if name in ("quack_lm", "python", "torch")}
    return found | facts_of_run(directory / "run")


def facts_of_run(run_dir: Path) -> dict[str, str]:
    """Utilization, speed and losses of the run; the first interval has the compilation and is left out."""
    about, metrics = read_json(run_dir / "environment.json"), run_dir / "metrics.jsonl"
    if not about or not metrics.exists():
        return {}
    lines = [metrics_line(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {"commit": f"{about['git_revision']}{', modified' * about['git_is_dirty']}"}
    found["attention kernel of the run"] = about["attention_kernel"]
    for name, key in (("MFU", "throughput/mfu"), ("tokens/s", "throughput/tokens_per_s")):
        if values := [line[key] for line in lines if key in line][1:]:
            found[f"{name} of the run"] = significant(median(values))
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return found | {"loss of the run": f"{losses[0]:.3f} to {losses[-1]:.3f}"} if losses else found


def page(about: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """The page in Markdown: the machine, every part with its verdict, and the end of what each has printed."""
    summary = [(o.part.title, o.verdict, duration(o.seconds)) for o in outcomes]
    blocks = [
        "# gpu-check",
        Table(header=("", ""), rows=list(about.items())).as_markdown(),
        Table(header=("part", "", "time"), rows=summary, numeric=(2,)).as_markdown(),
    ]
    for one in outcomes:
        shown = one.stdout.splitlines() + (one.stderr.splitlines()[-LINES_SHOWN:] if one.code != 0 else [])
        text = "\n".join(line.rstrip() for line in shown[-LINES_SHOWN:])
        blocks += [f"## {one.part.title}: {one.verdict}", _fenced(shell_line(one.part.command), "bash")]
        blocks += [_fenced(text, "text")] if text.strip() else []
    return "\n\n".join(blocks) + "\n"


def _fenced(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"
