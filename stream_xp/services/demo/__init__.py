"""The demo: three simulated experiments, a broker and the service in one process, and what is true."""

from stream_xp.services.demo.report import DemoReport
from stream_xp.services.demo.service import Moment, run_demo
from stream_xp.services.demo.world import score

__all__ = ["DemoReport", "Moment", "run_demo", "score"]
