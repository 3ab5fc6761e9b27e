"""Put the program's output into the documents' console blocks: `make docs`. The diff is reviewed like code."""

from __future__ import annotations

from pathlib import Path

from tests.unit.test_docs import BLOCK, ROOT, printed


def main() -> None:
    """Rewrite every document."""
    for path in sorted(Path(ROOT / "docs").rglob("*.md")):
        text = path.read_text()
        new = BLOCK.sub(lambda block: f"```console\n$ {block[1]}\n{printed(block[1])}```", text)
        if new != text:
            path.write_text(new)


if __name__ == "__main__":
    main()
