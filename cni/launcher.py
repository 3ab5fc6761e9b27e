"""The plugin for a host that has Python, as one small file. Pure."""

from __future__ import annotations

import sys


def launcher(python: str = sys.executable) -> str:
    """The file's text: starts `python`, which must have this package.

    Isolated (-I): a console script is not, and would let what a runtime's environment holds (PYTHONPATH, a user's
    site-packages) change the plugin.
    """
    return f"#!{python} -I\nimport sys\n\nfrom cni.main import main\n\nsys.exit(main())\n"
