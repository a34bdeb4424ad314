"""Whole experiments without a broker: what the engine decides, over thousands of runs with a known truth."""
