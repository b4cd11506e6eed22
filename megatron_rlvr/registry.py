"""Name lookup: a registered name, or a dotted path ``pkg.mod:obj``."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects of one kind by name.

    Example:
        >>> ESTIMATORS = Registry("advantage estimator")
        >>> @ESTIMATORS.register("qae")
        ... def qae(): ...
        >>> ESTIMATORS.get("qae")            # by name
        >>> ESTIMATORS.get("my_pkg.adv:f")   # by dotted path, imported on demand
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under ``name``; a name is taken once."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def get(self, name: str) -> T:
        """The entry called ``name``, or the object at the dotted path ``pkg.mod:obj``.

        Raises:
            ValueError: unknown name, or a path that cannot be imported.
        """
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return load_object(name, kind=self.kind)
        raise ValueError(f"{self.kind} must be one of {sorted(self._entries)} or a path 'pkg.mod:obj', got {name!r}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))


def load_object(path: str, *, kind: str = "object") -> Any:
    """The object at ``pkg.mod:obj``.

    Raises:
        ValueError: the path has no colon, its module cannot be imported, or it has no such attribute.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{kind} path must look like 'pkg.mod:obj', got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{kind} {path!r}: cannot import {module_name!r}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"{kind} {path!r}: module {module_name!r} has no {attribute!r}") from None
