"""The decide stage: statistics and orders in, results, signals, weight epochs and config out."""

from stream_xp.services.decide.service import Decide

__all__ = ["Decide"]
