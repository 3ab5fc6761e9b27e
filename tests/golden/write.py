"""Write the golden files anew: `make golden`. Read the diff line by line before you commit it."""

from __future__ import annotations

from tests.golden.cases import CASES, HERE, rendered


def main() -> None:
    """Write every case's files; delete those of cases that are gone."""
    wanted = {path: text for name in CASES for path, text in rendered(name)}
    for stale in {*HERE.glob("*.nft"), *HERE.glob("*.restore"), *HERE.glob("*.connect")} - wanted.keys():
        stale.unlink()
    for path, text in wanted.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
