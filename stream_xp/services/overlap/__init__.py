"""Which experiments share units, whether they may, and whether they interact: counted exactly from the raw topics."""

from stream_xp.services.overlap.report import OverlapReport
from stream_xp.services.overlap.service import decisive_interactions, overlaps

__all__ = ["OverlapReport", "decisive_interactions", "overlaps"]
