"""A shard of a model: loading, paged attention, packed linears, one step."""
