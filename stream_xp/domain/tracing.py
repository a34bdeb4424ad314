"""Which pieces of work a worker tells of as spans, and to whom: a port, with values of the domain only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import MappingProxyType, TracebackType
from typing import Final, NamedTuple, Self, TypeAlias

Attribute: TypeAlias = str | int | bool | tuple[str, ...]
Attributes: TypeAlias = Mapping[str, Attribute]

SHOWN_EXPERIMENTS: Final = 20
"""Experiments that an evaluation names; a span must not grow with how many there are."""


class SpanName(StrEnum):
    """What is done; a name never holds an id."""

    BLOCK = "ingest block"
    FLUSH = "flush"
    SNAPSHOT = "write snapshot"
    LOAD = "load partition"
    EVALUATE = "evaluate"
    SIGNAL = "write signal"
    WEIGHT_EPOCH = "write weight epoch"
    CONFIG = "write config"


class SpanDef(NamedTuple):
    """One kind of span.

    Attributes:
        attributes: that it can have.
        always: its trace is kept whatever share of traces is: it is rare, and what somebody looks for.
    """

    help: str
    attributes: tuple[str, ...]
    always: bool = False


_TOPIC = ("messaging.destination.name", "messaging.destination.partition.id")
_VERSION = ("streamxp.experiment", "streamxp.version")
SPANS: Final = {
    SpanName.BLOCK: SpanDef(
        "One fetched block is decoded, joined and counted.",
        (
            *_TOPIC,
            "messaging.batch.message_count",
            "streamxp.offset.first",
            "streamxp.offset.last",
            "streamxp.dead_letters",
        ),
    ),
    SpanName.FLUSH: SpanDef(
        "Statistics of all partitions are published, and snapshots that are due.",
        ("streamxp.partitions", "streamxp.statistics"),
    ),
    SpanName.SNAPSHOT: SpanDef(
        "The state of a partition is written to the state topic.",
        ("streamxp.partition", "streamxp.pages", "streamxp.bytes", "streamxp.units"),
    ),
    SpanName.LOAD: SpanDef(
        "A partition has come, and its newest snapshot is restored.",
        ("streamxp.partition", "streamxp.snapshot", "streamxp.units"),
        always=True,
    ),
    SpanName.EVALUATE: SpanDef(
        "Experiments of which something changed are tested, and what follows is written.",
        ("streamxp.experiments", "streamxp.experiment.names"),
    ),
    SpanName.SIGNAL: SpanDef(
        "A decision is written.",
        (*_VERSION, "streamxp.signal.id", "streamxp.action", "streamxp.proposed"),
        always=True,
    ),
    SpanName.WEIGHT_EPOCH: SpanDef(
        "A weight epoch that a signal asks for is written.",
        (*_VERSION, "streamxp.signal.id", "streamxp.weight_epoch"),
        always=True,
    ),
    SpanName.CONFIG: SpanDef(
        "What applications follow is written.",
        (*_VERSION, "streamxp.signal.id", "streamxp.config_version", "streamxp.status"),
        always=True,
    ),
}
"""Every span of a worker. None is of an event, and none names a unit."""


class Delivery(StrEnum):
    """What became of a span that was to be handed over."""

    DELIVERED = "delivered"
    FAILED = "failed"
    DROPPED = "dropped"


class Span:
    """A piece of work under way, as a context; this one is not recorded."""

    __slots__ = ()

    def note(self, attributes: Attributes) -> None:
        """Add what is only known later."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


NO_SPAN: Final = Span()
NO_ATTRIBUTES: Final[Attributes] = MappingProxyType({})


class Tracer:
    """Whoever records what a worker does as spans; this one records nothing.

    Nothing depends on what it does, and it never waits for anybody.
    """

    __slots__ = ()

    def span(self, name: SpanName, attributes: Attributes = NO_ATTRIBUTES) -> Span:  # noqa: ARG002 (a port)
        """Return a span of the work in the context, inside the span of the work around it."""
        return NO_SPAN

    def spans(self, name: SpanName, each: Sequence[Attributes]) -> Span:  # noqa: ARG002 (a port)
        """Return a context for work that is done for several together: one span for each, beside each other."""
        return NO_SPAN

    def stop(self) -> None:
        """Hand over what is left, within a second, and give up the rest."""
