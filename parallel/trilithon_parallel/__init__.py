"""The parallel core: many ranks, one model. Importing it loads no torch; its rooms do."""
