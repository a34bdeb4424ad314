"""A cluster in one process: the real services on a log, a clock and a scheduler that a seed decides."""
