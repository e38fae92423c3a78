"""Serving: an engine of tensor- and pipeline-parallel ranks behind a gRPC and an HTTP front."""
