"""Adaptation of served models. Nothing is implemented yet in this version."""
