"""Text in and out: chat templates, incremental detokenisation, stop strings. Imports no torch."""
