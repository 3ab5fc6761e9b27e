"""The standard library's `functools` for the static file: what an ADD needs of it; all else is the original's."""

from __future__ import annotations

from _functools import _lru_cache_wrapper, cmp_to_key, partial, reduce
from collections.abc import Callable
from typing import Any

__all__ = ["cmp_to_key", "partial", "reduce"]
_KEPT = ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__")


def update_wrapper(wrapper: Any, wrapped: Any) -> Any:
    """As the original, with its default arguments."""
    for name in _KEPT:
        if hasattr(wrapped, name):
            setattr(wrapper, name, getattr(wrapped, name))
    wrapper.__dict__.update(getattr(wrapped, "__dict__", {}))
    wrapper.__wrapped__ = wrapped
    return wrapper


def wraps(wrapped: Any) -> Callable[[Any], Any]:
    """As the original, with its default arguments."""
    return lambda wrapper: update_wrapper(wrapper, wrapped)


def lru_cache(maxsize: Any = 128, typed: bool = False) -> Any:
    """As the original, but that cache_info() is a plain tuple."""
    if callable(maxsize):
        return update_wrapper(_lru_cache_wrapper(maxsize, 128, typed, lambda *figures: figures), maxsize)
    return lambda of: update_wrapper(_lru_cache_wrapper(of, maxsize, typed, lambda *figures: figures), of)


def cache(of: Any) -> Any:
    """As the original."""
    return lru_cache(None)(of)


class cached_property:  # noqa: N801 - the original's name
    """As the original, for one thread."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, _owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, _owner: type | None = None) -> Any:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.make(instance)
        return value


def total_ordering(cls: Any) -> Any:
    """As the original, for a class that has __lt__ and none of the others."""
    others = ("__gt__", "__le__", "__ge__")
    if "__lt__" not in vars(cls) or any(name in vars(cls) for name in others):
        import original_functools

        return original_functools.total_ordering(cls)

    def not_known_or(answer: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            less = type(self).__lt__(self, other)
            return less if less is NotImplemented else answer(less, self == other)

        return method

    cls.__gt__ = not_known_or(lambda less, equal: not less and not equal)
    cls.__le__ = not_known_or(lambda less, equal: less or equal)
    cls.__ge__ = not_known_or(lambda less, _equal: not less)
    return cls


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # the importer asks each module for its __path__
        raise AttributeError(name)
    import original_functools

    return getattr(original_functools, name)
