"""Training data: token files, samples, blends, schedules and the cursor. Pure functions on numpy arrays; no torch."""
