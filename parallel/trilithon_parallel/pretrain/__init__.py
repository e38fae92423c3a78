"""Pretraining: a configuration file to a run, on every rank."""
