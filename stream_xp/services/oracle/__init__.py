"""The oracle: the statistics computed again, in batch, from the raw topics."""
