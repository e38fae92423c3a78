"""
A process that has torch loaded and forks ranks: a world of eight would import it eight times, which takes longer than
most of what its ranks do.

    python tests/gang.py        one request a line: {"script", "arguments", "environments"}; "done" when all have ended

It imports and starts nothing else, so a rank is forked from a process with one thread, as if it had begun anew.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import traceback

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve requests until the caller is gone."""
    import torch  # noqa: F401  # what ranks would import, each for itself

    import trilithon_parallel.models
    import trilithon_parallel.optimizer
    import trilithon_parallel.pipeline
    import trilithon_parallel.rendezvous  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        ranks = [fork(request["script"], request["arguments"], each) for each in request["environments"]]
        for pid in ranks:
            os.waitpid(pid, 0)
        print("done", flush=True)


def fork(script: str, arguments: list[str], environment: dict[str, str]) -> int:
    """A process that runs the script as `python script arguments` would."""
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives this process
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
