"""CSV files of measurements: written and read back, combined by hand, and refused with their lines."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles.host_cpu import precision_label
from hardware_profiles.measured_csv import InvalidMeasurements, read_measurements, write_measurements
from hardware_profiles.measurement import Measurement, Provenance
from hardware_profiles.onnx_writer import random_ranges, random_weights, write_onnx
from search_spaces import Architecture, MobileNet

SPACE = MobileNet(resolutions=(8, 16), channels=1, depths=(1, 2))
SMALL, LARGE = SPACE.smallest, SPACE.largest
ASKED = {"device": "phone", "runtime": "tflite", "hardware": "Example Phone"}


def _read(path: Path, **options: object) -> dict[Architecture, Measurement]:
    return read_measurements(path, SPACE, **{**ASKED, **options})  # type: ignore[arg-type]


def _write(folder: Path, text: str) -> Path:
    path = folder / "phone.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _sampled(count: int) -> list[Architecture]:
    rng = np.random.default_rng(7)
    return list(dict.fromkeys(SPACE.sample(rng) for _ in range(count)))


def test_two_columns_are_enough(tmp_path: Path) -> None:
    text = f'architecture,latency_ms\n"{LARGE}",12.5\n\n"{SMALL}", 3 \n'
    for content in (text, "\ufeff" + text.replace("\n", "\r\n")):
        found = _read(_write(tmp_path, content))
        assert list(found) == [LARGE, SMALL]
        assert found[SMALL] == Measurement(
            3.0, 3.0, 3.0, None, 1, 1, Provenance("phone", "tflite", 1, 1, "fp32", "Example Phone", "", None)
        )
        assert found[LARGE].latency_ms == 12.5


def test_rows_of_one_architecture_are_repeats(tmp_path: Path) -> None:
    rows = [(1.0, 0.9, 1.5, 10, "2026-01-02"), (1.2, 1.0, 1.7, 20, "2026-03-01"), (2.0, 2.1, 2.4, 10, "2026-02-01")]
    lines = [f'"{SMALL}",{",".join(map(str, row))},0.3,2,1' for row in rows]
    text = "architecture,latency_ms,p50_ms,p95_ms,runs,date,spread,rounds,outliers\n" + "\n".join(lines)
    [found] = _read(_write(tmp_path, text)).values()
    assert (found.latency_ms, found.p50_ms) == (1.2, 1.0)
    assert found.p95_ms == pytest.approx(1.7 + 0.9 * 0.7)  # 0.95 of the way through 1.5, 1.7, 2.4
    assert found.spread == pytest.approx(1.4826 * 0.2 / 1.2)  # deviations 0.2, 0, 0.8; not what the rows say
    assert (found.rounds, found.runs_per_round, found.outliers) == (6, 10, 3)
    assert found.provenance.date == "2026-03-01"


def test_what_was_written_is_read_back_to_the_last_digit(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "deep" / "phone.csv"
    written = {}
    for i, architecture in enumerate([SMALL, SPACE.with_precision(LARGE, "int8"), *_sampled(10)]):
        a, b, c, d, e = (float(x) for x in rng.lognormal(size=5))
        network = SPACE.lower(architecture)
        model = write_onnx(network, random_weights(network, rng), random_ranges(network)).SerializeToString()
        date = f"2026-01-{i + 1:02d}T10:00:00+00:00"
        provenance = Provenance(
            "phone", "tflite, 2.1", 4, 1, precision_label(model), 'a "CPU"', date, e if i % 2 else None
        )
        written[architecture] = Measurement(a, b, c, d if i % 3 else None, 5, 30, provenance, i % 4)
    assert {each.provenance.precision for each in written.values()} == {"fp32", "int8", "mixed"}
    write_measurements(path, written)
    assert _read(path, threads=4) == written
    assert [each.name for each in path.parent.iterdir()] == ["phone.csv"]
    with path.open(newline="") as stream:
        [first, *_] = csv.DictReader(stream)
    assert SPACE.parse(first["architecture"]).id == first["id"]
    write_measurements(path, {})
    assert path.read_text().count("\n") == 1


def test_measurements_of_different_conditions_are_not_written_together(tmp_path: Path) -> None:
    [one] = _read(_write(tmp_path, f'architecture,latency_ms\n"{SMALL}",1\n')).values()
    other = replace(one, provenance=replace(one.provenance, threads=2))
    with pytest.raises(ValueError, match="of one device, runtime, number of threads and hardware; got several"):
        write_measurements(tmp_path / "new.csv", {SMALL: one, LARGE: other})
    assert not (tmp_path / "new.csv").exists()


def test_an_id_is_enough_where_the_architecture_is_known(tmp_path: Path) -> None:
    path = _write(tmp_path, f"id,latency_ms,note\n{SMALL.id},1.5,cold\n{LARGE.id},9,\n")
    assert {a: m.latency_ms for a, m in _read(path, known=[LARGE, SMALL]).items()} == {SMALL: 1.5, LARGE: 9.0}
    with pytest.raises(InvalidMeasurements, match=f"line 3: id: '{LARGE.id}' is none of the 1 architectures asked for"):
        _read(path, known=[SMALL])


def test_what_the_file_says_of_the_conditions(tmp_path: Path) -> None:
    row = f'"{SMALL}",1'
    text = (
        f"architecture,latency_ms,device,runtime,threads,hardware\n{row},,,,\n{row},phone,ncnn,1,Other\n{row},,ncnn,,\n"
    )
    [found] = _read(_write(tmp_path, text)).values()
    assert found.provenance.key == ("phone", "ncnn", 1, 1, "Other")
    for wrong, message in (
        ("tablet,,,", "line 2: device: expected 'phone', got 'tablet'; measurements of different conditions are not"),
        (",,4,", "line 2: threads: expected '1', got '4'"),
    ):
        with pytest.raises(InvalidMeasurements, match=message):
            _read(_write(tmp_path, f"architecture,latency_ms,device,runtime,threads,hardware\n{row},{wrong}\n"))
    with pytest.raises(InvalidMeasurements, match="line 3: runtime: expected 'ncnn', got 'tflite'"):
        _read(_write(tmp_path, f"architecture,latency_ms,runtime\n{row},ncnn\n{row},tflite\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (f'"{SMALL}",', "line 3: latency_ms: expected a number above 0, got nothing"),
        (f'"{SMALL}",fast', "line 3: latency_ms: expected a number above 0, got 'fast'"),
        (f'"{SMALL}",0', "expected a number above 0, got '0'"),
        (f'"{SMALL}",-1', "expected a number above 0, got '-1'"),
        (f'"{SMALL}",nan', "expected a number above 0, got 'nan'"),
        (f'"{SMALL}","1,5"', "expected a number above 0, got '1,5'"),
        (f'"{SMALL}",12 ms', "expected a number above 0, got '12 ms'"),
        ('"resolution=9",1', "line 3: architecture: resolution = 9 is not an option; options: 8, 16"),
        ('"colour=9",1', "line 3: architecture: .*has no choice 'colour'"),
        ("resolution=8,stem.precision=int8,1", "expected as many values as the header has names, got 'resolution=8,"),
        (",1", "line 3: expected an architecture or an id, got neither"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, row: str, message: str) -> None:
    path = _write(tmp_path, f'architecture,latency_ms\n"{LARGE}",1\n{row}\n')
    with pytest.raises(InvalidMeasurements, match=message) as caught:
        _read(path)
    assert str(caught.value).startswith(f"{path}: line 3: ") and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("p50_ms", "0", "p50_ms: expected a number above 0, got '0'"),
        ("anchor_ms", "inf", "anchor_ms: expected a number above 0, got 'inf'"),
        ("spread", "-0.1", "spread: expected a number of 0 or more, got '-0.1'"),
        ("runs", "0", "runs: expected a whole number of 1 or more, got '0'"),
        ("rounds", "1.5", "rounds: expected a whole number of 1 or more, got '1.5'"),
        ("outliers", "-1", "outliers: expected a whole number of 0 or more, got '-1'"),
        ("date", "yesterday", "date: expected one such as 2026-05-31 .* got 'yesterday'"),
        ("id", LARGE.id, f"id: expected '{SMALL.id}', that of the architecture in mobilenet.*, got '{LARGE.id}'"),
    ],
)
def test_a_bad_cell_is_told(tmp_path: Path, column: str, cell: str, message: str) -> None:
    with pytest.raises(InvalidMeasurements, match=f"line 2: {message}"):
        _read(_write(tmp_path, f'architecture,latency_ms,{column}\n"{SMALL}",1,{cell}\n'))


def test_many_bad_rows_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasurements) as caught:
        _read(_write(tmp_path, "architecture,latency_ms\n" + f'"{SMALL}",x\n' * 12))
    message = str(caught.value)
    assert [f"line {i}:" in message for i in range(2, 8)] == [True] * 5 + [False]
    assert re.search(r"; and 7 more \(0 of 12 rows are measurements of mobilenet-\w+\)$", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a first line that names the columns architecture"),
        (b"architecture;latency_ms\n", "unknown column 'architecture;latency_ms'; did you mean"),
        (b"architecture,latency\n", r"unknown column 'latency'; did you mean 'latency_ms'\?"),
        (b"architecture,colour,latency_ms\n", "unknown column 'colour'; expected architecture, id, latency_ms"),
        (b"architecture,p50_ms\n", "architecture .or id. and latency_ms, got 'architecture,p50_ms'"),
        (b"latency_ms,runs\n", "got 'latency_ms,runs'"),
        (b"id,latency_ms,id\n", "two columns are called 'id'"),
        (b"architecture,latency_ms\n", "expected measurements below the header, got none"),
        (b"architecture,latency_ms\n\xff,1\n", "expected a CSV file in UTF-8"),
        (b'architecture,latency_ms\n"x,1\n', "line 2: expected comma-separated values"),
    ],
)
def test_a_file_that_is_no_table_of_measurements_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "phone.csv"
    path.write_bytes(content)
    with pytest.raises(InvalidMeasurements, match=message):
        _read(path)
    with pytest.raises(InvalidMeasurements, match=r"absent\.csv cannot be read .*; expected a CSV file"):
        _read(tmp_path / "absent.csv")
