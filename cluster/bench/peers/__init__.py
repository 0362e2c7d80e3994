"""The same work for Sluice and for its peers: other engines, each in an environment of its own."""
