"""`trilithon serve` with the tests' front: the composition root that the jobs tests start. Takes the verb's flags."""

from __future__ import annotations

import argparse
import sys

from trilithon_server.cli import add_serve_arguments, run_serve
from trilithon_server.extension import Launch

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    args = parser.parse_args(sys.argv[2:])  # the first word is the verb
    sys.exit(run_serve(args, launch=lambda config: Launch(config=config, front_module="stand_in_front")))
