"""The routes of the API, once: what Starlette is given, and what the OpenAPI document says, both come from here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from stream_xp.domain.decision import ConfigRecord, Result
from stream_xp.domain.gate import GateVerdict
from stream_xp.domain.operator import OperatorAction
from stream_xp.services.api import endpoints, gates, orders, wire
from stream_xp.services.api.endpoints import Handler
from stream_xp.services.api.guard import MAX_BODY_BYTES


class Parameter(NamedTuple):
    """A parameter of the query or a header."""

    name: str
    text: str
    schema: dict[str, Any]
    where: str = "query"


class Credential(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """An account as Kayenta lists it."""

    name: str
    type: str
    supported_types: tuple[str, ...]


class Route(NamedTuple):
    """One route.

    Attributes:
        name: of the operation, unique.
        body: type of the body in JSON; None where none is read.
        body_bytes: how long it may be.
        answer: type of the answer; None for a line of text.
        status: of an answer as asked for.
        refusals: other statuses that it may have, beside 400, 403, 421 and 431 of any route.
        writes: whether it is there only where a token is configured.
    """

    method: str
    path: str
    name: str
    text: str
    handler: Handler
    answer: Any
    body: Any = None
    status: int = 200
    parameters: Sequence[Parameter] = ()
    refusals: Sequence[int] = ()
    writes: bool = False
    unguarded: bool = False
    body_bytes: int = MAX_BODY_BYTES


_TEXT: Final = {"type": "string", "maxLength": 300}
_ARM = Parameter("arm", "A treatment arm; absent: all of them. `variant` says the same.", _TEXT)
_LIMIT = Parameter(
    "limit",
    "How many items at most.",
    {"type": "integer", "minimum": 1, "maximum": endpoints.MAX_PAGE, "default": endpoints.PAGE},
)
_AFTER = Parameter("after", "The last key of the page before.", _TEXT)
_KEY = Parameter(
    "Idempotency-Key",
    "Whoever repeats a request with its key orders once.",
    {"type": "string", "minLength": 1, "maxLength": 200},
    "header",
)
_ACCOUNTS = tuple(
    Parameter(name, "Echoed or ignored: there are no stores behind the facade.", _TEXT)
    for name in ("application", "metricsAccountName", "configurationAccountName", "storageAccountName")
)
_ONE = "/api/v1/experiments/{experiment}"
_BODY = (400, 408, 413, 415)

READS: Final[tuple[Route, ...]] = (
    Route("GET", "/healthz", "alive", "Whether the reader gets on.", endpoints.healthz, wire.Health,
          refusals=(503,), unguarded=True),
    Route("GET", "/readyz", "ready", "Whether the topics were read to their end lately.", endpoints.readyz,
          wire.Health, refusals=(503,), unguarded=True),
    Route("GET", "/api/v1/service", "service", "What the process has read, answered and refused.",
          endpoints.service, wire.ServiceState),
    Route("GET", "/api/v1/experiments", "experiments", "A page of experiments.", endpoints.experiments,
          wire.Experiments, parameters=(_LIMIT, _AFTER), refusals=(400,)),
    Route("GET", _ONE, "experiment", "One experiment.", endpoints.experiment, wire.ExperimentDetail,
          refusals=(404,)),
    Route("GET", _ONE + "/result", "result", "The newest result.", endpoints.result, Result, refusals=(404,)),
    Route("GET", _ONE + "/history", "history", "Looks that this process remembers, oldest first.",
          endpoints.history, wire.Looks, parameters=(_LIMIT,), refusals=(400, 404)),
    Route("GET", _ONE + "/signals", "signals", "The newest signals and orders, oldest first.",
          endpoints.signals, wire.Signals, parameters=(_LIMIT,), refusals=(400, 404)),
    Route("GET", _ONE + "/config", "config", "What applications follow.", endpoints.config, ConfigRecord,
          refusals=(404,)),
    Route("GET", _ONE + "/gate", "gate", "The verdict.", endpoints.gate, GateVerdict, parameters=(_ARM,)),
    Route("GET", _ONE + "/analysis", "analysis", "The verdict for the web metric of Argo Rollouts.",
          endpoints.analysis, gates.Analysis, parameters=(_ARM,)),
    Route("GET", "/spinnaker/{experiment}", "spinnakerPoll", "The verdict for Spinnaker's webhook stage.",
          endpoints.spinnaker, gates.SpinnakerAnswer, parameters=(_ARM,)),
    Route("POST", "/spinnaker/{experiment}", "spinnaker", "The same, as the stage first asks; no body is read.",
          endpoints.spinnaker, gates.SpinnakerAnswer, parameters=(_ARM,)),
    *(
        Route("POST", f"/flagger/{hook}", f"flagger-{hook}", f"Flagger's webhook of the type {hook}.",
              endpoints.flagger(hook), None, body=gates.FlaggerHook, refusals=(*_BODY, 403))
        for hook in gates.FLAGGER
    ),
    *(
        Route("POST", f"/flagger/{hook}", f"flagger-{hook}", f"Flagger's webhook of the type {hook}.",
              endpoints.flagger_event, None, body=gates.FlaggerHook, refusals=_BODY)
        for hook in ("event", "post-rollout")
    ),
    Route("GET", "/credentials", "credentials", "Kayenta: the accounts.", endpoints.credentials,
          tuple[Credential, ...]),
    Route("GET", "/canaryConfig", "canaryConfigs", "Kayenta: a config per experiment and treatment.",
          endpoints.canary_configs, tuple[gates.CanaryConfig, ...], parameters=_ACCOUNTS),
    Route("POST", "/canary/{canary_config}", "canaryBegin", "Kayenta: begin a canary execution.",
          endpoints.canary_begin, gates.CanaryCreated, body=gates.CanaryRequest,
          parameters=(*_ACCOUNTS, Parameter("parentPipelineExecutionId", "Ignored.", _TEXT)),
          refusals=(*_BODY, 404)),
    Route("GET", "/canary/{execution}", "canary", "Kayenta: a canary execution.", endpoints.canary,
          gates.CanaryExecution, parameters=_ACCOUNTS, refusals=(404,)),
    Route("PUT", "/pipelines/{execution}/cancel", "canaryCancel", "Kayenta: cancel; nothing runs.",
          endpoints.canary_cancel, dict[str, str], refusals=(404,)),
)  # fmt: skip

WRITES: Final[tuple[Route, ...]] = (
    *(
        Route("POST", f"{_ONE}/orders/{action.value.replace('_', '-')}", f"order-{action.value}",
              f"Order: {action.value.replace('_', ' ')}.", endpoints.order(action), orders.OrderPlaced,
              body=orders.OrderRequest, status=202, parameters=(_KEY,),
              refusals=(*_BODY, 401, 404, 409, 429, 503), writes=True)
        for action in OperatorAction
    ),
    Route("POST", "/api/v1/alertmanager", "alertmanager", "Alerts that act as guardrails.",
          endpoints.alertmanager, orders.AlertsTaken, body=orders.AlertGroup,
          body_bytes=orders.MAX_ALERTS_BYTES,
          refusals=(*_BODY, 401, 409, 429, 503), writes=True),
)  # fmt: skip
