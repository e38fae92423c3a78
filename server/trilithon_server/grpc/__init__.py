"""The gRPC front: thin adapters from protobuf to the service, and back."""
