"""The standard library's `signal` for the static file: without the enumerations."""

from _signal import *  # type: ignore[import-not-found]  # noqa: F403 - the numbers, and the functions
