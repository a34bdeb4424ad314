"""The file of targets: who is told what, where, and with which proof."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec

from stream_xp.adapters.webhook import Endpoint, Sender, endpoint, signing_keys
from stream_xp.domain.decision import Action
from stream_xp.domain.fields import Key
from stream_xp.domain.operator import OrderSignal
from stream_xp.errors import ConfigError
from stream_xp.services.signal_records import SignalRecord, experiment_of
from stream_xp.services.spec_file import (
    MAX_FILE_BYTES,
    FieldPath,
    Fields,
    SpecFault,
    SpecFaults,
    read_fields,
)
from stream_xp.settings import Secret, Settings, read_secret, variable_of

MAX_TARGETS: Final = 20


class Event(StrEnum):
    """What a target can be told of: decisions by what they say, those that wait for a person, and all orders."""

    STOP = "stop"
    SHIP = "ship"
    HOLD = "hold"
    ADVANCE = "advance"
    ALLOCATE = "allocate"
    PROPOSED = "proposed"
    ORDERS = "orders"


class Format(StrEnum):
    """What is sent: the CloudEvent of the signal without its bulky evidence, or a line of text for a chat."""

    CLOUDEVENT = "cloudevent"
    SLACK = "slack"


class TargetFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One target as its file has it.

    Attributes:
        name: part of its consumer group.
        url, url_file, url_env: its address: written out, in a file, or in an environment variable.
        secret_file, secret_env: where the keys are that sign, one a line.
        events: what it is told of.
        experiments: glob of those it is told of.
        allow_http: its host may be spoken to without TLS.
        allow_private: its address may be private, or this machine.
        ca_file: PEM file with the authorities to believe instead of the system's.
    """

    name: Key
    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)] | None = None
    url_file: str | None = None
    url_env: str | None = None
    secret_file: str | None = None
    secret_env: str | None = None
    events: Annotated[tuple[Event, ...], msgspec.Meta(min_length=1)] = (
        Event.STOP,
        Event.SHIP,
        Event.PROPOSED,
    )
    experiments: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] = "*"
    format: Format = Format.CLOUDEVENT
    allow_http: bool = False
    allow_private: bool = False
    ca_file: str | None = None


class TargetsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `--targets` names."""

    targets: Annotated[tuple[TargetFields, ...], msgspec.Meta(min_length=1, max_length=MAX_TARGETS)]


class Target(NamedTuple):
    """A target, ready to be sent to; keys and path do not show themselves."""

    name: str
    where: Endpoint
    keys: Keys
    events: frozenset[Event]
    experiments: str
    format: Format
    allow_private: bool
    ca_file: str | None

    def wants(self, record: SignalRecord) -> bool:
        """Whether it is told of a record."""
        return event_of(record) in self.events and fnmatch.fnmatchcase(
            experiment_of(record), self.experiments
        )

    def sender(self) -> Sender:
        """What posts to it."""
        return Sender(self.where, allow_private=self.allow_private, ca_file=self.ca_file)


class Keys(tuple[bytes, ...]):
    """Keys that do not show themselves."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Keys({len(self)})"


def event_of(record: SignalRecord) -> Event:
    """What a record is, to a target."""
    if isinstance(record, OrderSignal):
        return Event.ORDERS
    return Event.PROPOSED if record.data.proposed else Event(record.data.decision.action)


_NAMED_ACTIONS: Final = {Event(action) for action in Action}
"""Fails where a decision gets a name that no target could ask for."""


def load_targets(path: Path, settings: Settings, environ: Mapping[str, str]) -> tuple[Target, ...]:
    """The targets in a YAML file, with their secrets.

    Args:
        path: of the file; files that it names stand where it says, from its own folder.
        settings: the hosts that are allowed.
        environ: the environment.

    Raises:
        SpecFaults: line, field and rule of each fault; none shows a secret or an address.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SpecFaults(str(path), [SpecFault(1, 1, "", f"cannot be read: {error.strerror}")]) from error
    fields = read_fields(raw, str(path), TargetsFile)
    reader = _Reader(path.parent, settings, environ)
    found = [reader.target(one, ("targets", number)) for number, one in enumerate(fields.value.targets)]
    faults = [*reader.faults, *_twice(fields)]
    if faults:
        raise SpecFaults(str(path), [fields.fault(*fault) for fault in faults])
    return tuple(one for one in found if one is not None)


def _twice(fields: Fields) -> Iterator[tuple[FieldPath, str]]:
    # Groups of one name would share what each of them should be told.
    counts = Counter(one.name for one in fields.value.targets)
    for number, one in enumerate(fields.value.targets):
        if counts[one.name] > 1:
            yield ("targets", number, "name"), "is the name of another target too"


class _Reader:
    """Turns fields into targets and notes what is wrong with them."""

    def __init__(self, folder: Path, settings: Settings, environ: Mapping[str, str]) -> None:
        self._folder = folder
        self._allowed = frozenset(_plain_host(name) for name in settings.notify_allowed_hosts)
        self._environ = environ
        self.faults: list[tuple[FieldPath, str]] = []

    def target(self, one: TargetFields, path: FieldPath) -> Target | None:
        """A target; None, with its faults noted, where there is none."""
        before = len(self.faults)
        where = self._where(one, path)
        keys = self._keys(one, path)
        ca_file = None if one.ca_file is None else str(self._folder / one.ca_file)
        if where is None or len(self.faults) > before:
            return None
        found = Target(
            one.name,
            where,
            Keys(keys),
            frozenset(one.events),
            one.experiments,
            one.format,
            one.allow_private,
            ca_file,
        )
        try:
            found.sender()
        except ConfigError as error:
            self._note((*path, "ca_file"), str(error))
        return found

    def _note(self, path: FieldPath, message: str) -> None:
        self.faults.append((path, message))

    def _where(self, one: TargetFields, path: FieldPath) -> Endpoint | None:
        given = [name for name in ("url", "url_file", "url_env") if getattr(one, name) is not None]
        if len(given) != 1:
            self._note(path, "must have one of url, url_file and url_env")
            return None
        at = (*path, given[0])
        text = one.url if one.url is not None else self._hidden(one.url_file, one.url_env, at)
        if text is None:
            return None
        try:
            where = endpoint(text)
        except ConfigError as error:
            self._note(at, str(error))
            return None
        self._check_host(one, where, at)
        return where

    def _check_host(self, one: TargetFields, where: Endpoint, at: FieldPath) -> None:
        if where.host not in self._allowed:
            self._note(
                at, f"has the host {where.host}, which {variable_of('notify_allowed_hosts')} does not name"
            )
        if not where.tls and not one.allow_http:
            self._note(at, "must start with https:// where allow_http is not true")

    def _keys(self, one: TargetFields, path: FieldPath) -> tuple[bytes, ...]:
        given = [name for name in ("secret_file", "secret_env") if getattr(one, name) is not None]
        if not given and one.format is Format.SLACK:
            return ()  # What chats give out is an address that is the secret.
        if len(given) != 1:
            self._note(path, "must have one of secret_file and secret_env; only slack may have none")
            return ()
        at = (*path, given[0])
        text = self._hidden(one.secret_file, one.secret_env, at)
        if text is None:
            return ()
        try:
            return signing_keys(Secret(text))
        except ConfigError as error:
            self._note(at, str(error))
            return ()

    def _hidden(self, file: str | None, variable: str | None, at: FieldPath) -> str | None:
        """What a file or a variable holds. Who writes the secret itself there must not find it in a message."""
        try:
            if file is not None:
                return read_secret(str(at[-1]), self._folder / file).reveal()
        except ConfigError:
            self._note(at, "names no file that can be read and holds 1 to 65536 bytes of text")
            return None
        if variable is None or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,99}", variable) is None:
            self._note(at, "must be the name of an environment variable")
            return None
        if not self._environ.get(variable):
            self._note(at, "names an environment variable that is not set")
            return None
        return self._environ[variable].strip()


def _plain_host(name: str) -> str:
    return name.lower().strip("[]")
