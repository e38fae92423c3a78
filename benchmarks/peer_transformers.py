"""
transformers' `generate` as a measured process: commands and answers are lines of JSON on standard input and output.

It runs in a process of its own so that its memory and threads are its own. Load: {"model_dir", "dtype", "threads"};
then any number of {"prompts": [[ids]], "batch": n, "answer_len": n}.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def main() -> int:
    """Serve commands until the input ends."""
    out = sys.stdout
    sys.stdout = sys.stderr  # libraries print; the pipe carries answers only
    started_s = time.perf_counter()
    load = json.loads(sys.stdin.readline())
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(load["threads"])
    dtype = getattr(torch, load["dtype"])
    model = AutoModelForCausalLM.from_pretrained(load["model_dir"], dtype=dtype, local_files_only=True)
    model.train(False)
    _say(out, {"ready_s": time.perf_counter() - started_s, "torch": torch.__version__})
    for line in sys.stdin:
        command = json.loads(line)
        _say(out, _run(model, command))
    return 0


def _run(model: Any, command: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily for all prompts (of one length), `batch` at a time, exactly `answer_len` tokens each."""
    import torch

    prompts, batch, answer_len = command["prompts"], command["batch"], command["answer_len"]
    answers: list[list[int]] = []
    started_s = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(prompts), batch):
            ids_BT = torch.tensor(prompts[start : start + batch])
            output_BT = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=False,
                min_new_tokens=answer_len,
                max_new_tokens=answer_len,
                pad_token_id=0,
            )
            answers += output_BT[:, ids_BT.shape[1] :].tolist()
    seconds = time.perf_counter() - started_s
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "answers": answers, "peak_bytes": peak_bytes}


def _say(out: Any, value: dict[str, Any]) -> None:
    print(json.dumps(value), file=out, flush=True)


if __name__ == "__main__":
    sys.exit(main())
