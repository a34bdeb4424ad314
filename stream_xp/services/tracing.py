"""Which tracer the settings ask for; the package of OpenTelemetry is only touched where one is asked for."""

from __future__ import annotations

from stream_xp.domain.telemetry import Telemetry
from stream_xp.domain.tracing import Tracer
from stream_xp.errors import ConfigError
from stream_xp.settings import Settings, variable_of


def tracer_of(settings: Settings, telemetry: Telemetry) -> Tracer:
    """Return what records the spans of a worker: nothing, unless an endpoint is set.

    Raises:
        ConfigError: an endpoint is set, and the extra `otel` is not installed.
    """
    if settings.traces_endpoint is None:
        return Tracer()
    try:
        from stream_xp.adapters.otlp_traces import OtlpTracer  # noqa: PLC0415 (an extra)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{variable_of('traces_endpoint')} is set, but {error.name} is not installed: "
            "pip install 'stream-xp[otel]'"
        ) from error
    return OtlpTracer(settings, telemetry)
