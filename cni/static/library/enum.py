"""The standard library's `enum` for the static file: Enum and IntEnum with members written out; all else is the original's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class EnumType(type):
    """Makes the names in a class's body its members."""

    _member_map_: dict[str, Any]
    _value2member_map_: dict[Any, Any]

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        """The class, with its members."""
        values = {key: value for key, value in body.items() if not (key.startswith("_") or hasattr(value, "__get__"))}
        made: Any = super().__new__(cls, name, bases, {key: value for key, value in body.items() if key not in values})
        made._member_map_, made._value2member_map_ = {}, {}
        for key, value in values.items():
            member = made._value2member_map_.get(value)
            if member is None:
                member = made._made(value)  # noqa: SLF001 - its own
                member._name_, member._value_ = key, value
                made._value2member_map_[value] = member
            made._member_map_[key] = member
            type.__setattr__(made, key, member)
        return made

    def __call__(cls, value: Any) -> Any:
        """The member with this value. Raises ValueError."""
        if isinstance(value, cls):
            return value
        try:
            return cls._value2member_map_[value]
        except (KeyError, TypeError):
            raise ValueError(f"{value!r} is not a valid {cls.__qualname__}") from None

    def __getitem__(cls, name: str) -> Any:
        return cls._member_map_[name]

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls._value2member_map_.values())

    def __len__(cls) -> int:
        return len(cls._value2member_map_)

    def __contains__(cls, member: object) -> bool:
        return isinstance(member, cls)

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in vars(cls).get("_member_map_", ()):
            raise AttributeError(f"cannot reassign member {name!r}")
        super().__setattr__(name, value)

    @property
    def __members__(cls) -> Mapping[str, Any]:
        return dict(cls._member_map_)


class Enum(metaclass=EnumType):
    """As the original."""

    _name_: str
    _value_: Any

    @classmethod
    def _made(cls, _value: Any) -> Any:
        return object.__new__(cls)

    @property
    def name(self) -> str:
        """The member's name."""
        return self._name_

    @property
    def value(self) -> Any:
        """What stands behind the name."""
        return self._value_

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self._name_}: {self._value_!r}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name_}"

    def __hash__(self) -> int:
        return hash(self._name_)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return type(self), (self._value_,)

    def __copy__(self) -> Any:
        return self

    def __deepcopy__(self, _memo: Any) -> Any:
        return self


class IntEnum(int, Enum):
    """As the original."""

    @classmethod
    def _made(cls, value: int) -> Any:
        return int.__new__(cls, value)

    __repr__ = Enum.__repr__
    __str__ = int.__repr__

    def __hash__(self) -> int:
        return int.__hash__(self)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):  # the importer asks each module for its __path__
        raise AttributeError(name)
    import original_enum

    return getattr(original_enum, name)
