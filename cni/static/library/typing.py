"""The standard library's `typing` for the static file: the names that this package uses. Nobody reads a type there."""

from __future__ import annotations

TYPE_CHECKING = False


class _Anything:
    """Can be subscripted, combined with | and inherited from; means nothing."""

    def __getitem__(self, _of: object) -> _Anything:
        return self

    def __or__(self, _other: object) -> _Anything:
        return self

    __ror__ = __or__

    def __mro_entries__(self, _bases: tuple[object, ...]) -> tuple[type, ...]:
        return ()


Any = Final = Literal = NoReturn = Protocol = Self = TextIO = TypeAlias = _Anything()


def TypeVar(*_args: object, **_named: object) -> _Anything:  # noqa: N802 - the original's name
    """A type that is not known yet."""
    return Any


def assert_never(value: object) -> None:
    """As the original."""
    raise AssertionError(f"Expected code to be unreachable, but got: {value!r}")
