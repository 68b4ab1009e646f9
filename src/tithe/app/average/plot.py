"""How much of each checkpoint an average is made of, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tithe.app import terminal

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
    table_LN = torch.stack(list(coefficients.values()))
    labels = [Path(name).name for name in checkpoints]
    rows, columns = table_LN.shape
    figure = terminal.figure(min(2.4 + 0.5 * columns, 16.0) + 2 * (rows > 1), min(3.0 + 0.2 * (rows > 1) * rows, 14.0))
    axes = figure.add_subplot()
    places = list(range(columns))
    if rows == 1:
        axes.bar(places, table_LN[0].tolist(), color=terminal.COLOURS[0])
        axes.axhline(1 / columns, color="black", linestyle="--", linewidth=1)
        axes.set_ylabel("coefficient")
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
    terminal.save_figure(figure, path)
