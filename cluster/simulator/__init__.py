"""Virtual time over the very engine, router and autoscaler that serve."""
