"""The standard library's `locale` for the static file, which has none: as much as `subprocess` asks for."""


def getencoding() -> str:
    """Of the programs that are started: their messages are ASCII, names in them may be more."""
    return "utf-8"
