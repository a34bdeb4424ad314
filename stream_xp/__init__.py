"""stream_xp: streaming, always-valid experiment analysis on Kafka."""

__version__ = "0.1.0"
