"""
A stand-in for the phases: `validate DIRECTORY --attempt 1` answers by what the data file says in its first line.

    good            a report and an estimate          bad      a report with errors, no estimate
    refuse          an error of the configuration     crash    no answer at all
    hang            no end
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    phase, directory = sys.argv[1], Path(sys.argv[2])
    assert phase == "validate"
    job = json.loads((directory / "job.json").read_text())
    word = Path(job["training_path"]).read_text().split()[0]
    if word == "crash":
        print("a cause that only the log may tell")
        return 1
    if word == "hang":
        time.sleep(600)
    finding = {"code": "E-DATA-012", "severity": "error", "file": job["training_name"], "line": 17,
               "path": "messages[2].role", "message": '"asistant" is not a role.', "hint": ""}  # fmt: skip
    report = {"ok": word == "good", "rows": 20, "errors": int(word == "bad"), "warnings": 0, "format": "messages",
              "findings": [finding] if word == "bad" else [], "counts": {"tokens": 900},
              "length_histogram": [0, 3, 17]}  # fmt: skip
    report["counts"]["max_findings"] = job["max_findings"]
    estimate = {"train_tokens": 900, "supervised_tokens": 400, "steps": 5 * job["config"]["training"]["epochs"]
                if job["config"]["training"]["epochs"] else 5, "peak_bytes_per_rank": 1 << 30, "disk_bytes": 7,
                "disk_free_bytes": 9, "seconds": 3.5, "seconds_low": 2.0, "seconds_high": 5.0, "allowed": True,
                "findings": [], "memory_parts": {"weights": 5, "adapter": 2}, "measured": False}  # fmt: skip
    outcome: dict[str, Any] = {"ok": True, "data": {"report": report, "estimate": estimate, "resolved": job["config"]}}
    if word == "bad":
        error = {"code": "invalid_training_file", "message": "1 error."}
        outcome = {"ok": False, "error": error, "data": {"report": report}}
    if word == "refuse":
        error = {"code": "invalid_config", "message": "data.max_tokens is too large.", "param": "data.max_tokens"}
        outcome = {"ok": False, "error": error}
    attempt = directory / "attempts" / "1"
    attempt.mkdir(parents=True)
    (attempt / "validate.json").write_text(json.dumps(outcome))
    return 0 if outcome["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
