"""The demo without a broker: its world, what counts as right, and how delays are measured."""

from __future__ import annotations

import io
import sys

import click.testing
import msgspec
import pytest
from rich.console import Console

from stream_xp.adapters.load_generator import Sent
from stream_xp.cli import demo as cli
from stream_xp.cli import main
from stream_xp.domain.decision import Action, Decision, PartitionOffsets, Result, Signal, SignalData
from stream_xp.engine.evaluate import evaluate
from stream_xp.engine.policy import decide
from stream_xp.errors import ConfigError, DependencyError
from stream_xp.services.demo import Moment, run_demo, score, service
from stream_xp.services.demo.board import Board
from stream_xp.services.demo.report import Measured, build_report
from stream_xp.services.demo.tail import RESULTS, SIGNALS, Seen
from stream_xp.services.demo.world import (
    AA,
    ARTWORK,
    CANARY,
    DURATION_S,
    LONGEST_S,
    MINIMUM_RUNTIME_SHARE,
    SHORTEST_S,
    UNITS,
    Expectation,
    World,
    build_world,
    is_right,
)
from stream_xp.settings import Settings
from stream_xp.simulator import EXPOSURES, REWARDS

START_MS = 1_800_000_000_000
PARTITION = PartitionOffsets(exposures=1, rewards=1, watermark_ms=1)


@pytest.fixture(scope="module")
def world() -> World:
    return build_world(1)


@pytest.mark.slow
def test_at_least_19_of_20_seeds_are_right() -> None:
    right = [all(scored.right for scored in score(seed)) for seed in range(20)]
    assert sum(right) >= 19


def test_a_shorter_demo_is_decided_as_well() -> None:
    scored = {one.experiment: one for one in score(3, duration_s=SHORTEST_S)}
    assert all(one.right for one in scored.values())
    assert scored[CANARY].decision.action is Action.STOP
    assert scored[ARTWORK].decision.arm == "cell-2"
    assert scored[AA].decided_ms is None


def test_a_score_repeats_itself() -> None:
    assert score(5, duration_s=SHORTEST_S) == score(5, duration_s=SHORTEST_S)


@pytest.mark.parametrize("duration_s", [SHORTEST_S, DURATION_S])
def test_the_number_of_units_does_not_depend_on_the_duration(duration_s: float) -> None:
    world = build_world(2, duration_s=duration_s)
    for experiment, units in UNITS.items():
        found = sum(world.traffic.truth().units(experiment).values())
        # Five standard deviations, and the share of exposures that come too late.
        assert abs(found - 0.999 * units) < 5 * units**0.5


@pytest.mark.parametrize("duration_s", [SHORTEST_S - 1, LONGEST_S + 1])
def test_a_duration_out_of_range_is_refused(duration_s: float) -> None:
    with pytest.raises(ConfigError, match="duration"):
        build_world(1, duration_s=duration_s)


def test_the_spec_says_the_minimum_runtime_of_the_usual_duration(world: World) -> None:
    artwork = next(t.spec for t in world.traffic.scenario.experiments if t.spec.experiment == ARTWORK)
    assert artwork.minimum_runtime == f"{MINIMUM_RUNTIME_SHARE * DURATION_S:.0f}s"
    spec_file = service.__file__.replace("demo/service.py", "demo_specs/artwork.yaml")
    with open(spec_file, encoding="utf-8") as file:  # noqa: PTH123 (a test)
        assert f"minimum_runtime: {artwork.minimum_runtime}" in file.read()


STOP = Decision(action=Action.STOP, reason="harm", arm="canary")
SHIP = Decision(action=Action.SHIP, reason="better", arm="cell-2")


@pytest.mark.parametrize(
    ("expected", "decision", "decided_ms", "right"),
    [
        (Expectation(Action.STOP, "canary", 15_000), STOP, 20_000, True),
        (Expectation(Action.STOP, "canary", 15_000), STOP, 14_000, False),
        (Expectation(Action.STOP, "canary", 15_000), None, None, False),
        (Expectation(Action.STOP, "canary", 15_000), msgspec.structs.replace(STOP, arm=None), 20_000, False),
        (Expectation(Action.SHIP, "cell-2", 0), SHIP, 20_000, True),
        (Expectation(Action.SHIP, "cell-3", 0), SHIP, 20_000, False),
        (Expectation(Action.SHIP, "canary", 0), STOP, 20_000, False),
        (Expectation(Action.HOLD, None, None), None, None, True),
        (Expectation(Action.HOLD, None, None), SHIP, 20_000, False),
    ],
)
def test_what_is_right(
    expected: Expectation, decision: Decision | None, decided_ms: int | None, right: bool
) -> None:
    assert is_right(expected, decision, decided_ms) is right


# What the service would have said, from the truth ---------------------------------------------------------


def final_result(world: World, experiment: str) -> Result:
    """The result that stands on all of the traffic, as the service computes it."""
    traffic = next(t for t in world.traffic.scenario.experiments if t.spec.experiment == experiment)
    truth = world.traffic.truth(START_MS)
    statistics = truth.statistics[experiment]
    evaluation = evaluate(traffic.record(START_MS), statistics)
    return Result(
        experiment=experiment,
        version=1,
        design_hash="",
        statistics_hash=statistics.digest(),
        code_version="",
        look=100,
        offsets={"0": PartitionOffsets(exposures=10, rewards=5, watermark_ms=START_MS)},
        runtime_ms=10**6,
        arms=evaluation.arms,
        crossover_units=0,
        metrics=evaluation.metrics,
        sample_ratio=evaluation.sample_ratio,
        invalid=(),
        decision=decide(traffic.spec, evaluation, runtime_ms=10**6),
        exposure_outcomes=truth.exposure_outcomes,
        reward_outcomes=truth.reward_outcomes,
        evaluated_ms=START_MS,
    )


def seen_result(result: Result, seen_s: float = 0.0) -> Seen:
    return Seen(RESULTS, msgspec.json.encode(result), seen_s)


def seen_signal(result: Result, seen_s: float) -> Seen:
    data = SignalData(decision=result.decision, result=result)
    signal = Signal(id="1", source="s", subject=result.experiment, time="", data=data)
    return Seen(SIGNALS, msgspec.json.encode(signal), seen_s)


@pytest.fixture(scope="module")
def results(world: World) -> dict[str, Result]:
    return {experiment: final_result(world, experiment) for experiment in world.expected}


@pytest.fixture
def board(results: dict[str, Result]) -> Board:
    board = Board()
    for result in results.values():
        board.take(seen_result(result))
        if result.decision.action is not Action.HOLD:
            board.take(seen_signal(result, 30.0))
    return board


@pytest.fixture(scope="module")
def measured(world: World) -> Measured:
    truth = world.traffic.truth(START_MS)
    return Measured(
        start_s=5.0,
        start_ms=START_MS,
        engine_s=45.0,
        sent={topic: world.traffic.count(topic) for topic in (EXPOSURES, REWARDS)},
        dead_letters={f"{topic} {reason}": n for (topic, reason), n in truth.dead_letters.items()},
    )


def report_of(world: World, board: Board, measured: Measured, samples: list[Sent] | None = None):
    return build_report(world, board, board.delays(samples or [], "xp."), measured)


def test_a_report_of_what_is_true_is_right(world: World, board: Board, measured: Measured) -> None:
    report = report_of(world, board, measured)
    assert report.right
    assert report.conserved
    assert not report.differences
    canary, artwork, aa = report.experiments
    assert (canary.decided_ms, canary.detection_delay_ms) == (25_000, 10_000)
    assert (artwork.decision.action, artwork.decision.arm) == (Action.SHIP, "cell-2")
    assert (aa.signals, aa.decided_ms, aa.evidence.metric) == (0, None, "play")
    assert canary.evidence.metric == "checkout_error"
    assert sum(canary.units.values()) == sum(world.traffic.truth().units(CANARY).values())


def test_a_second_signal_is_wrong(world: World, board: Board, measured: Measured, results) -> None:
    board.take(seen_signal(results[CANARY], 31.0))
    report = report_of(world, board, measured)
    assert not report.right
    assert report.experiments[0].signals == 2
    assert report.experiments[0].decided_ms == 25_000


def test_a_stop_before_the_harm_is_wrong(world: World, results, measured: Measured) -> None:
    board = Board()
    for result in results.values():
        board.take(seen_result(result))
    board.take(seen_signal(results[CANARY], 10.0))
    board.take(seen_signal(results[ARTWORK], 30.0))
    report = report_of(world, board, measured)
    assert [experiment.right for experiment in report.experiments] == [False, True, True]


def test_every_difference_is_named(world: World, board: Board, measured: Measured, results) -> None:
    outcomes = msgspec.structs.replace(results[AA].exposure_outcomes, late=1, counted=2)
    wrong = msgspec.structs.replace(results[AA], exposure_outcomes=outcomes, statistics_hash="?")
    board.take(seen_result(wrong))
    letters = {**measured.dead_letters, "rewards unknown_arm": 3}
    report = report_of(world, board, msgspec.structs.replace(measured, dead_letters=letters))
    assert not report.right
    assert not report.conserved
    assert any(line.startswith("aa: exposures late: 1 instead of") for line in report.differences)
    assert any(line.startswith("aa: exposures counted: 2 instead of") for line in report.differences)
    assert "aa: the statistics are not those of the simulator" in report.differences
    assert "dead letters, rewards unknown_arm: 3 instead of 0" in report.differences
    assert len(report.differences) == 4


def test_a_record_that_was_not_read_breaks_the_conservation(
    world: World, board: Board, measured: Measured
) -> None:
    sent = {**measured.sent, REWARDS: measured.sent[REWARDS] + 1}
    report = report_of(world, board, msgspec.structs.replace(measured, sent=sent))
    assert not report.conserved
    assert not report.right


def with_offsets(result: Result, exposures: int | None, rewards: int | None) -> Result:
    offsets = PartitionOffsets(exposures=exposures, rewards=rewards, watermark_ms=None)
    return msgspec.structs.replace(result, offsets={"2": offsets})


def test_the_delay_ends_with_the_first_result_of_the_own_experiment(results) -> None:
    board = Board()
    aa, canary = results[AA], results[CANARY]
    board.take(seen_result(with_offsets(aa, 4, None), 10.0))
    board.take(seen_result(with_offsets(canary, 9, 9), 10.5))
    board.take(seen_result(with_offsets(aa, 9, 3), 11.0))
    board.take(seen_result(with_offsets(aa, 9, 7), 12.0))
    samples = [
        Sent("xp.exposures", 2, 4, b"aa-1", 9.5),
        Sent("xp.exposures", 2, 5, b"aa-1", 9.5),
        Sent("xp.rewards", 2, 3, b"aa-1", 9.0),
        Sent("xp.rewards", 2, 4, b"aa-1", 9.0),
        Sent("xp.rewards", 2, 9, b"checkout-canary-7", 10.0),
        Sent("xp.rewards", 2, 8, b"aa-1", 9.0),
        Sent("xp.exposures", 3, 0, b"aa-1", 9.0),
        Sent("xp.exposures", 2, 0, b"malformed-17", 9.0),
        Sent("xp.exposures", 2, 0, None, 9.0),
    ]
    delays = board.delays(samples, "xp.")
    assert delays.covered_s == [0.5, 1.5, 2.0, 3.0, 0.5]
    assert delays.open == 2


def test_the_board_passes_over_what_is_no_record_and_counts_it(results) -> None:
    board = Board()
    for topic in (RESULTS, SIGNALS):
        for value in (b"{", b"\xff", b"[" * 5_000):
            board.take(Seen(topic, value, 1.0))
    board.take(seen_result(msgspec.structs.replace(results[AA], offsets={"no number": PARTITION})))
    board.take(seen_signal(results[CANARY], 2.0))
    assert set(board.results) == {AA}
    assert board.heard(CANARY) is not None
    assert board.passed_over.counts == {RESULTS: 3, SIGNALS: 3}


def test_the_report_shows_quantiles_of_the_delays(world: World, board: Board, measured: Measured) -> None:
    samples = [Sent("xp.exposures", 0, 3, b"aa-1", -0.001 * number) for number in range(1, 101)]
    latency = report_of(world, board, measured, samples).latency
    assert (latency.samples, latency.open, round(latency.longest_ms)) == (100, 0, 100)
    assert 98 <= latency.p99_ms <= 100
    assert 50 <= latency.p50_ms <= 51


# The command ----------------------------------------------------------------------------------------------


def invoke(monkeypatch: pytest.MonkeyPatch, run, *arguments: str) -> click.testing.Result:
    monkeypatch.setattr(cli, "run_demo", run)
    monkeypatch.setattr(cli, "_log_warnings_only", lambda: None)
    return click.testing.CliRunner().invoke(main, ["demo", *arguments])


def test_a_right_demo_exits_0_and_prints_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path, world: World, board: Board, measured: Measured
) -> None:
    report = report_of(world, board, measured)

    def run(seed, *, duration_s, watch):
        assert (seed, duration_s) == (9, 21.0)
        watch(Moment("running", 12.0, 40.0, 1_000, world, board))
        return report

    file = tmp_path / "report.json"
    result = invoke(monkeypatch, run, "--seed", "9", "--duration", "21", "--json", str(file))
    assert result.exit_code == 0, result.output
    for words in (
        "running, 12 of 40 s, 1,000 events; checkout-canary stop canary",
        "checkout-canary: STOP canary  right",
        "decided 25.0 s after the start, 10.0 s after the harm began",
        "artwork: SHIP cell-2  right",
        "aa: HOLD  right",
        "no decision",
        "every record has one outcome: holds",
        "equal those of the simulator",
        "the demo came out right",
    ):
        assert words in result.output
    written = msgspec.json.decode(file.read_bytes())
    assert written["right"] is True
    assert written["experiments"][0]["decision"]["action"] == "stop"
    assert written["exposures"]["in"] == report.exposures.read


def test_a_wrong_demo_exits_1_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, world: World, board: Board, measured: Measured, results
) -> None:
    board.take(seen_signal(results[CANARY], 31.0))
    report = report_of(world, board, msgspec.structs.replace(measured, dead_letters={}))
    result = invoke(monkeypatch, lambda *_a, **_k: report)
    assert result.exit_code == 1
    assert "WRONG, expected stop canary, 2 signals instead of one" in result.output
    assert "differs from the simulator: dead letters" in result.output
    assert "the demo came out WRONG" in result.output


def test_a_failed_worker_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_a, **_k):
        raise DependencyError("the worker failed: OSError()")

    result = invoke(monkeypatch, run)
    assert (result.exit_code, result.output) == (1, "Error: the worker failed: OSError()\n")


@pytest.mark.parametrize(
    "arguments", [("--duration", "5"), ("--json", "/no/such/folder/report.json"), ("--seed", "-1")]
)
def test_a_wrong_option_exits_2(monkeypatch: pytest.MonkeyPatch, arguments) -> None:
    assert invoke(monkeypatch, lambda *_a, **_k: pytest.fail("must not run"), *arguments).exit_code == 2


@pytest.mark.parametrize("width", [80, 150])
def test_the_table_shows_every_metric(world: World, board: Board, width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with cli._LiveTable(console) as table:
        table.show(Moment("running", 12.0, 40.0, 1_000, world, board))
    text = screen.getvalue()
    for words in ("running", "STOP", "SHIP", "HOLD", "log_e", "checkout_error canary", "take cell-3", "inf)"):
        assert words in text


def test_the_table_waits_for_results(world: World) -> None:
    screen = io.StringIO()
    with cli._LiveTable(Console(file=screen, force_terminal=True, width=150)) as table:
        table.show(Moment("starting", 0.0, 40.0, 0, world, Board()))
    for experiment in world.expected:
        assert experiment in screen.getvalue()
    assert "waiting for the first result" in screen.getvalue()


class BrokenThread:
    """A worker that fails at a given point, with an error of nobody's."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.left = False

    def __enter__(self):
        if self.where == "start":
            raise OSError("no port")
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.left = True
        if self.where == "end" and error is None:
            raise OSError("disk")

    def check(self) -> None:
        if self.where == "middle":
            raise OSError("bad")


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_an_error_of_the_worker_names_the_worker(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    thread = BrokenThread(where)
    monkeypatch.setattr(service, "WorkerThread", lambda _settings: thread)

    def use() -> None:
        with service._working(Settings()) as worker, service._errors_of_worker():
            worker.check()

    with pytest.raises(DependencyError, match="the worker failed: OSError"):
        use()
    assert thread.left is (where != "start")


def test_without_confluent_kafka_the_demo_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka.cimpl", None)
    with pytest.raises(ConfigError, match=r"stream-xp\[embedded\]"):
        run_demo(1)
