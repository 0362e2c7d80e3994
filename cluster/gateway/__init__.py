"""The public gRPC service: validate, tokenize, route, stream."""
