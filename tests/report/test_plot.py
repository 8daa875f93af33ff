"""Protects the picture of a report from what makes it unreadable."""

from matplotlib.figure import Figure

from kvcompile.heal.record import HealRecord, Point
from kvcompile.report.plot import _draw_healed


def record(*perplexities: float) -> HealRecord:
    curve = [Point(i, 100 * i, float(i), "model", loss=9.0 - i, perplexity=p) for i, p in enumerate(perplexities)]
    ends = (2.0, perplexities[0], perplexities[-1])
    return HealRecord("loss", "model", "text", 100, 1, 1.0, 10, ends, curve)


def labels(record: HealRecord) -> tuple[list[str], list[str]]:
    """What the axis of perplexity says at whole decades, and between them."""
    figure = Figure()
    _draw_healed(record, figure.subplots())
    figure.canvas.draw()
    quality = figure.axes[1].yaxis
    return tuple([t.get_text() for t in quality.get_ticklabels(minor=m) if t.get_text()] for m in (False, True))


def test_labels_of_a_curve_over_decades_do_not_overlap():
    whole, between = labels(record(75_000.0, 500.0, 160.0))
    assert "1,000" in whole
    assert not between


def test_a_curve_inside_a_decade_is_labelled_too():
    _whole, between = labels(record(9.0, 4.0, 3.0))
    assert between
