"""The outside world, one thing each; adapters never import one another."""
