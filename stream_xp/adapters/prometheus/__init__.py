"""What a worker tells Prometheus: `Metrics` holds it, `MetricsServer` serves it."""

from stream_xp.adapters.prometheus.metrics import Metrics
from stream_xp.adapters.prometheus.server import MetricsServer

__all__ = ["Metrics", "MetricsServer"]
