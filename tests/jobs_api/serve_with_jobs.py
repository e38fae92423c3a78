"""
`trilithon serve` with the tests' front: the composition root that the jobs tests start. Takes the verb's flags.

`COMPANION` in the environment is a script that runs beside the server, in place of the worker.
"""

from __future__ import annotations

import argparse
import os
import sys

from trilithon_server.cli import add_serve_arguments, run_serve
from trilithon_server.config import ServeConfig
from trilithon_server.extension import Companion, Launch


def launch(config: ServeConfig) -> Launch:
    """The tests' front, and the script that the environment names."""
    script = os.environ.get("COMPANION")
    companions = (Companion(name="worker", argv=(sys.executable, script)),) if script else ()
    return Launch(config=config, front_module="stand_in_front", companions=companions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    args = parser.parse_args(sys.argv[2:])  # the first word is the verb
    sys.exit(run_serve(args, launch=launch))
