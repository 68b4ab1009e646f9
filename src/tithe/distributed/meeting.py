"""Ranks meet by name before they exchange tensors, so that none waits in vain for one that failed or went elsewhere.

    rank 0   meet("backward of step 4") ──┐                        ┌──> all are here: the collective begins
                                          ├── the group's store ──┤
    rank 1   meet("settle")            ──┘                        └──> they differ: every rank raises, and says so

A collective that some rank never joins can't be given up: gloo keeps its process until the group's own timeout, and
ends it where two sizes meet. So each one is begun only after every rank has said in the process group's key-value
store that it is there. A rank that fails says that in its place, and the others raise what it reports.

How long a rank waits for another that says nothing: the group's own timeout (`init_process_group(timeout=…)`), or ten
minutes where that was left at torch's half hour.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from multiprocessing import util
from pathlib import Path
from typing import Any, cast, final

import torch.distributed as dist

from tithe.errors import TitheError

_LONGEST_PAUSE = 0.005
"""Seconds between two looks into the store, at most."""
_LOOK_FOR_THE_GONE = 0.5
"""Seconds after which a missing rank is looked for among those that have ended, again and again."""
_TORCH_DEFAULT, _DEFAULT_TIMEOUT = 1800.0, 600.0
"""Seconds: the timeout that torch gives a group by default, and how long to wait in one that has it."""
_SHOWN = 4
"""How many keys that differ an error names."""
_MEND = "give every rank as many batches (DistributedSampler, drop_last=True), and make the same calls on each"


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's place among the ranks; 0 without a process group."""
    return dist.get_rank() if world_size() > 1 else 0


def launched_size() -> int:
    """Return the number of processes that a launcher says it started (`WORLD_SIZE`); 1 without one."""
    told = os.environ.get("WORLD_SIZE", "1")
    return int(told) if told.isdigit() else 1


@final
class _Meeting:
    """The meetings of one process group, counted alike on every rank.

    Args:
        store: of the group.
        number: of groups that this process met in before.
    """

    def __init__(self, store: Any, number: int) -> None:
        self.group_store = store
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store: Any = cast(Any, dist).PrefixStore(f"tithe/{number}", store)
        self._count = 0
        self._last = "nothing"
        self._told = 0  # the error that the others know of, by its identity: holding it would hold all of its frames
        seconds: float = store.timeout.total_seconds()
        self.timeout = _DEFAULT_TIMEOUT if seconds == _TORCH_DEFAULT else seconds
        self._home = _home()
        self._store.set(f"process/{self.rank}", json.dumps([self._home, os.getpid()]))
        # Runs at the end of a script and of a process of multiprocessing alike, which `atexit` does not.
        util.Finalize(None, self._leave, exitpriority=10)

    def exchange(self, what: str, note: str) -> list[str]:
        """Wait for every rank, and return the note of each.

        Raises:
            TitheError: on every rank, when one has failed, ended, or is elsewhere.
        """
        self._say({"what": what, "note": note})
        try:
            found = self._hear(what)
        except TitheError as error:
            self._told = id(error)
            raise
        failed = {number: said["failed"] for number, said in enumerate(found) if "failed" in said}
        places = {number: said["what"] for number, said in enumerate(found)}
        error = None
        if failed:
            told = "; ".join(f"rank {number}: {text}" for number, text in failed.items())
            error = TitheError(
                what,
                found=f"a rank that failed ({told})",
                expected="every rank to go on",
                remedy="mend what it reports",
            )
        elif len(set(places.values())) > 1:
            here = _by_value(places)
            out = [number for number, place in places.items() if not place.startswith("backward")]
            if len(out) < self.world:
                here += f": {_ranks(out)} ran out of batches"
            error = TitheError(what, found=here, expected="every rank at the same place", remedy=_MEND)
        if error is not None:
            self._told = id(error)
            raise error
        self._last, self._told = what, 0
        return [said["note"] for said in found]

    def fail(self, error: BaseException) -> None:
        """Say in place of the next meeting that this rank failed, once for an error on its way up."""
        cause: BaseException | None = error
        while cause is not None:
            if id(cause) == self._told:
                return
            cause = cause.__cause__ or cause.__context__
        self._told = id(error)
        text = str(error) if isinstance(error, TitheError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # whoever holds the store may have ended before
            self._say({"what": "", "note": "", "failed": text})

    def explain(self) -> TitheError | None:
        """Return what other ranks say of themselves after a collective broke; None where they say nothing."""
        with contextlib.suppress(RuntimeError):
            for other in range(self.world):
                key = f"{self._count + 1}/{other}"
                if other != self.rank and self._store.check([key]):
                    failed = json.loads(self._store.get(key)).get("failed")
                    if failed is not None:
                        return TitheError(
                            self._last,
                            found=f"a rank that failed (rank {other}: {failed})",
                            expected="every rank to go on",
                            remedy="mend what it reports",
                        )
            end = time.monotonic() + 2 * _LOOK_FOR_THE_GONE
            while time.monotonic() < end:  # one that ends closes its connections first, and says so then
                self._look_for_the_gone(self._last, range(self.world))
                time.sleep(_LONGEST_PAUSE)
        return None

    def _say(self, said: Mapping[str, str]) -> None:
        self._count += 1
        self._store.set(f"{self._count}/{self.rank}", json.dumps(said))

    def _hear(self, what: str) -> list[dict[str, str]]:
        keys = {number: f"{self._count}/{number}" for number in range(self.world)}
        start, pause, looked = time.monotonic(), 5e-5, 0.0
        try:
            while not self._store.check(list(keys.values())):
                waited = time.monotonic() - start
                if waited - looked > _LOOK_FOR_THE_GONE:
                    looked = waited
                    keys_missing = [number for number, key in keys.items() if not self._store.check([key])]
                    self._look_for_the_gone(what, keys_missing)
                    if waited > self.timeout:
                        raise self._silence(what, keys_missing)
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            found = [json.loads(value) for value in self._store.multi_get(list(keys.values()))]
            if self._count > 1:  # all are here, so nobody reads what was said before
                self._store.delete_key(f"{self._count - 1}/{self.rank}")
        except RuntimeError as error:
            raise TitheError(
                what,
                found=f"no answer from the store of the process group ({_line(error)})",
                expected="rank 0, which holds it, to go on",
                remedy=f"see what rank 0 reports, or {_MEND}",
            ) from error
        return cast(list[dict[str, str]], found)

    def _look_for_the_gone(self, what: str, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number == self.rank:
                continue
            told = None
            if self._store.check([f"left/{number}"]):
                told = self._store.get(f"left/{number}").decode()
            elif self._store.check([f"process/{number}"]):
                home, process = json.loads(self._store.get(f"process/{number}"))
                if home and home == self._home and not _is_running(process):
                    told = "its process was ended"
            if told is not None:
                raise TitheError(
                    what,
                    found=f"rank {number} gone: {told}",
                    expected="every rank to come here",
                    remedy=f"see what it reports, or {_MEND}",
                )

    def _silence(self, what: str, missing: Sequence[int]) -> TitheError:
        return TitheError(
            what,
            found=f"no word of {_ranks(missing)} for {self.timeout:.0f} seconds; all came to {self._last!r} before",
            expected="every rank to come here",
            remedy=f"{_MEND}; a rank that is only slow gets longer by init_process_group(timeout=…)",
        )

    def _leave(self) -> None:
        error = getattr(sys, "last_value", None)  # what ended the script, where something did
        told = f"it ended after {self._last!r}" + (f" with {type(error).__name__}: {_line(error)}" if error else "")
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", told)


_met: list[_Meeting] = []


def _meeting() -> _Meeting:
    store = cast(Any, dist.distributed_c10d)._get_default_store()
    if not _met or _met[-1].group_store is not store:
        _met.append(_Meeting(store, len(_met)))
    return _met[-1]


def meet(what: str) -> None:
    """Wait until every rank is at the same place; the collectives after it find all of them there.

    Args:
        what: the place, as an error names it: the same text on every rank.

    Raises:
        TitheError: on every rank, when one has failed, ended, is elsewhere, or says nothing for longer than the
            group's timeout (ten minutes where that is torch's default).
    """
    if world_size() > 1:
        _meeting().exchange(what, "")


def exchange(what: str, note: str) -> list[str]:
    """Meet, and return the note of each rank, in their order.

    Raises:
        TitheError: as `meet`.
    """
    return _meeting().exchange(what, note) if world_size() > 1 else [note]


@contextlib.contextmanager
def telling(what: str) -> Generator[None]:
    """Tell the others when this rank fails inside; they raise at their next meeting.

    Args:
        what: the place, for a collective inside that breaks because another rank has gone.

    Raises:
        TitheError: in place of torch's error, when a collective broke and another rank says why.
    """
    if world_size() == 1:
        yield
        return
    meeting = _meeting()
    try:
        yield
    except BaseException as error:
        if isinstance(error, RuntimeError) and _is_broken(error):
            cause = meeting.explain()
            if cause is not None:
                meeting.fail(cause)
                raise cause from error
        if not isinstance(error, GeneratorExit):
            meeting.fail(error)
        raise


@contextlib.contextmanager
def together(what: str) -> Generator[None]:
    """Meet, do something, and meet again: where one rank fails, all of them raise.

    Raises:
        TitheError: as `meet`.
    """
    meet(what)
    with telling(what):
        yield
    meet(f"the end of {what}")


def compare(what: str, facts: Mapping[str, str], *, remedy: str = "") -> None:
    """Check that what ranks start from is the same; a digest goes first, and everything only where that differs.

    Args:
        what: the place.
        facts: key → value, as an error shows them.
        remedy: what to do; the default says to give the same on every rank.

    Raises:
        TitheError: on every rank, naming the keys that differ with the values of each.
    """
    if world_size() == 1:
        return
    text = json.dumps(dict(facts), sort_keys=True)
    if len(set(exchange(what, hash_text(text)))) == 1:
        return
    found = [cast(dict[str, str], json.loads(note)) for note in exchange(f"{what}: what differs", text)]
    keys = list(dict.fromkeys(key for each in found for key in each))
    differ = [key for key in keys if len({each.get(key) for each in found}) > 1]
    shown = [f"{key} {_by_value({n: each.get(key, 'none') for n, each in enumerate(found)})}" for key in differ]
    more = f"; and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
    raise TitheError(
        f"{what}, {differ[0]}",
        found=f"ranks that differ: {'; '.join(shown[:_SHOWN])}{more}",
        expected="the same on every rank",
        remedy=remedy or f"give every rank the same {', '.join(differ[:_SHOWN])}",
    )


def hash_text(text: str) -> str:
    """Return a short digest of a text, the same in every process."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _home() -> str:
    """Where a process number means what it means here: the boot of a machine, and its namespace; "" where unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in {"Z", "X"}  # ended, and not yet asked for its exit status


def _by_value(values: Mapping[int, str]) -> str:
    """Say who has what: `0 on rank 0, 1 on ranks 1 and 2`."""
    owners: dict[str, list[int]] = {}
    for number, value in values.items():
        owners.setdefault(value, []).append(number)
    return ", ".join(f"{value} on {_ranks(numbers)}" for value, numbers in owners.items())


def _ranks(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = ", ".join(map(str, numbers[:_SHOWN]))
    return f"ranks {shown}" + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")


def _is_broken(error: RuntimeError) -> bool:
    """Whether torch gave a collective up."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "Connection", "NCCL", "Timed out waiting", "Socket")
    )


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
