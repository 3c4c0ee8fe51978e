"""Figures of the paper (arXiv 2511.21377) that a general report lacks: the norms of Fig. 3, the head of Fig. 4."""

from collections.abc import Mapping
from dataclasses import replace

from quack_lm.report.comparison import by_label
from quack_lm.report.curves import EMPTY, Curve
from quack_lm.report.figures import DELTA, MAX_LOGIT, VAL_LOSS, Panel, Plot, curve, curves, loss_ceiling, relabeled
from quack_lm.report.results import Reader, Result, Results
from quack_lm.report.shown import left_out, shown_places


def plots(results: Results) -> list[Plot]:
    """The figures for which a sweep has data."""
    head = _middle(results)
    change = "Mean absolute change of its attention logits in one optimizer step, on the held-out probe batch."
    max_logit = replace(
        MAX_LOGIT,
        name="max_logit_middle_head",
        read=middle_head("logits/max_per_head"),
        title="Max logit, middle head of the middle layer",
        caption=f"{head} As in the paper's Fig. 4.",
    )
    delta = replace(
        DELTA,
        name="delta_middle_head",
        read=middle_head("logits/delta_mean_per_head"),
        title="Mean |Δlogit|, middle head of the middle layer",
        caption=f"{head} {change} As in the paper's Fig. 4.",
    )
    found = [*_norms(results), curves(results, max_logit), curves(results, delta)]
    return [plot for plot in found if plot.has_data()]


def middle_head(key: str) -> Reader:
    """Reads the middle head of the middle layer from the tables over [layers, heads] of a metric."""

    def read(curves: Mapping[str, Curve]) -> Curve:
        if key not in curves:
            return EMPTY
        _, layers, heads = curves[key].mean.shape
        return curves[key].head(layers // 2, heads // 2)

    return read


def norm_and_tau(run: Result) -> tuple[str, float] | None:
    """What Fig. 3 compares; None for a stabilizer that has no such settings."""
    section = run.cell.config["stabilizer"]
    norm, tau = section.get("norm"), section.get("tau")
    return (norm, tau) if isinstance(norm, str) and isinstance(tau, int | float) and abs(tau) <= 1e9 else None


def _middle(results: Results) -> str:
    """The sentence that says which head this is; empty before anything was probed."""
    for result in results.results:
        if table := result.curves.get("logits/max_per_head"):
            _, layers, heads = table.mean.shape
            return f"Layer {layers // 2} of 0 to {layers - 1}, head {heads // 2} of 0 to {heads - 1}."
    return ""


def _norms(results: Results) -> list[Plot]:
    """QuacK with the Frobenius and the spectral norm: one panel per place and tau for which a sweep has both."""
    panels = []
    places = shown_places(results)
    for place in places:
        by_tau: dict[float, list[Result]] = {}
        for run in results.at(place):
            if run.stabilizer == "quack" and (found := norm_and_tau(run)):
                by_tau.setdefault(found[1], []).append(run)
        for tau, members in by_tau.items():
            groups = list(by_label(members).values())
            norms = [runs[0].cell.config["stabilizer"]["norm"] for runs in groups]
            if len(set(norms)) > 1:
                lines = relabeled([curve(runs, VAL_LOSS) for runs in groups], norms)
                panels.append(Panel(title=f"{place}, tau {tau:g}", lines=lines))
    plot = Plot(
        name="norms",
        title="Norm used by QuacK",
        caption="Loss on the held-out validation sequences. As in the paper's Fig. 3." + left_out(len(places), results),
        x_label="optimizer steps",
        y_label=VAL_LOSS.y_label,
        panels=panels,
        columns=3,
        ceiling=loss_ceiling(results),
    )
    return [plot] if panels else []
