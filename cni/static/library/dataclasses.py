"""The standard library's `dataclasses` for the static file: what this package uses of it, without compiling code.

The original writes the source of six methods for each class and compiles it, and imports `inspect` to do so: 25 of the 70 ms
that an ADD in-process took. Here they are closures, made in microseconds. What is not here is refused by name;
tests/unit/test_static_library.py holds it against the original for every dataclass of the package.
"""

from __future__ import annotations

from _operator import attrgetter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

_Class = TypeVar("_Class", bound=type)
FIELDS = "__dataclass_fields__"
MISSING = object()


class FrozenInstanceError(AttributeError):
    """An attribute of a frozen instance was to be changed."""


class Field:
    """One field of a class."""

    __slots__ = ("compare", "default", "default_factory", "kw_only", "metadata", "name")

    def __init__(self, default: Any, default_factory: Any, metadata: Mapping[str, Any], compare: bool) -> None:
        self.name = ""
        self.kw_only = False
        self.compare = compare
        self.default = default
        self.default_factory = default_factory
        self.metadata = metadata


def field(
    *,
    default: Any = MISSING,
    default_factory: Any = MISSING,
    metadata: Mapping[str, Any] | None = None,
    compare: bool = True,
) -> Any:
    """What stands behind a field's name when it is more than a default."""
    return Field(default, default_factory, metadata or {}, compare)


def fields(of: Any) -> tuple[Field, ...]:
    """The fields of a class or of an instance, in order."""
    return tuple(getattr(of, FIELDS).values())


def replace(instance: Any, /, **changes: Any) -> Any:
    """Another one, with these values changed."""
    return instance.__class__(**{name: getattr(instance, name) for name in getattr(instance, FIELDS)} | changes)


def dataclass(
    *, frozen: bool = False, slots: bool = False, order: bool = False, kw_only: bool = False
) -> Callable[[_Class], _Class]:
    """As the original, for classes whose annotations are texts (`from __future__ import annotations`)."""

    def decorate(cls: _Class) -> _Class:
        found: dict[str, Field] = {}
        for base in reversed(cls.__mro__[1:]):
            found |= vars(base).get(FIELDS, {})
        inherited = set(found)
        for each in _own(cls, kw_only):
            found[each.name] = each
        own = vars(cls)
        added = {name: made for name, made in _methods(cls, found, frozen=frozen, order=order).items() if own.get(name) is None}
        if slots:
            return _slotted(cls, [name for name in found if name not in inherited], added)
        for name, made in added.items():
            setattr(cls, name, made)
        return cls

    return decorate


def _own(cls: type, kw_only: bool) -> Iterator[Field]:
    for name in vars(cls).get("__annotations__", {}):
        given = vars(cls).get(name, MISSING)
        found = given if isinstance(given, Field) else Field(given, MISSING, {}, compare=True)
        found.name, found.kw_only = name, kw_only
        if found.default is not MISSING:
            setattr(cls, name, found.default)
        elif given is found:
            delattr(cls, name)
        yield found


def _slotted(cls: _Class, names: list[str], added: dict[str, Any]) -> _Class:
    # A class attribute and a slot can't have one name: the defaults live in __init__ alone.
    content = {name: value for name, value in vars(cls).items() if name not in (*names, "__dict__", "__weakref__")}
    return type(cls)(
        cls.__name__, cls.__bases__, content | added | {"__slots__": tuple(names), "__qualname__": cls.__qualname__}
    )


def _methods(cls: type, found: dict[str, Field], *, frozen: bool, order: bool) -> dict[str, Any]:
    values = _values(found)
    return {
        FIELDS: found,
        "__match_args__": tuple(each.name for each in found.values() if not each.kw_only),
        "__init__": _init(cls, found),
        "__repr__": _repr(tuple(found)),
        **_comparisons(values, order),
        # What is equal has one hash; what may change has none.
        "__hash__": (lambda self: hash(values(self))) if frozen else None,
        **({"__setattr__": _refuse_to_set, "__delattr__": _refuse_to_delete} if frozen else {}),
    }


def _init(cls: type, found: dict[str, Field]) -> Callable[..., None]:
    positional = [each.name for each in found.values() if not each.kw_only]
    defaults = {each.name: each.default for each in found.values() if each.default is not MISSING}
    factories = {each.name: each.default_factory for each in found.values() if each.default_factory is not MISSING}
    put = object.__setattr__
    has_more = hasattr(cls, "__post_init__")

    def __init__(self: Any, *args: Any, **named: Any) -> None:  # noqa: N807 - it becomes one
        given = dict(zip(positional, args, strict=False)) | named
        values = defaults | given
        for name, factory in factories.items():
            if name not in given:
                values[name] = factory()
        if len(given) != len(args) + len(named) or values.keys() != found.keys():
            raise TypeError(f"{cls.__name__}({', '.join(found)}): called with {len(args)} values and {', '.join(named)}")
        for name, value in values.items():
            put(self, name, value)
        if has_more:
            self.__post_init__()

    return __init__


def _values(found: dict[str, Field]) -> Callable[[Any], Any]:
    names = [each.name for each in found.values() if each.compare]
    return attrgetter(*names) if names else lambda _self: ()


def _repr(names: tuple[str, ...]) -> Callable[[Any], str]:
    return lambda self: f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _comparisons(values: Callable[[Any], Any], order: bool) -> dict[str, Callable[[Any, Any], Any]]:
    def of_equals(compare: Callable[[Any, Any], bool]) -> Callable[[Any, Any], Any]:
        def method(self: Any, other: Any) -> Any:
            return compare(values(self), values(other)) if other.__class__ is self.__class__ else NotImplemented

        return method

    methods = {"__eq__": of_equals(lambda one, other: one == other)}
    if order:
        methods |= {
            "__lt__": of_equals(lambda one, other: one < other),
            "__le__": of_equals(lambda one, other: one <= other),
            "__gt__": of_equals(lambda one, other: one > other),
            "__ge__": of_equals(lambda one, other: one >= other),
        }
    return methods


def _refuse_to_set(_self: object, name: str, _value: object) -> None:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _refuse_to_delete(_self: object, name: str) -> None:
    raise FrozenInstanceError(f"cannot delete field {name!r}")
