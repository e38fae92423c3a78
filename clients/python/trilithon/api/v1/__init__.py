"""The first version of the wire contract: `common_pb2`, `generation_pb2` and `generation_pb2_grpc`, and so on."""
