"""Open a history over existing checkpoints: in folders, in files, several histories together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tithe.averages.formats import DeltaEntry, FileEntry, PickleEntry, open_entry
from tithe.averages.found import find_checkpoints
from tithe.averages.recorder import Note
from tithe.averages.stacked import DeltaRows, PlainRows
from tithe.errors import TitheError


def open_found(
    paths: Sequence[Path], left_out: list[str] | None
) -> tuple[PlainRows | DeltaRows, list[Note], dict[Path, str]]:
    """Open the checkpoints at some paths, in this order.

    Args:
        paths: files, and folders, each of which is a checkpoint or holds some.
        left_out: takes what is said of those that cannot be read; None raises.

    Returns:
        The rows; what each says of itself where histories recorded them all, else nothing; and what does not count
        though it looks like a checkpoint, with the reason.

    Raises:
        TitheError: naming the checkpoint that cannot be read, or has other tensors than the first; or when none is
            left.
    """
    entries: list[FileEntry | PickleEntry | DeltaEntry] = []
    found = [find_checkpoints(given) for given in paths]
    for path in [one for several in found for one in several.paths]:
        try:
            entry = open_entry(path)
            if left_out is not None and isinstance(entry, FileEntry):
                for file in entry.files:
                    file.check_all()
            entries.append(entry)
        except TitheError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    if not entries:
        raise none_left(paths[0], left_out)
    deltas = [entry for entry in entries if isinstance(entry, DeltaEntry)]
    if deltas and len(deltas) < len(entries):
        odd = next(one for one in entries if (one in deltas) != (entries[0] in deltas))
        raise TitheError(
            str(odd.path),
            found="a delta among whole checkpoints, or the reverse",
            expected=f"what {entries[0].path} is",
            remedy="apply the deltas first (tithe merge), or average them apart",
        )
    notes = [_note(entry) for entry in entries]
    told = [note for note in notes if note is not None]
    rows = DeltaRows(deltas) if deltas else PlainRows(entries)
    skipped = {path: reason for several in found for path, reason in several.skipped.items()}
    return rows, told if len(told) == len(entries) else [], skipped


def none_left(path: Path, left_out: Sequence[str] | None) -> TitheError:
    """Make the error for a history whose checkpoints were all skipped.

    Args:
        path: where they are.
        left_out: what was said of them.
    """
    assert left_out
    return TitheError(
        str(path), found="no checkpoint that can be read", expected="one", remedy=f"check the files: {left_out[0]}"
    )


def _note(entry: FileEntry | PickleEntry | DeltaEntry) -> Note | None:
    """What a checkpoint of a recorded history says, when it is opened on its own.

    Raises:
        TitheError: when it is a coded step.
    """
    note = Note.of(entry.files[0]) if isinstance(entry, FileEntry) else None
    if note is not None and note.bits is not None and note.after:
        raise TitheError(
            str(entry.path),
            found="a step of a coded history, which says nothing alone",
            expected="whole checkpoints, or the history's folder alone",
            remedy="open the folder that it was recorded in as a history of its own",
        )
    return note
