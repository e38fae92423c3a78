"""Starting ranks: on this host (local), by Slurm, by Kubernetes. No torch: a launcher starts in a moment."""

from __future__ import annotations


class LaunchError(ValueError):
    """
    A user's mistake about a launch: the machines asked for, or the tool that should start them.

    `code` is stable and machine readable, `message` says what, where and the value given, `hint` what to do.
    """

    def __init__(self, message: str, *, code: str = "launch_invalid", hint: str = "") -> None:
        super().__init__(f"{message} {hint}".strip())
        self.code = code
        self.message = message
        self.hint = hint
