"""
Writes dashboards/trilithon.json: one dashboard over the server's metrics, described here as a table of panels.

    python deploy/grafana/dashboard.py            write the file
    python deploy/grafana/dashboard.py --check    exit 1 if it differs from what this script writes
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "dashboards" / "trilithon.json"
_MODEL = 'model=~"$model"'
_SOURCE = {"type": "prometheus", "uid": "${source}"}


@dataclass(frozen=True)
class Panel:
    """
    One panel. `width` is in the 24 columns of Grafana's grid; `targets` are (query, legend) pairs, where `$m` stands
    for the filter on the chosen models and `$w` for the rate window.
    """

    title: str
    about: str
    targets: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False
    limit: float | None = None


def rate(counter: str, *by: str) -> str:
    """The per-second rate of a counter, summed by some labels."""
    labels = ", ".join(("model", *by))
    return f"sum by ({labels}) (rate({counter}{{$m}}[$w]))"


def quantiles(histogram: str, *levels: float) -> tuple[tuple[str, str], ...]:
    """Quantiles of a histogram over all chosen models."""
    inner = f"sum by (le) (rate({histogram}_bucket{{$m}}[$w]))"
    return tuple((f"histogram_quantile({level}, {inner})", f"p{level * 100:g}") for level in levels)


def mean(histogram: str, *by: str) -> str:
    """The mean of what a histogram observed, per model and further labels."""
    return f"{rate(f'{histogram}_sum', *by)} / {rate(f'{histogram}_count', *by)}"


def stat(title: str, about: str, query: str, *, unit: str = "short", limit: float | None = None) -> Panel:
    """One number; red from `limit` on."""
    return Panel(title, about, ((query, ""),), unit=unit, kind="stat", width=3, limit=limit)


ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    (
        "Now",
        (
            stat("Ranks up", "Ranks that answer.", "sum(trilithon_rank_up{$m})"),
            stat("Running", "Sequences in the last step.", "sum(trilithon_requests_running{$m})"),
            stat("Waiting", "Requests in the queue.", "sum(trilithon_requests_waiting{$m})"),
            stat(
                "Cache in use",
                "Share of cache blocks that running requests hold.",
                "max(trilithon_kv_usage_ratio{$m})",
                unit="percentunit",
                limit=0.95,
            ),
            stat("Generated", "Tokens of answers per second.", f"sum({rate('trilithon_generated_tokens_total')})"),
            stat(
                "TTFT p99",
                "Time from arrival to the first token; one request in a hundred is slower.",
                quantiles("trilithon_time_to_first_token_seconds", 0.99)[0][0],
                unit="s",
            ),
            # A refused request may name no model, so the filter lets an empty one through.
            stat(
                "Not answered",
                "Requests per second that ended in an error.",
                'sum(rate(trilithon_requests_total{model=~"$model|",code!="ok"}[$w]))',
                limit=0.01,
            ),
            stat(
                "Engine losses",
                "Since the server started.",
                "sum(trilithon_engine_restarts_total{$m}) or vector(0)",
                limit=1,
            ),
        ),
    ),
    (
        "Latency, as clients see it",
        (
            Panel(
                "Time to first token",
                "From arrival to the first token: queue plus prefill.",
                quantiles("trilithon_time_to_first_token_seconds", 0.5, 0.9, 0.99),
                unit="s",
            ),
            Panel(
                "Between tokens",
                "From one event of a sequence to the next.",
                quantiles("trilithon_inter_token_seconds", 0.5, 0.9, 0.99),
                unit="s",
            ),
            Panel(
                "Whole request",
                "From arrival to the end.",
                quantiles("trilithon_request_duration_seconds", 0.5, 0.9, 0.99),
                unit="s",
            ),
            Panel(
                "Time per output token",
                "Mean per request, after the first token.",
                quantiles("trilithon_time_per_output_token_seconds", 0.5, 0.9, 0.99),
                unit="s",
            ),
            Panel(
                "Where a request's time goes",
                "Means of queue, prefill and decode.",
                tuple(
                    (mean(f"trilithon_{part}_seconds"), f"{part} {{{{model}}}}")
                    for part in ("queue", "prefill", "decode")
                ),
                unit="s",
                stack=True,
            ),
            Panel(
                "Sizes",
                "Mean tokens of prompts and answers.",
                (
                    (mean("trilithon_request_prompt_tokens"), "prompt {{model}}"),
                    (mean("trilithon_request_generated_tokens"), "answer {{model}}"),
                ),
            ),
        ),
    ),
    (
        "Load",
        (
            Panel(
                "Tokens per second",
                "Of prompts and of answers, counted when a request ends.",
                (
                    (rate("trilithon_generated_tokens_total"), "generated {{model}}"),
                    (rate("trilithon_prompt_tokens_total"), "prompt {{model}}"),
                ),
            ),
            Panel(
                "Requests per second",
                "By how they ended.",
                ((rate("trilithon_requests_total", "finish_reason", "code"), "{{finish_reason}} {{code}}"),),
                stack=True,
            ),
            Panel(
                "Queue",
                "Requests in a batch and waiting.",
                (
                    ("trilithon_requests_running{$m}", "running {{model}}"),
                    ("trilithon_requests_waiting{$m}", "waiting {{model}}"),
                ),
            ),
            Panel(
                "Adapters",
                "Loaded ones, and loads a second by how they ended.",
                (
                    ("trilithon_adapters_loaded{$m}", "loaded {{model}}"),
                    (rate("trilithon_adapter_loads_total", "result"), "loads {{result}}"),
                ),
            ),
            Panel("Tokens in the queue", "Prompt tokens that wait.", (("trilithon_queue_tokens{$m}", "{{model}}"),)),
            Panel(
                "Refused",
                "Before any work, by limit.",
                (("sum by (reason) (rate(trilithon_rejected_total[$w]))", "{{reason}}"),),
                stack=True,
            ),
            Panel(
                "Aborted",
                "Ended before their time, by cause and phase.",
                ((rate("trilithon_aborts_total", "cause", "phase"), "{{cause}} {{phase}}"),),
                stack=True,
            ),
        ),
    ),
    (
        "Cache",
        (
            Panel(
                "Blocks",
                "free + cached + in use = total, always.",
                (("sum by (state) (trilithon_kv_blocks{$m})", "{{state}}"),),
                stack=True,
            ),
            Panel(
                "Prefix cache hits",
                "Share of prompt tokens that needed no computing.",
                (
                    (
                        f"{rate('trilithon_prefix_cache_hit_tokens_total')}"
                        f" / {rate('trilithon_prefix_cache_queried_tokens_total')}",
                        "{{model}}",
                    ),
                ),
                unit="percentunit",
            ),
            Panel(
                "Preemptions per second",
                "Requests put back for lack of memory.",
                ((rate("trilithon_preemptions_total"), "{{model}}"),),
            ),
        ),
    ),
    (
        "Engine",
        (
            Panel(
                "Step time",
                "Mean, by what the step did.",
                ((mean("trilithon_step_seconds", "phase"), "{{phase}} {{model}}"),),
                unit="s",
            ),
            Panel(
                "Host share of a step",
                "Python outside the model; what is not this is computing.",
                ((f"{rate('trilithon_step_host_seconds_sum')} / {rate('trilithon_step_seconds_sum')}", "{{model}}"),),
                unit="percentunit",
            ),
            Panel("Tokens per step", "Mean batch.", ((mean("trilithon_step_tokens"), "{{model}}"),)),
            Panel(
                "Pipeline bubble",
                "Share of stage time spent waiting.",
                (("trilithon_pipeline_bubble_ratio{$m}", "{{model}}"),),
                unit="percentunit",
            ),
            Panel(
                "Constraint compile time",
                "Schemas, grammars and regular expressions, before admission.",
                tuple(
                    (expression.replace("{$m}", ""), legend)
                    for expression, legend in quantiles("trilithon_constraint_compile_seconds", 0.5, 0.99)
                ),
                unit="s",
            ),
            Panel(
                "Constraint failures",
                "By reason.",
                (("sum by (reason) (rate(trilithon_constraint_failures_total[$w]))", "{{reason}}"),),
            ),
        ),
    ),
    (
        "Life",
        (
            Panel(
                "Ranks",
                "1 = answers.",
                (("trilithon_rank_up{$m}", "{{model}} rank {{rank}} (tp {{tp}}, pp {{pp}})"),),
                kind="state-timeline",
                width=12,
            ),
            Panel(
                "Engine losses",
                "By cause.",
                (
                    (
                        "sum by (model, cause) (increase(trilithon_engine_restarts_total{$m}[10m]))",
                        "{{cause}} {{model}}",
                    ),
                ),
                width=6,
            ),
            Panel(
                "Start-up",
                "Seconds by phase, at the last start.",
                (("trilithon_startup_seconds{$m}", "{{phase}} {{model}}"),),
                unit="s",
                kind="bargauge",
                width=6,
            ),
        ),
    ),
)


def _panel(number: int, panel: Panel, x: int, y: int, height: int) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [{"color": "text", "value": None}]
    if panel.limit is not None:
        steps.append({"color": "red", "value": panel.limit})
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0, "thresholds": {"mode": "absolute", "steps": steps}}
    options: dict[str, Any] = {}
    if panel.kind == "timeseries":
        stacking = {"mode": "normal" if panel.stack else "none"}
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 18 if panel.stack else 0,
            "stacking": stacking,
            "showPoints": "never",
        }
        options = {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    elif panel.kind in ("stat", "bargauge"):
        options = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "none", "colorMode": "value"}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _SOURCE,
            "expr": expression.replace("{$m}", f"{{{_MODEL}}}").replace("$w", "$__rate_interval"),
            "legendFormat": legend or "__auto",
        }
        for index, (expression, legend) in enumerate(panel.targets)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "targets": targets,
    }


def build() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y, x = y + 1, 0
        for panel in row:
            height = 4 if panel.kind == "stat" else 8
            if x + panel.width > 24:
                x, y = 0, y + height
            panels.append(_panel(len(panels) + 1, panel, x, y, height))
            x += panel.width
        y += 4 if row[-1].kind == "stat" else 8
    source = {"name": "source", "label": "Data source", "type": "datasource", "query": "prometheus"}
    model = {
        "name": "model",
        "label": "Model",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(trilithon_requests_running, model)", "refId": "model"},
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "current": {"text": "All", "value": "$__all"},
    }
    return {
        "uid": "trilithon",
        "title": "Trilithon",
        "tags": ["trilithon"],
        "schemaVersion": 41,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [source, model]},
        "panels": panels,
    }


def main(arguments: list[str]) -> int:
    """Write the file, or compare it."""
    text = json.dumps(build(), indent=1) + "\n"
    if "--check" in arguments:
        if OUT.exists() and OUT.read_text() == text:
            return 0
        print(f"{OUT.name} is not what {Path(__file__).name} writes. Run the script without --check.", file=sys.stderr)
        return 1
    OUT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
