"""The wheel as a user installs it: in an environment of its own, called from a directory outside the checkout."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TWO_RUNS = "# Why?\nbase: [experiment=tiny, trainer.steps=5, trainer.val_every=0]\ngrid: {stabilizer: [none, quack]}\n"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; the other packages are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    call(folder, sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    call(folder, sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python, (wheel,) = folder / "venv/bin/python", folder.glob("quack_lm-*.whl")
    call(folder, sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel)
    # A path alone: the editable installation in the same directory is not activated by it.
    (site_packages,) = folder.glob("venv/lib/python*/site-packages")
    (site_packages / "packages_of_the_tests.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "venv"


def call(folder: Path, *command: object) -> str:
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(map(str, command), cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_prepares_trains_sweeps_and_reports_in_the_callers_directory(
    environment: Path, tmp_path: Path, tiny_data: list[str]
) -> None:
    where = "import quack_lm; print(quack_lm.__file__)"
    package = Path(call(tmp_path, environment / "bin/python", "-c", where).strip()).parent
    assert package.is_relative_to(environment)
    quack_lm = environment / "bin/quack-lm"
    assert call(tmp_path, quack_lm, "--version").startswith("quack-lm ")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/stdlib").symlink_to(Path(tiny_data[-1].partition("=")[2]))
    (tmp_path / "two.yaml").write_text(TWO_RUNS)
    assert "not prepared yet" in call(tmp_path, quack_lm, "prepare", "--check", "data=stdlib", "data.dir=data/other")
    trained = call(tmp_path, quack_lm, "train", "experiment=tiny", "trainer.steps=5", "run_dir=runs/one")
    assert "completed at step 5" in trained
    assert "2 runs: 2 completed" in call(tmp_path, quack_lm, "sweep", "run", "sweep=two.yaml")
    call(tmp_path, quack_lm, "report", "runs/two")
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert {"runs/one/summary.json", "runs/one/environment.json", "runs/two/report/report.html"} <= made
    # The batch scripts and the site file travel inside, too.
    assert str(package / "batch/site.sh") in call(tmp_path, quack_lm, "submit", "--help")
    for script in ("job.sh", "site.sh", "train.sbatch", "prepare.sbatch", "preflight.sbatch", "sweep.sbatch"):
        assert (package / "batch" / script).is_file()


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path: Path) -> None:
    # -S: without the site-packages of this environment, where quack_lm and its dependencies are.
    command = [sys.executable, "-S", ROOT / "scripts/train.py", "experiment=tiny"]
    for path, missing in (("", "No module named 'quack_lm'"), (str(ROOT), "error: No module named 'yaml'")):
        variables = os.environ | {"PYTHONPATH": path}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode in (1, 2)
        assert (done.stdout, done.stderr.count("\n")) == ("", 1), done.stderr
        assert missing in done.stderr
        assert "source .venv/bin/activate" in done.stderr
