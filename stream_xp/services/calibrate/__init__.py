"""Measured error rates: every method of `stream_xp.stats`, looked at without pause, against its promise."""
