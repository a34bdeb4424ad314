"""The verdict in the words of those who ask: Flagger, Argo Rollouts, Kayenta's clients, Spinnaker, a shell.

Each is a function of the verdict, with what the asking system needs beside it; none looks anything up.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Final, Literal, NamedTuple

import msgspec

from stream_xp.domain.decision import MetricState
from stream_xp.domain.experiment import Role
from stream_xp.domain.fields import Key
from stream_xp.domain.gate import Cause, GateMetric, GateVerdict, Verdict

EXIT_CODES: Final = {Verdict.PASS: 0, Verdict.STOP: 1, Verdict.CONTINUE: 2, Verdict.INVALID: 3}
"""Of `stream-xp gate`."""
LINE_LENGTH: Final = 240
LAST_MS: Final = 253_402_300_799_000
"""The last second that has a year of four digits."""


def line(told: GateVerdict) -> str:
    """The verdict in one line of plain text."""
    text = f"{told.verdict}: {told.reason}"
    # Names and reasons must not be able to steer a terminal or a log.
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return plain if len(plain) <= LINE_LENGTH else plain[: LINE_LENGTH - 1] + "…"


# --- Flagger -----------------------------------------------------------------------------------------------------


class FlaggerHook(msgspec.Struct, frozen=True, kw_only=True):
    """What Flagger sends to a webhook.

    Attributes:
        checksum: of all that the canary is made of; with name and namespace the identity of a rollout.
        metadata: `experiment` names it, `arm` one of its treatments; absent: all of them.
    """

    name: Annotated[str, msgspec.Meta(max_length=300)] = ""
    namespace: Annotated[str, msgspec.Meta(max_length=300)] = ""
    phase: Annotated[str, msgspec.Meta(max_length=100)] = ""
    checksum: Annotated[str, msgspec.Meta(max_length=300)] = ""
    metadata: dict[str, str] = {}


class Waiting(NamedTuple):
    """For how long a rollout may have had no valid data.

    Attributes:
        rollout_ms: since this rollout was first heard of.
        deadline_ms: from when on it fails.
    """

    rollout_ms: int
    deadline_ms: int


OPEN: Final = 200
"""Flagger takes 203, 204 and 206 for failures, and follows redirects."""
CLOSED: Final = 403
"""It retries 429 and 5xx and throws their text away, so that a gate that is closed says 4xx."""
_NOT_BEGUN: Final = (Cause.NO_DATA, Cause.STALE_DATA)


def _may_begin(told: GateVerdict, _: Waiting) -> bool:
    """Before a rollout there are no data of it: only what is known to be wrong keeps it closed."""
    if told.verdict is Verdict.INVALID:
        return told.cause in _NOT_BEGUN
    return told.verdict in (Verdict.PASS, Verdict.CONTINUE)


def _goes_on(told: GateVerdict, waiting: Waiting) -> bool:
    """A stop fails the check, so that a rollback call that was lost still ends in a rollback."""
    if told.verdict is Verdict.INVALID:
        return min(told.invalid_ms, waiting.rollout_ms) <= waiting.deadline_ms
    return told.verdict in (Verdict.PASS, Verdict.CONTINUE)


def _is_passed(told: GateVerdict, _: Waiting) -> bool:
    return told.verdict is Verdict.PASS


def _is_stopped(told: GateVerdict, _: Waiting) -> bool:
    return told.verdict is Verdict.STOP


FLAGGER: Final[dict[str, Callable[[GateVerdict, Waiting], bool]]] = {
    "confirm-rollout": _may_begin,
    "pre-rollout": _may_begin,
    "rollout": _goes_on,
    "confirm-traffic-increase": _is_passed,
    "confirm-promotion": _is_passed,
    # The inverse of all others: 200 means to roll back now.
    "rollback": _is_stopped,
}
"""Webhook type to whether it is open."""


def flagger_status(hook: str, told: GateVerdict, waiting: Waiting) -> int:
    """Exactly 200, or 403."""
    return OPEN if FLAGGER[hook](told, waiting) else CLOSED


# --- Argo Rollouts: the web metric -----------------------------------------------------------------------------


class AnalysisData(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict for the conditions of an AnalysisTemplate: nothing here is null, and every number is finite.

    Attributes:
        ok, breached, inconclusive: exactly one of them is true; pass, stop, and all else.
        score: 0 to 100, as the Kayenta facade gives it for the thresholds 95 and 75.
        n_control, n_treatment: units exposed to the control, and to the asked arm that has least.
        data_age_seconds: wall clock minus watermark; without data, since when there could have been some.
    """

    experiment: str
    version: int
    arms: tuple[str, ...]
    verdict: Verdict
    cause: Cause
    reason: str
    ok: bool
    breached: bool
    inconclusive: bool
    score: int
    n_control: int
    n_treatment: int
    data_age_seconds: float
    decision_id: str
    metrics: tuple[GateMetric, ...]


class Analysis(msgspec.Struct, frozen=True, kw_only=True):
    """What the web metric of Argo Rollouts reads, with the path `{$.data}`."""

    data: AnalysisData


def analysis(told: GateVerdict) -> Analysis:
    """The verdict for Argo's web metric, which takes every answer but 2xx for an error."""
    ok, breached = told.verdict is Verdict.PASS, told.verdict is Verdict.STOP
    return Analysis(
        data=AnalysisData(
            experiment=told.experiment,
            version=told.version,
            arms=told.arms,
            verdict=told.verdict,
            cause=told.cause,
            reason=told.reason,
            ok=ok,
            breached=breached,
            inconclusive=not (ok or breached),
            score=score(told.verdict, Thresholds()),
            n_control=told.control_units,
            n_treatment=told.arm_units,
            data_age_seconds=told.data_age_ms / 1000,
            decision_id=told.decision_id,
            metrics=told.metrics,
        )
    )


# --- Spinnaker: the webhook stage ------------------------------------------------------------------------------


class SpinnakerStatus(StrEnum):
    """Spinnaker takes any other word for RUNNING, until its stage times out."""

    SUCCEEDED = "SUCCEEDED"
    RUNNING = "RUNNING"
    TERMINAL = "TERMINAL"


class SpinnakerAnswer(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What a webhook stage polls: `$.status` and `$.progress`."""

    status: SpinnakerStatus
    progress: str
    status_url: str


_SPINNAKER: Final = {Verdict.PASS: SpinnakerStatus.SUCCEEDED, Verdict.STOP: SpinnakerStatus.TERMINAL}


def spinnaker(told: GateVerdict, status_url: str) -> SpinnakerAnswer:
    """The verdict for a webhook stage, which waits while it is neither pass nor stop."""
    status = _SPINNAKER.get(told.verdict, SpinnakerStatus.RUNNING)
    return SpinnakerAnswer(status=status, progress=line(told), status_url=status_url)


# --- Kayenta -----------------------------------------------------------------------------------------------------


class Thresholds(msgspec.Struct, frozen=True, kw_only=True):
    """Scores from which Kayenta's clients call a canary good, and not bad yet.

    A marginal of 0 is refused: a stop, which scores 0, would not fail.
    """

    passing: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = msgspec.field(default=95.0, name="pass")
    marginal: Annotated[float, msgspec.Meta(gt=0.0, le=100.0)] = 75.0


class CanaryScope(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a scope; the service knows its arms itself and takes only the end."""

    scope: str | None = None
    location: str | None = None
    start: str | None = None
    end: str | None = None
    step: float | None = None


class CanaryScopes(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """Control and experiment of one scope."""

    control_scope: CanaryScope | None = None
    experiment_scope: CanaryScope | None = None


class CanaryRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body with which a canary execution is asked for."""

    scopes: Annotated[dict[str, CanaryScopes], msgspec.Meta(max_length=50)] = {}
    thresholds: Thresholds = Thresholds()


class CanaryConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A canary config: an experiment, or `experiment@arm` for one of its treatments."""

    id: str
    name: str
    applications: tuple[str, ...]
    updated_timestamp: int
    updated_timestamp_iso: str


class CanaryCreated(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The id of an execution: it holds the request itself, so that any replica can answer for it."""

    canary_execution_id: str


class Execution(msgspec.Struct, frozen=True, kw_only=True):
    """What a canary execution was asked for.

    Attributes:
        end_ms: until when it may still be running; it ends earlier with a pass or stop.
    """

    experiment: Key
    arm: Key | None
    application: Annotated[str, msgspec.Meta(max_length=300)]
    thresholds: Thresholds
    start_ms: Annotated[int, msgspec.Meta(ge=0, le=LAST_MS)]
    end_ms: Annotated[int, msgspec.Meta(ge=0, le=LAST_MS)]

    def to_id(self) -> str:
        """The execution as an id."""
        return base64.urlsafe_b64encode(msgspec.json.encode(self)).rstrip(b"=").decode()

    @classmethod
    def of_id(cls, identity: str) -> Execution | None:
        """The execution of an id; None if it is none of ours."""
        try:
            body = base64.urlsafe_b64decode(identity + "=" * (-len(identity) % 4))
            return msgspec.json.decode(body, type=cls)
        except (ValueError, binascii.Error, msgspec.MsgspecError, RecursionError):
            return None


class SampleStats(msgspec.Struct, frozen=True, kw_only=True):
    """How many units an arm has."""

    count: int


class SideMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """One side of a judged metric."""

    stats: SampleStats


class JudgedMetric(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One metric in one arm, as Kayenta's judge lists it."""

    name: str
    id: str
    tags: dict[str, str]
    groups: tuple[str, ...]
    classification: Literal["High", "Low", "Pass", "Nodata"]
    classification_reason: str
    critical: bool
    muted: bool
    experiment_metadata: SideMetadata
    control_metadata: SideMetadata
    result_metadata: dict[str, float]


class JudgeScore(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The score, and what it means under the thresholds of the request."""

    score: int
    classification: Literal["Pass", "Marginal", "Fail"]
    classification_reason: str


class GroupScore(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The score of a group of metrics; there is one group."""

    name: str
    score: int
    classification: str
    classification_reason: str


class JudgeResult(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What Kayenta's judge says."""

    judge_name: str
    results: tuple[JudgedMetric, ...]
    group_scores: tuple[GroupScore, ...]
    score: JudgeScore


class CanaryResult(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """The result of a complete execution; its duration is one of ISO 8601."""

    judge_result: JudgeResult
    canary_duration: str


class CanaryExecution(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A canary execution, as Argo Rollouts and Orca read it.

    Attributes:
        result: absent while it is running.
    """

    complete: bool
    status: Literal["running", "succeeded"]
    application: str
    canary_execution_id: str
    build_time_iso: str
    start_time_iso: str
    end_time_iso: str | msgspec.UnsetType = msgspec.UNSET
    end_time_millis: int | msgspec.UnsetType = msgspec.UNSET
    storage_account_name: str | msgspec.UnsetType = msgspec.UNSET
    result: CanaryResult | msgspec.UnsetType = msgspec.UNSET


def score(verdict: Verdict, thresholds: Thresholds) -> int:
    """100 for a pass, 0 for a stop, and for all else what is inconclusive under the thresholds.

    Argo takes a score at the marginal threshold for inconclusive, Orca for a failure; so it lies above, where a whole
    number does, and in any case below the pass.
    """
    if verdict is Verdict.PASS:
        return 100
    if verdict is Verdict.STOP:
        return 0
    between = math.floor((thresholds.passing + thresholds.marginal) / 2)
    return max(0, min(between, math.ceil(thresholds.passing) - 1))


def kayenta(told: GateVerdict, execution: Execution, *, identity: str, now_ms: int) -> CanaryExecution:
    """The verdict as a canary execution: complete with a pass or a stop, and when its time is over."""
    final = told.verdict in (Verdict.PASS, Verdict.STOP)
    complete = final or now_ms >= execution.end_ms
    began = iso(execution.start_ms)
    if not complete:
        return CanaryExecution(
            complete=False,
            status="running",
            application=execution.application,
            canary_execution_id=identity,
            build_time_iso=began,
            start_time_iso=began,
        )
    return CanaryExecution(
        complete=True,
        status="succeeded",
        application=execution.application,
        canary_execution_id=identity,
        build_time_iso=began,
        start_time_iso=began,
        end_time_iso=iso(now_ms),
        end_time_millis=now_ms,
        result=CanaryResult(
            judge_result=_judge(told, execution.thresholds),
            canary_duration=f"PT{max(0, now_ms - execution.start_ms) // 1000}S",
        ),
    )


def _judge(told: GateVerdict, thresholds: Thresholds) -> JudgeResult:
    found = score(told.verdict, thresholds)
    words: Literal["Pass", "Marginal", "Fail"] = "Marginal"
    if told.verdict in (Verdict.PASS, Verdict.STOP):
        words = "Pass" if told.verdict is Verdict.PASS else "Fail"
    reason = line(told)
    group = GroupScore(name="stream_xp", score=found, classification=words, classification_reason=reason)
    return JudgeResult(
        judge_name="stream_xp-v1",
        results=tuple(_judged(metric) for metric in told.metrics),
        group_scores=(group,),
        score=JudgeScore(score=found, classification=words, classification_reason=reason),
    )


def _judged(metric: GateMetric) -> JudgedMetric:
    side = {"control": metric.control_units, "experiment": metric.arm_units}
    stats = {name: SideMetadata(stats=SampleStats(count=min(n, 2**31 - 1))) for name, n in side.items()}
    numbers = {
        name: getattr(metric, name) for name in ("estimate", "lower", "upper", "log_e", "threshold_log_e")
    }
    return JudgedMetric(
        name=f"{metric.name} in {metric.arm}",
        id=f"{metric.name}@{metric.arm}",
        tags={"arm": metric.arm, "role": metric.role},
        groups=("stream_xp",),
        classification=_classification(metric),
        classification_reason=f"{metric.role} {metric.name} is {metric.state} in {metric.arm}",
        critical=metric.role is Role.GUARDRAIL,
        muted=False,
        experiment_metadata=stats["experiment"],
        control_metadata=stats["control"],
        result_metadata={name: n for name, n in numbers.items() if n is not msgspec.UNSET},
    )


def _classification(metric: GateMetric) -> Literal["High", "Low", "Pass", "Nodata"]:
    if metric.state in (MetricState.SAFE, MetricState.BETTER):
        return "Pass"
    if metric.state in (MetricState.HARMED, MetricState.WORSE):
        return "Low" if metric.estimate is not msgspec.UNSET and metric.estimate < 0 else "High"
    return "Nodata"


def iso(time_ms: int) -> str:
    """RFC 3339, UTC, whole milliseconds."""
    found = dt.datetime.fromtimestamp(time_ms / 1000, dt.UTC)
    return found.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def time_ms(text: str) -> int:
    """Epoch milliseconds of an RFC 3339 time.

    Raises:
        ValueError: it is none, or has no time zone.
    """
    found = dt.datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a time needs its zone")
    return int(found.timestamp() * 1000)
