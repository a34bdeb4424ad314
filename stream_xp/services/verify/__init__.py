"""Verify: a past decision, derived again from the raw topics."""
