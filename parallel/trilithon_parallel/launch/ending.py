"""The end of a rank's process."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """
    End this process with a code, once all that it wrote is closed.

    Not by `sys.exit`: threads of communication whose peers are gone would be waited for without an end, or would abort
    the process with a signal in place of the code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
