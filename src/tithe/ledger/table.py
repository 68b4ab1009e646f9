"""Show the bytes that a piece of work needed or will need."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["Ledger", "human"]

_WIDTH = 78
_ROWS = 12


def human(num_bytes: int) -> str:
    """Write a number of bytes with three or four digits and a decimal unit.

    Example:
        >>> human(512), human(364_250_000)
        ('512 B', '364.2 MB')
    """
    size = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{num_bytes} B" if unit == "B" else f"{size:.1f} {unit}"


def _empty() -> dict[str, int]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The bytes that a piece of work needed (`tithe.measure`) or will need (`plan.predict`).

    Attributes:
        peak: the highest sum of live storages that the work created; storages that existed before do not count.
        kept: the most memory that autograd held for backward at any time of the forward pass.
        kept_by_module: the parts of `kept` by path of the module that kept them first; "" is the outermost module
            itself, or no module.
        by_kind: `peak` split into "kept" (for backward), "gradients" (that become some `.grad`) and "other".
        allocator_peak: the CUDA allocator's own figure, in the same terms as `peak`; None when no GPU was used.
        weights: the model's parameters and buffers. Known to predictions, else 0, like all that follow.
        theta: the values that are trained, head included.
        gradients: their gradients.
        optimizer: their optimizer state: two moments, as Adam keeps.
        index: the tensors that say where the values belong.

    Example:
        >>> Ledger(peak=300, kept=100, by_kind={"kept": 100, "gradients": 0, "other": 200}).as_dict()["peak"]
        300
    """

    peak: int
    kept: int
    kept_by_module: Mapping[str, int] = field(default_factory=_empty)
    by_kind: Mapping[str, int] = field(default_factory=_empty)
    allocator_peak: int | None = None
    weights: int = 0
    theta: int = 0
    gradients: int = 0
    optimizer: int = 0
    index: int = 0

    @property
    def saved(self) -> int:
        """Return `kept`, by torch's own word for tensors that autograd holds: saved tensors."""
        return self.kept

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain dicts and numbers, ready for JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: dict(cast("Mapping[str, int]", value)) if isinstance(value, Mapping) else value
            for name, value in fields.items()
        }

    def __str__(self) -> str:
        """Return a table of at most 78 columns: the figures, then the modules that keep most for backward."""
        rows = [("peak", self.peak)]
        rows += [
            (f"  of it {'kept for backward' if kind == 'kept' else kind}", size) for kind, size in self.by_kind.items()
        ]
        rows += [("kept for backward, at most", self.kept)]
        if self.allocator_peak is not None:
            rows += [("peak of the CUDA allocator", self.allocator_peak)]
        standing = ("weights", "theta", "gradients", "optimizer", "index")
        rows += [(name, getattr(self, name)) for name in standing if getattr(self, name)]
        largest = sorted(self.kept_by_module.items(), key=lambda item: (-item[1], item[0]))
        modules = [(path or "(outermost module, or none)", size) for path, size in largest[:_ROWS]]
        if len(largest) > _ROWS:
            modules += [(f"({len(largest) - _ROWS} more modules)", sum(size for _, size in largest[_ROWS:]))]
        lines = [_row(name, size) for name, size in rows]
        if modules:
            lines += ["", "kept for backward, by module"] + [_row("  " + path, size) for path, size in modules]
        return "\n".join(lines)


def _row(name: str, size: int) -> str:
    room = _WIDTH - 12
    label = name if len(name) <= room else name[: room // 2 - 1] + "…" + name[len(name) - room // 2 :]
    return f"{label:<{room}}{human(size):>12}"
