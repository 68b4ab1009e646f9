"""The living objects of a class in this process: torch lists no modules and optimizers, the collector knows them."""

import gc
from itertools import compress
from typing import Any, TypeVar

ObjectT = TypeVar("ObjectT")


def living(kind: type[ObjectT]) -> list[ObjectT]:
    """Return all objects of a class, and of what derives from it, that the garbage collector tracks.

    It takes about 0.2 µs for each object of the process. Asked for its `__class__` an object may lie, or run code, as
    proxies do: its type is looked at alone.

    Args:
        kind: the class.

    Example:
        >>> class Tree: pass
        >>> class Oak(Tree): pass
        >>> oak = Oak()
        >>> living(Tree) == [oak]
        True
    """
    kinds, new = {kind}, [kind]
    while new:
        new = [derived for each in new for derived in type.__subclasses__(each) if derived not in kinds]
        kinds.update(new)
    objects: list[Any] = gc.get_objects()
    return list(compress(objects, map(kinds.__contains__, map(type, objects))))
