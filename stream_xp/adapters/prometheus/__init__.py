"""What a process tells Prometheus: `Metrics` and `Deliveries` hold it, `MetricsServer` serves it."""

from stream_xp.adapters.prometheus.deliveries import Deliveries
from stream_xp.adapters.prometheus.metrics import Metrics
from stream_xp.adapters.prometheus.server import MetricsServer

__all__ = ["Deliveries", "Metrics", "MetricsServer"]
