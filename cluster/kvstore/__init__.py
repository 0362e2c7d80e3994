"""The store that replicas share: leases, KV blocks, journals; embedded or Redis."""
