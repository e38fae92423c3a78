"""Durable jobs: the store that is the truth, leases, and the worker that walks a job through its phases."""
