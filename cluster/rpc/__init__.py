"""Wire contracts: generated protobuf code and its conversion to and from our types."""
