"""What models may look up: passages, retrieval over them, and the concept graph. No torch."""
