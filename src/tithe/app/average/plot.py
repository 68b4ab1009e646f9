"""How much of each checkpoint an average is made of, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tithe.errors import TitheError

_NAMED = 40
"""Tensors that are named on the axis, at most."""


def plot(coefficients: Mapping[str, Tensor], checkpoints: Sequence[str], path: Path) -> None:
    """Draw bars where one coefficient a checkpoint holds for all tensors, else a heat map, tensor × checkpoint.

    Args:
        coefficients: name → (n,).
        checkpoints: n names.
        path: the file; its ending says the format.

    Raises:
        TitheError: the file cannot be written, or its ending names no format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table_LN = torch.stack(list(coefficients.values()))
    labels = [Path(name).name for name in checkpoints]
    rows, columns = table_LN.shape
    # A canvas of its own: no display is needed, and the caller's matplotlib stays as it is.
    figure: Any = Figure(
        figsize=(min(2.4 + 0.5 * columns, 16.0) + 2 * (rows > 1), min(3.0 + 0.2 * (rows > 1) * rows, 14.0)),
        layout="constrained",
    )
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = list(range(columns))
    if rows == 1:
        axes.bar(places, table_LN[0].tolist(), color="#2b7bba")
        axes.axhline(1 / columns, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel("coefficient")
        axes.spines[["top", "right"]].set_visible(False)
    else:
        far = max(float((table_LN - 1 / columns).abs().max()), 1e-12)
        image = axes.imshow(
            table_LN.numpy(), aspect="auto", cmap="RdBu", vmin=1 / columns - far, vmax=1 / columns + far
        )
        figure.colorbar(image, label=f"coefficient (white: 1/{columns})")
        every = -(-rows // _NAMED)
        names = list(coefficients)
        axes.set_yticks(range(0, rows, every), names[::every], fontsize=6)
    step = -(-columns // _NAMED)
    axes.set_xticks(places[::step], labels[::step], rotation=90, fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise TitheError(
            str(path), found=str(error), expected="a file to write, such as average.png", remedy="name another file"
        ) from error
