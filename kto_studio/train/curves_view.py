"""The curves of the shown run, and the range of steps that is zoomed into. Read from the run's folder."""

from __future__ import annotations

from kto_core.runs.events import RunState, spaced
from kto_studio.shared import curves, views

LEAST = 0.01  # of rewards: what half precision makes of nothing is no curve
HELP = {
    "loss": "Starts at 0.5; lower is better.",
    "rewards": "How much likelier the answers became; good should rise above bad.",
    "margin": "Reward of good minus bad rows; higher is better.",
    "kl": "Distance from the model before training, never below 0; should stay small.",
    "grad_norm": "Length of the gradient before clipping; a sudden rise is a warning.",
}


def key(run, zoom: dict | None = None) -> tuple:
    """Changes with the run's points and with the zoom."""
    metrics = run.state().metrics if run else None
    if not metrics:
        return (run.id if run else None,)
    return run.id, metrics.total, len(metrics), metrics[-1]["step"], _range(run, zoom)


def values(run, zoom: dict | None = None) -> list:
    """The drawing of all curves; empty while there is no point."""
    return [curves.view(made(run.state()), _range(run, zoom)) if run else ""]


def made(state: RunState) -> list[curves.Curve]:
    """The plots of a run, in their order on the page."""
    return [_curve(state, name) for name in views.CURVES]


def _curve(state: RunState, name: str) -> curves.Curve:
    title, series = views.CURVES[name]
    lines = [curves.Line(shown, views.COLORS[shown], state.series(metric)) for metric, shown in series.items()]
    least = LEAST if name in ("rewards", "margin", "kl") else 0
    unit = views.UNITS.get(name, "")
    return curves.Curve(f"plot-{name}", title, lines, unit, HELP.get(name, ""), least=least, thin=_thinned)


def _thinned(points: list) -> list:
    return spaced(points, views.POINTS)


def _range(run, zoom: dict | None) -> curves.Range | None:
    """The zoom, if it is this run's: another run is shown whole."""
    if not run or not isinstance(zoom, dict) or zoom.get("run") != run.id or not zoom.get("range"):
        return None
    low, high = zoom["range"]
    return low, high
