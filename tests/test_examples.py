"""The notebooks of examples/, run without Jupyter: their code cells in order, in their directory."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import pytest

from quack_lm.report import collected
from quack_lm.report.comparison import best_settings, losses

ROOT = Path(__file__).resolve().parents[1]


def test_the_notebook_prints_its_saved_output_and_agrees_with_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "examples" / "loss_by_lr.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    n_figures = 0
    monkeypatch.chdir(path.parent)
    plt.switch_backend("agg")  # first: it closes all figures
    for cell in cells:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec("".join(cell["source"]), names)  # our own notebook
        saved = [text for output in cell["outputs"] for text in output.get("text", [])]
        assert printed.getvalue() == "".join(saved)
        n_figures += sum("image/png" in output.get("data", {}) for output in cell["outputs"])
        assert len(plt.get_fignums()) == n_figures
    assert n_figures == 2
    plt.close("all")
    measured = collected.load(ROOT / "docs" / "results" / "fig2-proxy")
    for place in measured.places():
        for stabilizer, chosen in best_settings(measured, place).items():
            found = names["best"][place.attention, stabilizer, place.lr]
            assert fmean(map(names["final_loss"], found)) == pytest.approx(fmean(losses(chosen.runs).values()))
