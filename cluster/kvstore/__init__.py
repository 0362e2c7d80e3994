"""What replicas share: KV blocks, leases, journals, records; embedded or in Redis."""
