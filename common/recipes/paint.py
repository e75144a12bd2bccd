# SPDX-License-Identifier: Apache-2.0
"""What the plots share: colours that the colour-blind can tell apart, a canvas without a screen, reproducible files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy import ndarray

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), without their yellow."""
INK, FAINT, REFERENCE = "#1F2937", "#9AA5B4", "#4B5563"
PIXELS = 100
"""Of an inch, while a figure is laid out."""
FORMATS = ("svg", "png", "pdf")


@contextmanager
def canvas(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, to be painted and `saved` within the context."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "plot", "font.family": ["DejaVu Sans"], "pdf.fonttype": 42}
    with matplotlib.rc_context(settings | {"font.size": 9}):
        figure = Figure(figsize=(width, height), dpi=PIXELS, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def saved(figure: Figure, form: str) -> bytes:
    """The figure as a file of one of FORMATS; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}[form]
    figure.savefig(buffer, format=form, dpi=2 * PIXELS if form == "png" else PIXELS, metadata=metadata)
    return buffer.getvalue()


def pixels(figure: Figure) -> ndarray:
    """The figure as RGB, uint8 [height, width, 3], at PIXELS an inch."""
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
