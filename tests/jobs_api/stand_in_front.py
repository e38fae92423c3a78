"""A front with jobs whose checks are made by a stand-in: run as the front process of the tests' server."""

from __future__ import annotations

import sys
from pathlib import Path

from trilithon_finetune.api.extension import JobsExtension
from trilithon_server import front

CHECK = (sys.executable, str(Path(__file__).with_name("stand_in_phases.py")))

if __name__ == "__main__":
    sys.exit(front.main(extend=lambda config: (JobsExtension(config, check_command=CHECK),)))
