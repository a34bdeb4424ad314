"""What the routes of the API do; `routes.py` says where they are."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from urllib.parse import quote

import msgspec
from starlette.responses import Response

from stream_xp import __version__
from stream_xp.domain.decision import RolloutStatus
from stream_xp.domain.gate import Cause, GateVerdict, Verdict
from stream_xp.domain.operator import OperatorAction
from stream_xp.services.api import gates
from stream_xp.services.api.guard import Refusals, Refused, Tokens
from stream_xp.services.api.wire import (
    ExperimentDetail,
    Experiments,
    Health,
    Looks,
    ServiceState,
    Signals,
    Summary,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from stream_xp.domain.experiment import ExperimentRecord
    from stream_xp.engine.gate import Known
    from stream_xp.services.api.orders import AlertGroup, OrderRequest, Orders
    from stream_xp.services.api.view import View
    from stream_xp.settings import Settings

MAX_PAGE: Final = 500
PAGE: Final = 100
STUCK_MS: Final = 60_000
"""Without progress for so long a process does not live any more."""
ROLLOUTS_KEPT: Final = 10_000
ACCOUNTS: Final = ("METRICS_STORE", "CONFIGURATION_STORE", "OBJECT_STORE")


class Progress(NamedTuple):
    """How far the reader is; wall clock in epoch milliseconds."""

    read_ms: int | None
    progress_ms: int
    records: int
    failed: bool


class Rollouts:
    """When each rollout was first heard of, the oldest forgotten first.

    Rollouts of experiments that do not exist are held apart: whoever makes them up must not push out those that do.
    """

    def __init__(self) -> None:
        self._first_ms: dict[bool, dict[bytes, int]] = {True: {}, False: {}}

    def waiting_ms(self, rollout: tuple[str, ...], now_ms: int, *, exists: bool = True) -> int:
        """For how long a rollout has been heard of.

        Args:
            rollout: experiment, name, namespace and checksum.
            now_ms: wall clock, epoch milliseconds.
            exists: whether there is such an experiment.
        """
        held = self._first_ms[exists]
        # A hash, of one length however long the names are.
        mark = hashlib.blake2b(msgspec.json.encode(rollout), digest_size=16).digest()
        found = held.setdefault(mark, now_ms)
        if len(held) > ROLLOUTS_KEPT:
            del held[next(iter(held))]
        return max(0, now_ms - found)

    def __len__(self) -> int:
        return sum(map(len, self._first_ms.values()))


@dataclass(slots=True)
class Api:
    """What the routes answer from."""

    settings: Settings
    view: View
    tokens: Tokens
    orders: Orders
    progress: Callable[[], Progress]
    refusals: Refusals = field(default_factory=Refusals)
    rollouts: Rollouts = field(default_factory=Rollouts)
    answered: Counter[str] = field(default_factory=Counter)
    gated: Counter[str] = field(default_factory=lambda: Counter({verdict.value: 0 for verdict in Verdict}))

    def verdict(self, experiment: str, arm: str | None) -> GateVerdict:
        """The verdict, counted."""
        told = self.view.verdict(experiment, arm)
        self.gated[told.verdict] += 1
        return told


Handler = Callable[[Api, "Request", Any], Awaitable[Response]]


def reply(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer in JSON; what is no finite number becomes null, never a bare word."""
    body = msgspec.json.encode(value)
    return Response(body, status, headers=headers, media_type="application/json")


def text(line: str, status: int) -> Response:
    """An answer of one line."""
    return Response(line + "\n", status, media_type="text/plain")


# --- the process -------------------------------------------------------------------------------------------------


def _health(api: Api, reason: str | None, progress: Progress) -> Response:
    now_ms = api.view.moment().now_ms
    body = Health(
        status="ok" if reason is None else "failing",
        reason=reason or "",
        progress_age_ms=max(0, now_ms - progress.progress_ms),
        read_age_ms=None if progress.read_ms is None else max(0, now_ms - progress.read_ms),
    )
    return reply(body, 200 if reason is None else 503)


async def healthz(api: Api, _: Request, __: None) -> Response:
    """Alive: the reader gets on."""
    progress = api.progress()
    reason = None
    if progress.failed:
        reason = "the reader has ended"
    elif api.view.moment().now_ms - progress.progress_ms > STUCK_MS:
        reason = f"the reader has not got on for more than {STUCK_MS // 1000} s"
    return _health(api, reason, progress)


async def readyz(api: Api, _: Request, __: None) -> Response:
    """Ready: the topics were read to their end, and not long ago."""
    progress, moment = api.progress(), api.view.moment()
    reason = None
    if progress.failed:
        reason = "the reader has ended"
    elif progress.read_ms is None:
        reason = "the topics are not read to their end yet"
    elif moment.now_ms - progress.read_ms > api.view.limits.silence_ms:
        reason = "the topics were not read to their end lately"
    return _health(api, reason, progress)


async def service(api: Api, _: Request, __: None) -> Response:
    """What the process has read, answered and refused."""
    progress, moment = api.progress(), api.view.moment()
    return reply(
        ServiceState(
            code_version=__version__,
            started_ms=moment.started_ms,
            read_age_ms=None if progress.read_ms is None else max(0, moment.now_ms - progress.read_ms),
            experiments=len(api.view.names()),
            records=progress.records,
            passed_over=api.view.passed_over,
            refused=dict(api.refusals.counts),
            answered=dict(api.answered),
            gates=dict(api.gated),
            writes=bool(api.tokens),
        )
    )


# --- experiments -------------------------------------------------------------------------------------------------


async def experiments(api: Api, request: Request, _: None) -> Response:
    """A page of experiments."""
    limit, after = _limit(request), request.query_params.get("after", "")
    names = [name for name in api.view.names() if name > after]
    items = tuple(_summary(api, name) for name in names[:limit])
    return reply(Experiments(items=items, next=names[limit - 1] if len(names) > limit else None))


def _limit(request: Request) -> int:
    given = request.query_params.get("limit")
    if given is None:
        return PAGE
    limit = int(given) if given.isascii() and given.isdigit() and len(given) <= 10 else 0
    if not 1 <= limit <= MAX_PAGE:
        raise Refused(400, "bad_request", f"limit must be a whole number from 1 to {MAX_PAGE}")
    return limit


def _summary(api: Api, name: str) -> Summary:
    told, known = api.view.verdict(name), api.view.known(name)
    record = _record(known)
    config, result = known.config, known.result
    of_version = config is not None and config.version == record.spec.version
    return Summary(
        experiment=name,
        version=record.spec.version,
        owner=record.spec.owner,
        status=record.status,
        rollout=config.status if config is not None and of_version else RolloutStatus.RUNNING,
        verdict=told.verdict,
        cause=told.cause,
        reason=told.reason,
        decision_id=told.decision_id,
        data_age_ms=told.data_age_ms,
        look=told.look,
        evaluated_ms=result.evaluated_ms if result is not None and told.look else None,
    )


def _record(known: Known) -> ExperimentRecord:
    if known.record is None:
        raise Refused(404, "not_found", "there is no such experiment")
    return known.record


def _known(api: Api, request: Request) -> Known:
    """What is known of the experiment that a path names."""
    known = api.view.known(_key(request))
    _record(known)
    return known


def _key(request: Request) -> str:
    key: str = request.path_params["experiment"]
    return key


async def experiment(api: Api, request: Request, _: None) -> Response:
    """One experiment."""
    known = _known(api, request)
    now = known.standing
    return reply(
        ExperimentDetail(
            record=_record(known),
            config=known.config,
            gate=api.view.verdict(_key(request)),
            latched=None if now.latched is None else now.latched.signal_id,
            proposed=None if now.proposed is None else now.proposed.signal_id,
            paused_by=None if now.paused is None else now.paused.actor,
        )
    )


async def result(api: Api, request: Request, _: None) -> Response:
    """The newest result."""
    known = _known(api, request)
    if known.result is None:
        raise Refused(404, "not_found", "there is no result yet")
    return reply(known.result)


async def config(api: Api, request: Request, _: None) -> Response:
    """What applications follow."""
    known = _known(api, request)
    if known.config is None:
        raise Refused(404, "not_found", "there is no config yet")
    return reply(known.config)


async def history(api: Api, request: Request, _: None) -> Response:
    """Looks that this process remembers."""
    _known(api, request)
    limit, key = _limit(request), _key(request)
    return reply(Looks(experiment=key, items=api.view.history(key)[-limit:]))


async def signals(api: Api, request: Request, _: None) -> Response:
    """The newest signals and orders."""
    _known(api, request)
    limit, key = _limit(request), _key(request)
    return reply(Signals(experiment=key, items=tuple(api.view.signals(key)[-limit:])))


# --- gates -------------------------------------------------------------------------------------------------------


def _arm(request: Request) -> str | None:
    """The arm that is asked for; absent or empty: all treatments."""
    return request.query_params.get("arm") or request.query_params.get("variant") or None


async def gate(api: Api, request: Request, _: None) -> Response:
    """The verdict as it is."""
    return reply(api.verdict(_key(request), _arm(request)))


async def analysis(api: Api, request: Request, _: None) -> Response:
    """The verdict for Argo's web metric; 200 whatever it is."""
    return reply(gates.analysis(api.verdict(_key(request), _arm(request))))


async def spinnaker(api: Api, request: Request, _: None) -> Response:
    """The verdict for Spinnaker's webhook stage; asked with POST first, then with GET."""
    key, arm = _key(request), _arm(request)
    told = api.verdict(key, arm)
    # Put together anew: a header takes no letter that an address has not.
    host = quote(request.headers.get("host", ""), safe=":[]")
    query = "" if arm is None else f"?arm={quote(arm, safe='')}"
    url = f"{request.url.scheme}://{host}/spinnaker/{quote(key, safe='')}{query}"
    return reply(gates.spinnaker(told, url), headers={"location": url})


def flagger(hook: str) -> Handler:
    """The route of a webhook type of Flagger."""

    async def answer(api: Api, _: Request, body: gates.FlaggerHook) -> Response:
        key = body.metadata.get("experiment", "")
        if not key:
            raise Refused(400, "bad_request", "metadata.experiment must name an experiment")
        told = api.verdict(key, body.metadata.get("arm") or body.metadata.get("variant") or None)
        rollout = (key, body.name, body.namespace, body.checksum)
        waiting = gates.Waiting(
            api.rollouts.waiting_ms(rollout, api.view.moment().now_ms, exists=told.version > 0),
            api.settings.gate_no_data_deadline_ms,
        )
        return text(gates.line(told), gates.flagger_status(hook, told, waiting))

    return answer


async def flagger_event(api: Api, _: Request, body: gates.FlaggerHook) -> Response:
    """An event, or the end of a rollout: heard and counted."""
    api.gated["event"] += 1
    return text(f"heard: {body.phase}"[:100] if body.phase.isascii() else "heard", gates.OPEN)


# --- Kayenta -----------------------------------------------------------------------------------------------------


async def credentials(_: Api, __: Request, ___: None) -> Response:
    """One account, that can do everything: there are no stores behind the facade."""
    account = {"name": "stream-xp", "type": "stream-xp", "supportedTypes": ACCOUNTS}
    return reply([account])


async def canary_configs(api: Api, request: Request, _: None) -> Response:
    """A config for each experiment, and for each of its treatments."""
    application = request.query_params.get("application", "")
    configs = [
        _canary_config(identity, application, record.epochs[-1].effective_ms)
        for name in api.view.names()
        for record in [api.view.known(name).record]
        if record is not None
        for identity in (name, *(f"{name}@{arm.key}" for arm in record.spec.treatments))
    ]
    return reply(configs)


def _canary_config(identity: str, application: str, changed_ms: int) -> gates.CanaryConfig:
    updated_ms = max(0, min(changed_ms, gates.LAST_MS))
    return gates.CanaryConfig(
        id=identity,
        name=identity,
        applications=(application,) if application else (),
        updated_timestamp=updated_ms,
        updated_timestamp_iso=gates.iso(updated_ms),
    )


async def canary_begin(api: Api, request: Request, body: gates.CanaryRequest) -> Response:
    """Begin a canary execution: its id holds all that was asked for."""
    name, _, arm = request.path_params["canary_config"].partition("@")
    if body.thresholds.marginal > body.thresholds.passing:
        raise Refused(400, "bad_request", "thresholds.marginal must be at most thresholds.pass")
    told = api.view.verdict(name, arm or None)
    if told.cause in _NO_CONFIG:
        raise Refused(404, "not_found", f"there is no canary config of that id: {gates.line(told)}")
    now_ms = api.view.moment().now_ms
    execution = gates.Execution(
        experiment=name,
        arm=arm or None,
        application=request.query_params.get("application", "")[:300],
        thresholds=body.thresholds,
        start_ms=now_ms,
        end_ms=_end_ms(body, now_ms),
    )
    return reply(gates.CanaryCreated(canary_execution_id=execution.to_id()))


_NO_CONFIG: Final = (Cause.UNKNOWN_EXPERIMENT, Cause.UNKNOWN_ARM, Cause.STARTING)


def _end_ms(body: gates.CanaryRequest, now_ms: int) -> int:
    """When the execution is over at the latest: at the last end of its scopes; at once where none is named."""
    ends = [now_ms]
    for scopes in body.scopes.values():
        for scope in (scopes.control_scope, scopes.experiment_scope):
            if scope is not None and scope.end:
                try:
                    ends.append(gates.time_ms(scope.end))
                except (ValueError, OverflowError):
                    rule = "the end of a scope must be a time of RFC 3339 with its zone"
                    raise Refused(400, "bad_request", rule) from None
    return min(max(ends), gates.LAST_MS)


async def canary(api: Api, request: Request, _: None) -> Response:
    """A canary execution: running, or complete with its score."""
    identity = request.path_params["execution"]
    execution = gates.Execution.of_id(identity)
    if execution is None:
        raise Refused(404, "not_found", "there is no canary execution of that id")
    told = api.verdict(execution.experiment, execution.arm)
    now_ms = api.view.moment().now_ms
    found = gates.kayenta(told, execution, identity=identity, now_ms=now_ms)
    account = request.query_params.get("storageAccountName")
    if account:
        found = msgspec.structs.replace(found, storage_account_name=account)
    return reply(found)


async def canary_cancel(_: Api, request: Request, __: None) -> Response:
    """Cancel an execution: nothing runs that could be, the verdict is there whether asked for or not."""
    if gates.Execution.of_id(request.path_params["execution"]) is None:
        raise Refused(404, "not_found", "there is no canary execution of that id")
    return reply({})


# --- what writes ---------------------------------------------------------------------------------------------------


def order(action: OperatorAction) -> Handler:
    """The route of an order."""

    async def answer(api: Api, request: Request, body: OrderRequest) -> Response:
        bearer = api.tokens.bearer(request)
        key = request.headers.get("idempotency-key")
        if key is not None and not 1 <= len(key) <= 200:
            raise Refused(400, "bad_request", "the header Idempotency-Key must have 1 to 200 characters")
        placed = await api.orders.order(_key(request), action, body, bearer=bearer, key=key)
        return reply(placed, 202)

    return answer


async def alertmanager(api: Api, request: Request, body: AlertGroup) -> Response:
    """Alerts that act as guardrails."""
    return reply(await api.orders.alerts(body, bearer=api.tokens.bearer(request)))
