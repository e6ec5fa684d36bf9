"""The template, the grammar of the output, and real processes that misbehave in every way we know."""

from __future__ import annotations

import os
import signal
import stat
import sys
import time
from pathlib import Path

import pytest

from hardware_profiles import command
from hardware_profiles.command import (
    CommandFailed,
    CommandNotFound,
    CommandSettings,
    InvalidCommand,
    parse_latencies_ms,
    run_command,
)

# the template -----------------------------------------------------------------------------------------------


def test_placeholders_stand_within_one_argument_each() -> None:
    settings = CommandSettings("ssh 'my board' run --model={model} '--as={name}.onnx'  ${HOME} '{ print }' {}")
    path = Path("/tmp/a folder/00000.onnx")
    assert settings.arguments(path, "a1.b-2_c") == [
        *("ssh", "my board", "run", "--model=/tmp/a folder/00000.onnx", "--as=a1.b-2_c.onnx"),
        *("${HOME}", "{ print }", "{}"),
    ]


def test_what_a_placeholder_stands_for_is_not_read_again() -> None:
    settings = CommandSettings("run {model}")
    assert settings.arguments(Path("/tmp/{name}/'x y'; rm"), "a") == ["run", "/tmp/{name}/'x y'; rm"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", r"command: expected a text such as '\./measure\.sh \{model\}', got ''"),
        ("   ", "expected a text"),
        (7, "expected a text such as .* got 7"),
        ("adb shell bench", r"no \{model\} in 'adb shell bench'; expected \{model\} .* and \{name\}"),
        ("run ${model}", r"no \{model\}"),
        ("run {modell} {model}", r"unknown placeholder \{modell\}; expected \{model\}"),
        ("awk '{print}' {model}", r"unknown placeholder \{print\}.*with spaces: \{ print \}"),
        ("run 'x {model}", r"cannot be split into words \(No closing quotation\)"),
        ("push {model} && run", r"'&&' is for a shell.*sh -c 'FIRST \"\$1\" \| SECOND' sh \{model\}"),
        ("run {model} | tail -1", r"'\|' is for a shell"),
    ],
)
def test_a_wrong_template_is_refused_with_the_right_form(template: str, message: str) -> None:
    with pytest.raises(InvalidCommand, match=message) as caught:
        CommandSettings(template)
    assert isinstance(caught.value, ValueError)
    assert str(caught.value).startswith("command: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "../x", "a;b", "-rf", "", "a\n", "$(x)"])
def test_a_name_that_a_program_could_misread_is_refused(name: str) -> None:
    with pytest.raises(InvalidCommand, match=r"cannot stand for \{name\}: expected letters"):
        CommandSettings("run {model} {name}").arguments(Path("m"), name)
    assert CommandSettings("run {model}").arguments(Path("m"), name) == ["run", "m"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_s": 0}, "timeout_s: expected seconds above 0, got 0"),
        ({"timeout_s": "60"}, "timeout_s: expected seconds above 0, got '60'"),
        ({"timeout_s": float("inf")}, "timeout_s: expected seconds above 0, got inf"),
        ({"timeout_s": True}, "timeout_s: expected seconds above 0, got True"),
        ({"retries": -1}, "retries: expected an integer of 0 or more, got -1"),
        ({"retries": 1.5}, "retries: expected an integer of 0 or more, got 1.5"),
        ({"repeats": 0}, "repeats: expected an integer of 1 or more, got 0"),
        ({"repeats": True}, "repeats: expected an integer of 1 or more, got True"),
        ({"anchor": "no"}, "anchor: expected true or false, got 'no'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidCommand) as caught:
        CommandSettings("run {model}", **settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


# what it printed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "runs_ms"),
    [
        ("12.3", [12.3]),
        ("12.3\r\n", [12.3]),
        ("\n  12.3 ms  \n\n", [12.3]),
        ("1234us\n", [1.234]),
        ("1234 us\n5 ns\n.5 s\n+2.\n", [1.234, 5e-6, 500.0, 2.0]),
        ("7 \u00b5s\n8 \u03bcs", [0.007, 0.008]),
        ("1.5e1 MS", [15.0]),
        ("loading model 3 of 4\n2026-11-23 12:00:01 go\nINFO\n10 runs done\n12.3\n", [12.3]),
        ("latency_ms: 12.3", [12.3]),
        ("Latency_us=1500\n", [1.5]),
        ("latency: 0.25 s", [250.0]),
        ("latency_ms = 4 ms", [4.0]),
        ("3\n7 8 9\n4 fps\nlatency_ms: 1\nlatency_ms: 2\n", [1.0, 2.0]),  # the label says what counts
        ("latency_p95_ms: 8\n7.0\n", [7.0]),  # another word
    ],
)
def test_latencies_are_read(output: str, runs_ms: list[float]) -> None:
    assert parse_latencies_ms(output) == pytest.approx(tuple(runs_ms), rel=1e-12)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("", r"printed no latency \(it printed nothing\); expected one line a run"),
        ("\n \n", "it printed nothing"),
        ("Killed\nerror: closed\n", r"its last line: 'error: closed'\); expected one line a run"),
        ("mean 12.3 ms", r"printed no latency \(its last line: 'mean 12.3 ms'\)"),
        ("12.3 45.6", r"'12.3 45.6': several numbers on one line; expected"),
        ("12,3", r"'12,3': several numbers on one line.*decimal point"),
        ("12.3 ms, 45 us", "several numbers on one line"),
        ("12.3\n1 2\n", "'1 2': several numbers"),
        ("81 fps", r"'81 fps': unknown unit 'fps'; expected s, ms, us or ns"),
        ("12.3 %", "unknown unit '%'"),
        ("12.3 min", "unknown unit 'min'"),
        ("0", "'0': a latency is finite and above 0"),
        ("-3.5", "'-3.5': a latency is finite and above 0"),
        ("nan", "'nan': a latency is finite"),
        ("12.3\n-inf ms", "'-inf ms': a latency is finite"),
        ("1e999", "'1e999': a latency is finite"),
        ("latency: 12.3", r"'latency: 12.3': no unit; expected 'latency_ms: 12.3'"),
        ("latency_ms: 12 us", "two units"),
        ("latency_ms: about 12", "no number after the label"),
        ("12.3\nlatency_ms:", "'latency_ms:': no number after the label"),
        ("latency_avg: 12", "unknown unit 'avg'"),
        ("latency_ms: 0.0", "above 0"),
    ],
)
def test_what_could_be_mistaken_is_refused(output: str, message: str) -> None:
    with pytest.raises(CommandFailed, match=message) as caught:
        parse_latencies_ms(output)
    assert "\n" not in str(caught.value)


def test_a_long_line_is_told_in_part() -> None:
    with pytest.raises(CommandFailed) as caught:
        parse_latencies_ms("x" * 10_000)
    assert len(str(caught.value)) < 500 and "xxx..." in str(caught.value)


# one run ----------------------------------------------------------------------------------------------------


def _shell(script: str, timeout_s: float = 20.0) -> str:
    return run_command(["sh", "-c", script], timeout_s)


def _failure(script: str, timeout_s: float = 20.0) -> str:
    with pytest.raises(CommandFailed) as caught:
        _shell(script, timeout_s)
    assert not isinstance(caught.value, CommandNotFound)
    return str(caught.value)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_stdout_comes_back_and_nothing_can_be_read() -> None:
    assert _shell("echo 12.3; echo log >&2; cat") == "12.3\n"
    assert _shell(r"printf '\377 1\n'") == "\ufffd 1\n"


def test_the_end_of_a_command_is_told() -> None:
    assert _failure("echo 1; echo one >&2; echo 'error: offline' >&2; exit 3") == (
        "the command exited with status 3; its last line on stderr: 'error: offline'"
    )
    assert (
        _failure("echo 'no device'; exit 1") == "the command exited with status 1; its last line on stdout: 'no device'"
    )
    assert _failure("exit 1") == "the command exited with status 1; it wrote nothing"
    assert _failure("echo 5; kill -9 $$") == "the command was killed by signal 9; its last line on stdout: '5'"


def test_a_program_that_cannot_start_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandNotFound, match="cannot start 'no-such-program': No such file or directory; expected a"):
        run_command(["no-such-program", "x"], 1.0)
    plain = tmp_path / "plain.sh"
    plain.write_text("echo 1\n")
    with pytest.raises(CommandNotFound, match="Permission denied"):
        run_command([str(plain)], 1.0)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "])
def test_time_out_ends_the_whole_process_group(tmp_path: Path, stubborn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_S", 0.1)
    pids = tmp_path / "pids"
    script = (
        f"{stubborn}sh -c 'echo $$ >> {pids}; sleep 60; sleep 60' & echo $$ >> {pids}; echo waiting; wait; sleep 60"
    )
    started = time.monotonic()
    message = _failure(script, 0.8)
    assert message == "the command did not end within 0.8 s and was killed; its last line on stdout: 'waiting'"
    assert time.monotonic() - started < 5.0
    child, leader = sorted(map(int, pids.read_text().split()), reverse=True)
    assert child != leader
    while _is_running(child) and time.monotonic() - started < 5.0:
        time.sleep(0.01)
    assert not _is_running(child) and not _is_running(leader)


def test_a_script_may_tidy_up_when_time_is_out(tmp_path: Path) -> None:
    _failure(f"trap 'echo tidy > {tmp_path}/done; exit' TERM; sleep 60 & wait", 0.8)
    assert (tmp_path / "done").read_text() == "tidy\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")
def test_an_interrupt_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_S", 0.1)
    pid = tmp_path / "pid"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.8)
        with pytest.raises(KeyboardInterrupt):
            _shell(f"echo $$ > {pid}; sleep 60", 30.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not _is_running(int(pid.read_text()))


def test_what_is_left_in_the_background_neither_blocks_nor_is_killed(tmp_path: Path) -> None:
    started = time.monotonic()
    output = _shell(f"sleep 5 & echo $! > {tmp_path}/pid; echo 12.3")
    assert (output, time.monotonic() - started < 4.0) == ("12.3\n", True)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # ProcessLookupError where it was killed before


def test_output_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "GRACE_S", 0.1)
    assert _failure("yes").startswith("the command wrote more than 1,048,576 bytes and was killed; its last line")
    assert "more than" in _failure("yes >&2")


def test_a_script_by_its_path_gets_the_arguments(tmp_path: Path) -> None:
    script = tmp_path / "device.py"
    script.write_text(f"#!{sys.executable} -S\nimport sys\nprint(sys.argv[1:])\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    arguments = CommandSettings(f"'{script}' --model {{model}}").arguments(Path("a b"), "x")
    assert run_command(arguments, 20.0) == "['--model', 'a b']\n"
