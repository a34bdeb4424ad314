"""A file of impressions becomes rows, and rows become events."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from stream_xp.domain.codec import RawRecord, decode_exposure, decode_reward
from stream_xp.errors import ConfigError
from stream_xp.services.replay.feed import EXPOSURES, REWARDS, batches, events_of
from stream_xp.services.replay.report import Sums, z_test
from stream_xp.services.replay.rows import Columns, Row, read_rows, time_of

HEADER = "policy,row,timestamp,click\n"
OPEN_BANDIT = Path(__file__).parents[2] / "examples/open-bandit/open-bandit-men.csv.gz"


def written(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


# Times


@pytest.mark.parametrize(
    ("text", "ms"),
    [
        ("1970-01-01T00:00:00Z", 0),
        ("1970-01-01 00:00:00+00:00", 0),
        ("2019-11-24 00:01:03.979311+00:00", 1_574_553_663_979),
        ("2019-11-24 00:01:03.9799+00:00", 1_574_553_663_979),
        ("2019-11-24T09:01:03.979+09:00", 1_574_553_663_979),
        ("2019-11-23T18:31:03-05:30", 1_574_553_663_000),
    ],
)
def test_times_with_an_offset(text: str, ms: int) -> None:
    assert time_of(text) == ms


@pytest.mark.parametrize(
    "text", ["2019-11-24 00:01:03", "2019-11-24", "yesterday", "1574553663979", "2019-13-01T00:00:00Z"]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        time_of(text)


# Files


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_rows_come_in_the_order_of_time(tmp_path: Path, name: str) -> None:
    text = HEADER + "b,1,1970-01-01T00:00:02Z,0\na,1,1970-01-01T00:00:01Z,1\nb,2,1970-01-01T00:00:01Z,0.0\n"
    assert read_rows(written(tmp_path, text, name), Columns()) == [
        Row(1_000, "a-1", "a", (("click", 1.0),), ()),
        Row(1_000, "b-2", "b", (), ()),
        Row(2_000, "b-1", "b", (), ()),
    ]


def test_other_columns_segments_quotes_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    text = '\ufeffcell,member,at,take,spend,device\n\n"A, new",7,1970-01-01T00:00:00Z,0,-2.5,\n'
    columns = Columns(arm="cell", unit=("member",), time="at", metrics=("take", "spend"))
    rows = read_rows(written(tmp_path, text), columns, segments=("device", "land"))
    assert rows == [Row(0, "7", "A, new", (("spend", -2.5),), (("device", ""),))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"log.csv:1: has no column 'policy'; its columns are none"),
        ("policy,row,click\n", r":1: has no column 'timestamp'; its columns are policy, row, click"),
        ("policy,policy,row,timestamp,click\n", r":1: has 2 columns 'policy'"),
        (HEADER, r"has no row below its header"),
        (HEADER + "a,1,1970-01-01T00:00:00Z\n", r":2: has 3 cells, the header has 4"),
        (
            HEADER + "a,1,1970-01-01T00:00:00Z,0\na,2,noon,0\n",
            r":3: column timestamp: must be a time .*'noon'",
        ),
        (HEADER + "a,1,1970-01-01T00:00:00,0\n", r":2: column timestamp: must have an offset"),
        (
            HEADER + "a,1,1970-01-01T00:00:00Z,yes\n",
            r":2: column click: must be a finite number, found 'yes'",
        ),
        (HEADER + "a,1,1970-01-01T00:00:00Z,nan\n", r":2: column click: must be a finite number"),
        (HEADER + "a,1,1970-01-01T00:00:00Z,\n", r":2: column click: is empty"),
        (HEADER + ",1,1970-01-01T00:00:00Z,0\n", r":2: column policy: is empty"),
        (
            HEADER + f"a,{'9' * 300},1970-01-01T00:00:00Z,0\n",
            r":2: column policy, row: a unit has at most 256",
        ),
        (HEADER + 'a,"1,1970-01-01T00:00:00Z,0\n', r"is not a CSV file"),
    ],
)
def test_faults_name_file_line_and_column(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rows(written(tmp_path, text), Columns())


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("log.csv.gz", b"no gzip"),
        ("log.csv.gz", gzip.compress(b"a" * 99, mtime=0)[:20]),
        ("log.csv", b"\xff\xfe,"),
    ],
)
def test_files_that_are_no_text_or_no_gzip(tmp_path: Path, name: str, raw: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=name):
        read_rows(path, Columns())


def test_the_open_bandit_file() -> None:
    rows = read_rows(OPEN_BANDIT, Columns())
    clicks = {arm: sum(len(row.rewards) for row in rows if row.arm == arm) for arm in ("random", "bts")}
    assert clicks == {"random": 46, "bts": 69}
    assert [sum(row.arm == arm for row in rows) for arm in ("random", "bts")] == [10_000, 10_000]
    assert len({row.unit for row in rows}) == 20_000
    assert [row.time_ms for row in rows] == sorted(row.time_ms for row in rows)


# Events


def test_a_row_becomes_an_exposure_and_a_reward_for_each_metric() -> None:
    row = Row(5, "a-1", "a", (("click", 1.0), ("spend", 2.5)), (("device", "tv"),))
    exposure, *rewards = events_of(row, "exp")
    seen = decode_exposure(RawRecord(exposure.key, exposure.value, (), exposure.time_ms))
    assert exposure.topic == EXPOSURES
    assert (seen.unit, seen.arm, seen.time, seen.experiment, seen.segments) == (
        "a-1",
        "a",
        5,
        "exp",
        {"device": "tv"},
    )
    assert [one.topic for one in rewards] == [REWARDS, REWARDS]
    heard = [decode_reward(RawRecord(one.key, one.value, (), one.time_ms)) for one in rewards]
    assert [(one.unit, one.metric, one.value, one.time) for one in heard] == [
        ("a-1", "click", 1.0, 5),
        ("a-1", "spend", 2.5, 5),
    ]
    assert len({one.id for one in (seen, *heard)}) == 3


def test_ids_tell_a_returning_unit_from_a_repeated_row() -> None:
    first, again, later = (next(events_of(Row(ms, "u", "a", (), ()), "exp")) for ms in (5, 5, 6))
    assert first.value == again.value
    assert json.loads(first.value)["id"] != json.loads(later.value)["id"]


def test_ids_of_long_units_fit() -> None:
    for event in events_of(Row(5, "u" * 256, "a", (("click", 1.0),), ()), "exp"):
        assert len(json.loads(event.value)["id"]) <= 200


def test_batches_are_whole_and_in_order() -> None:
    rows = [Row(n, str(n), "a", (), ()) for n in range(10)]
    cut = list(batches(rows, iter([3, 4, 5])))
    assert [len(one) for one in cut] == [3, 4, 3]
    assert [row for one in cut for row in one] == rows


# The test of a fixed sample


def test_pooled_z_test_of_the_open_bandit_numbers() -> None:
    test = z_test(Sums(10_000, 46, 46), Sums(10_000, 69, 69), pooled=True)
    assert test["z"] == pytest.approx(2.150954, abs=1e-6)
    assert test["p"] == pytest.approx(0.0314798, abs=1e-6)


def test_welch_z_test() -> None:
    # Values 0, 1, 2 against 1, 3, 5, 7: means 1 and 4, variances 1 and 20/3.
    test = z_test(Sums(3, 3, 5), Sums(4, 16, 84), pooled=False)
    assert test["z"] == pytest.approx(3 / (1 / 3 + 20 / 12) ** 0.5)


@pytest.mark.parametrize(
    ("control", "arm"),
    [(Sums(0, 0, 0), Sums(5, 1, 1)), (Sums(5, 0, 0), Sums(5, 0, 0)), (Sums(5, 5, 5), Sums(5, 5, 5))],
)
def test_an_undefined_z_test_says_so(control: Sums, arm: Sums) -> None:
    assert z_test(control, arm, pooled=True) == {"z": None, "p": None}
