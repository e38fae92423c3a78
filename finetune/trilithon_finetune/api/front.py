"""
The front process of a server with finetuning jobs: the server's own, with one extension.

    python -m trilithon_finetune.api.front --config FILE --run-dir DIR --control-fd N --status-fd M
"""

from __future__ import annotations

import sys

from trilithon_finetune.api.extension import JobsExtension
from trilithon_server import front


def main(argv: list[str] | None = None) -> int:
    """Entry of the process; the exit code."""
    return front.main(argv, extend=lambda config: (JobsExtension(config),))


if __name__ == "__main__":
    sys.exit(main())
