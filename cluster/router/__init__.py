"""The global scheduler: filters, scores and picks a replica for each request."""
