"""Measuring any server that speaks OpenAI's completions: trace, load, statistics, report."""
