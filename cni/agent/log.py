"""The agent's log: one JSON object a line on stderr. From any thread."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime

from cni.wire import words

_lock = threading.Lock()


def log(event: str, **fields: object) -> None:
    """Write one line: when, what happened, and the rest."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = json.dumps({"time": now, "event": event, **fields}, ensure_ascii=False, default=str)
    with _lock:
        try:
            os.write(2, words(line + "\n"))
        except OSError:
            return  # nobody listens; the work goes on
