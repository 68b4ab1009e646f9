"""Write files and folders whole or not at all: every file of the library is written through `replacing`.

What is written grows in a hidden folder beside its place, `.NAME.XXXXXXXX.tmp`, gets the mode that the umask gives, is
flushed to the disk, and is moved to its place in one operation. Whatever goes wrong before leaves what was there. The
hidden folder goes when the block ends; that of a process that was killed goes when the same place is written next.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from tithe.errors import TitheError

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_FORBIDDEN: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
BEFORE: Final = ".before"
"""What a folder that is being replaced is called meanwhile, in the hidden folder."""
_NUMBER: Final = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")


class NotWrittenError(TitheError):
    """A file or folder that could not be written; what was in its place before is still there.

    Args:
        place: the file or folder.
        found: what the system says.
        expected: what writing it takes.
        remedy: what to do about it.
        number: of the system's error, as in `errno`; None where it gave none.
    """

    def __init__(self, place: str, *, found: str, expected: str, remedy: str, number: int | None) -> None:
        super().__init__(place, found=found, expected=expected, remedy=remedy)
        self.number = number


@contextmanager
def replacing(
    path: str | Path, *, folder: bool = False, overwrite: bool = False, num_bytes: int | None = None
) -> Generator[Path]:
    """Yield a temporary path for a file or folder, which takes the place of `path` if the block succeeds.

    Args:
        path: the final place; a file there is replaced in one step, a folder there must be empty.
        folder: whether the block makes a folder.
        overwrite: let a folder with files in it be replaced: it is moved aside first, so a process that is killed
            between two operations leaves the new one whole in the hidden folder, and nothing in its place.
        num_bytes: about how many will be written, where that is known; refused at once where there is less room.

    Raises:
        TitheError: when something else is there, or its folder does not exist.
        NotWrittenError: when the system lets something of it not be written.
    """
    path = Path(os.path.abspath(path))
    with writing(path, num_bytes):
        if folder and path.is_symlink():
            path = path.resolve()
        check_place(path, folder=folder, overwrite=overwrite)
        if num_bytes is not None:
            _check_room(path, num_bytes)
        with staging(path) as hidden:
            staged = hidden / path.name
            yield staged
            _settle(staged, stat.S_IMODE(hidden.stat().st_mode))
            if overwrite and path.exists():
                os.rename(path, hidden / BEFORE)
            os.replace(staged, path)
    sync_folder(path.parent)


@contextmanager
def staging(path: Path) -> Generator[Path]:
    """Yield a hidden folder beside `path` for as long as the block runs.

    Those for the same place that killed processes left are removed first.

    Args:
        path: what the folder is for; its own folder exists.
    """
    prefix = f".{path.name[:40]}."
    with contextlib.suppress(OSError):
        for left in path.parent.glob(glob.escape(prefix) + "????????.tmp"):
            _sweep(left)
    hidden, descriptor = path.parent / f"{prefix}{secrets.token_hex(4)}.tmp", None
    try:
        while descriptor is None:
            hidden.mkdir()
            descriptor = _held(hidden)
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if descriptor is not None and descriptor >= 0:
            os.close(descriptor)


@contextmanager
def writing(path: str | Path, num_bytes: int | None = None) -> Generator[None]:
    """Turn what the system says inside, when it does not let something be written, into a `NotWrittenError`.

    Args:
        path: what is written.
        num_bytes: that it takes, where that is known.
    """
    try:
        yield
    except (TitheError, BrokenPipeError):
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        number = _number(error)
        if number is None and not isinstance(error, OSError):
            raise
        raise _explained(Path(path), error, number, num_bytes) from error


def is_full(error: BaseException) -> bool:
    """Return whether an error means a full disk, a quota or a limit on the size of files."""
    return _number(error) in _FULL


def lock(descriptor: int) -> bool | None:
    """Lock an open file or folder until it is closed or its process ends, however it ends.

    Returns:
        False where another has locked it, None where the file system knows no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def sync_folder(folder: Path) -> None:
    """Let names in a folder outlive a power cut, where the system has that to offer."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path: Path, *, folder: bool = False, overwrite: bool = False, new: bool = False) -> None:
    """Check a place to write to, before anything is read or computed for it.

    Args:
        path: the place.
        folder: whether it is for a folder.
        overwrite: whether a folder with files in it may be replaced.
        new: whether nothing may be there, but an empty folder for a folder.

    Raises:
        TitheError: when something else is there, or its folder does not exist.
    """
    with writing(path):
        _check(path, folder=folder, overwrite=overwrite, new=new)


def _check(path: Path, *, folder: bool, overwrite: bool, new: bool) -> None:
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise TitheError(
                str(path), found=f"no folder {path.parent}", expected="an existing folder", remedy="create it first"
            ) from None
        return
    except ValueError as error:
        raise TitheError(
            repr(str(path)), found=str(error), expected="the name of a file", remedy="correct the name"
        ) from None
    if new and not (folder and path.is_dir() and not any(path.iterdir())):
        raise TitheError(
            str(path), found="an existing file or folder", expected="a new path", remedy="choose another output"
        )
    if path.is_dir():
        if not folder:
            raise TitheError(
                str(path), found="a folder", expected="a file name", remedy="add a name such as delta.safetensors"
            )
        if not overwrite and any(path.iterdir()):
            raise TitheError(
                str(path), found="a folder with files in it", expected="a new path", remedy="choose another path"
            )
    elif folder or not stat.S_ISREG(mode):
        found = "a file" if stat.S_ISREG(mode) else "a device, a pipe or a socket"
        expected = "a new path" if folder else "a file, or nothing yet"
        raise TitheError(str(path), found=found, expected=expected, remedy="choose another path")


def _check_room(path: Path, num_bytes: int) -> None:
    room = shutil.disk_usage(path.parent)
    if room.total > 0 and room.free < num_bytes:  # some file systems do not say how large they are
        raise NotWrittenError(
            str(path),
            found=f"{room.free:,} bytes of room",
            expected=f"{num_bytes:,} bytes",
            remedy="make room, or name another place",
            number=errno.ENOSPC,
        )


def _held(folder: Path) -> int | None:
    """Lock a folder that was just made.

    Returns:
        The open folder, -1 where folders cannot be opened, or None where another process took it for one of a process
        that was killed, and removed it.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        return -1
    while lock(descriptor) is False:  # by one that looks whether its process still lives
        pass
    if folder.exists():
        return descriptor
    os.close(descriptor)
    return None


def _sweep(left: Path) -> None:
    """Remove a hidden folder if no process holds it."""
    descriptor = os.open(left, os.O_RDONLY)
    try:
        if lock(descriptor):
            shutil.rmtree(left, ignore_errors=True)
    finally:
        os.close(descriptor)


def _settle(staged: Path, mode: int) -> None:
    """Give what was written the modes that the umask gives, whoever wrote it, and flush it to the disk.

    Args:
        staged: a file, or a folder with all in it.
        mode: of a folder that was just made.
    """
    for inside in (staged, *(staged.rglob("*") if staged.is_dir() else ())):
        if inside.is_symlink():
            continue
        is_folder = inside.is_dir()
        os.chmod(inside, mode if is_folder else mode & 0o666)
        if is_folder:
            sync_folder(inside)
        else:
            _sync(inside)


def _number(error: BaseException) -> int | None:
    """The number of the system's error behind an error: its own, in its words, or of what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, NotWrittenError):
            return seen.number
        if isinstance(seen, OSError) and seen.errno is not None:
            return seen.errno
        if isinstance(seen, OSError | SafetensorError) and (match := _NUMBER.search(str(seen))):
            return int(match[1] or match[2])
        seen = seen.__cause__ or seen.__context__
    return None


def _explained(path: Path, error: Exception, number: int | None, num_bytes: int | None) -> TitheError:
    """What the system says, in words that say what to do."""
    told = str(error).strip().splitlines()[0] if number is None else os.strerror(number)
    if number not in _FULL and isinstance(error, OSError) and isinstance(error.filename, str):
        about = Path(os.path.abspath(error.filename))
        if path.parent not in (about, *about.parents) and about not in path.parents:
            return TitheError(
                error.filename,
                found=f"a file that cannot be read ({told})",
                expected="what was there before",
                remedy="restore it, or check its permissions",
            )
    found = f"a file that cannot be written ({told})"
    expected, remedy = "a place that can be written to", "name another place"
    if number in _FULL:
        found = f"no room left ({told})"
        expected = "room for it" if num_bytes is None else f"{num_bytes:,} bytes"
        remedy = "make room, or name another place"
        if number == errno.EFBIG:
            remedy = "raise the limit on the size of files (ulimit -f), or name a place on another file system"
        else:
            with contextlib.suppress(OSError):
                found = f"no room left ({told}, {shutil.disk_usage(_existing(path)).free:,} bytes free)"
    elif number in _FORBIDDEN:
        expected, remedy = f"a folder that may be written to at {path.parent}", "check its permissions, or name another"
    elif number == errno.ENOENT:
        expected, remedy = f"the folder {path.parent}", "create it, and leave it in place while files are written"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        expected, remedy = f"a folder at {path.parent}", "name a place below a folder"
    elif number == errno.ENAMETOOLONG:
        expected, remedy = "a shorter name", "shorten the name"
    elif number == errno.EIO:
        expected, remedy = "a disk that takes what is written", "check the disk, or name a place on another"
    return NotWrittenError(str(path), found=found, expected=expected, remedy=remedy, number=number)


def _existing(path: Path) -> Path:
    """The closest folder above that exists."""
    return next((above for above in path.parents if above.is_dir()), Path("/"))
