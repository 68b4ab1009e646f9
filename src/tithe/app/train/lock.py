"""One run a folder: a second one would write into the files of the first."""

from __future__ import annotations

import contextlib
import os
import platform
import weakref
from pathlib import Path
from typing import final

from tithe.errors import TitheError
from tithe.files import lock, writing

_NAME = "run.lock"


@final
class RunLock:
    """Holds a folder for one run until `release`, or until the process ends, however it ends.

    The system keeps the lock, not the file: one that a killed run left does not block.

    Args:
        folder: of the run; made if missing.
        place: of the folder in the recipe, for the message.

    Raises:
        TitheError: another run holds the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self._path = folder / _NAME
        with writing(folder):
            self._new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = None
            while descriptor is None:
                descriptor = self._take(folder, place)
            self._close = weakref.finalize(self, os.close, descriptor)
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        _held.add(self)

    def _take(self, folder: Path, place: str) -> int | None:
        """Open and lock the file; None where the run before removed it between the two."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(descriptor) is False:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise TitheError(
                place,
                found=f"a run that is writing into {folder} ({holder})",
                expected="a folder that no other run writes into",
                remedy="wait until it ends, or choose another output",
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(self._path)):
                return descriptor
        os.close(descriptor)
        return None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Let other runs write here; a folder that was made and holds nothing goes."""
        if not self._close.alive:
            return
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            if self._new:
                self._path.parent.rmdir()
        self.let_go()

    def let_go(self) -> None:
        """Close the file, which another process may hold open too."""
        self._close()


_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget() -> None:
    """A forked worker outlives a run that is killed for seconds, and would hold the lock meanwhile."""
    for held in list(_held):
        held.let_go()


if os.name == "posix":
    os.register_at_fork(after_in_child=_forget)
