"""The standard library's `socket` for the static file: without the enumerations and the selectors that it brings along."""

from __future__ import annotations

import _socket
from _socket import *  # noqa: F403 - the numbers, and the functions for addresses
from typing import Self


class socket(_socket.socket):  # type: ignore[no-redef]  # noqa: N801 - the original's name
    """As the original, for what needs no file object."""

    __slots__ = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
