"""The HTTP front: thin adapters from JSON to the service, and back to JSON or server-sent events."""
