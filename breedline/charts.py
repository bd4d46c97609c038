"""Charts of a report as SVG: whole without JavaScript, sharp in print, coloured by the page's style sheet.

Vega-Lite draws them here, once, rather than in each browser, where its JavaScript alone would take 0.9 MB of each page. The
marks say their values (`aria-label`), to screen readers and to the page's script. Only numbers are drawn: labels and names
come from anybody.
"""

import math
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

INK, QUIET, GRID, FIRST, SECOND = "#1d1f21", "#575c61", "#e4e3df", "#2563a8", "#b4530a"
"""Colours of text, axes, lines of the grid and two series; document.css puts others in their place in the dark."""
THEME: dict[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None, "continuousWidth": 380, "continuousHeight": 230},
    "axis": {
        "labelColor": QUIET,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "labelFontSize": 12,
        "titleFontSize": 13,
        "gridColor": GRID,
        "domainColor": QUIET,
        "tickColor": QUIET,
    },
    "circle": {"opacity": 1},
}


def curves(table: pd.DataFrame, *, share: bool = False, mark: float | None = None) -> str:
    """A line for each column of `table` over its index, at most two: the first is solid, the second dashed.

    Args:
        share: the values are shares, to be drawn from 0 to 100 %.
        mark: where on the x axis a vertical line is drawn.
    """
    x, names = str(table.index.name), list(map(str, table.columns))
    epochs = pd.api.types.is_integer_dtype(table.index.dtype)
    long = table.reset_index().melt(x, var_name="what", value_name="value").dropna()
    long["said"] = [
        f"{row.what}: {f'{row.value:.1%}' if share else f'{row.value:.4g}'}, {x} {row[0]:.4g}"
        for row in long.itertuples(index=False, name="Row")
    ]
    ticks: dict[str, Any] = {"tickCount": 5}
    if epochs:
        ticks = {"values": table.index[:: max(1, len(table) // 8)].tolist()}
    across = alt.X(x, type="quantitative", title=x, scale=alt.Scale(zero=False, nice=False)).axis(grid=False, **ticks)
    up = alt.Y("value:Q", title=None).axis(tickCount=5)
    if share:
        lowest = math.floor(20 * long["value"].min()) / 20
        up = up.axis(tickCount=5, format="~%").scale(domainMin=lowest, domainMax=1)
    colour = alt.Color("what:N", legend=None, scale=alt.Scale(domain=names, range=[FIRST, SECOND][: len(names)]))
    dashes = alt.StrokeDash("what:N", legend=None, scale=alt.Scale(domain=names, range=[[1, 0], [6, 3]][: len(names)]))
    base = alt.Chart(long).encode(across, up, colour)
    # many points would hide the line, but the page's script finds them all
    points = base.mark_circle(size=60, opacity=1 if epochs else 0).encode(alt.Description("said:N"))
    layers = [base.mark_line(aria=False).encode(dashes), points]
    if mark is not None:
        layers.append(
            alt.Chart(pd.DataFrame({x: [mark]}))
            .mark_rule(color=INK, strokeWidth=1.5, strokeDash=[2, 2])
            .encode(x=x + ":Q")
        )
    return _svg(alt.layer(*layers))


def reliability(bins: pd.DataFrame) -> str:
    """Accuracy over confidence for each bin (confidence, accuracy, low, high, images); on the diagonal both are equal."""
    told = [
        f"confidence {row.confidence:.1%}: {row.accuracy:.1%} right of {row.images} images"
        for row in bins.itertuples(index=False)
    ]
    unit = alt.Scale(domain=[0, 1])
    across = alt.X("confidence:Q", title="mean confidence", scale=unit).axis(format=".0%", tickCount=5)
    up = alt.Y("accuracy:Q", title="share that is right", scale=unit).axis(format=".0%", tickCount=5)
    base = alt.Chart(bins.assign(said=told)).encode(across)
    even = pd.DataFrame({"confidence": [0, 1], "accuracy": [0, 1]})
    return _svg(
        alt.layer(
            alt.Chart(even).mark_line(color=QUIET, strokeDash=[4, 4], strokeWidth=1.5, aria=False).encode(across, up),
            base.mark_rule(color=FIRST, strokeWidth=2, aria=False).encode(alt.Y("low:Q", title=None), alt.Y2("high")),
            base.mark_circle(color=FIRST, size=80).encode(up, alt.Description("said:N")),
        )
    )


def _svg(chart: alt.LayerChart | alt.FacetChart) -> str:
    return vl_convert.vegalite_to_svg(chart.to_dict(), config=THEME, allowed_base_urls=[])
