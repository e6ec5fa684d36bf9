"""A command that measures: the template a user wrote, one run of it, and the latencies it printed.

    adb-latency.sh {model}      ->      latency_ms: 12.3

No shell is involved: the template is split as a shell would, and each placeholder stands within one argument.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

UNITS_MS = {"s": 1e3, "ms": 1.0, "us": 1e-3, "\u00b5s": 1e-3, "\u03bcs": 1e-3, "ns": 1e-6}  # two letters are called mu
EXPECTED = "one line a run that holds nothing but a latency: '12.3', '12.3 ms', '1234 us' or 'latency_ms: 12.3'"
PLACEHOLDERS = "{model} (the path of the model file, needed) and {name} (the model's name)"

GRACE_S = 0.5  # between asking a command to end and killing it
MOST_OUTPUT_BYTES = 1 << 20

_PLACEHOLDER = re.compile(r"(?<!\$)\{([A-Za-z_]\w*)\}")  # ${VARIABLE} is a shell's
_SHELL_WORDS = frozenset({"|", "||", "&", "&&", ";", ">", ">>", "<", "2>", "2>&1", "&>"})
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NUMBER = r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|(?:nan|inf|infinity)(?![a-z]))"
_VALUE = re.compile(rf"({_NUMBER})\s*([a-z\u00b5\u03bc%]*)", re.IGNORECASE)
_LABELLED = re.compile(r"latency(?:_([a-z\u00b5\u03bc]+))?\s*[:=]\s*(.*)", re.IGNORECASE)


class InvalidCommand(ValueError):
    """A template or setting that cannot work, whatever the device does."""


class CommandFailed(RuntimeError):
    """One run of a command that gave no latency; another try may."""


class CommandNotFound(CommandFailed):
    """A program that cannot be started; trying again does not help."""


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """How a device is measured by a command.

    command: template with `{model}` for the path of an ONNX file, and `{name}` for the model's name if wanted.
    timeout_s: after which one run of the command is killed.
    retries: further tries of a run that failed.
    repeats: runs of the command for each model, one in each round over the models.
    anchor: whether a fixed float network is measured in between, to tell when the device is slower than it can be.

    Raises InvalidCommand, whose message begins with the name of the setting.
    """

    command: str
    timeout_s: float = 120.0
    retries: int = 2
    repeats: int = 5
    anchor: bool = True

    def __post_init__(self) -> None:
        _check_template(self.command)
        number = isinstance(self.timeout_s, int | float) and not isinstance(self.timeout_s, bool)
        if not number or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            raise InvalidCommand(f"timeout_s: expected seconds above 0, got {self.timeout_s!r}")
        for name, lowest in (("retries", 0), ("repeats", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise InvalidCommand(f"{name}: expected an integer of {lowest} or more, got {value!r}")
        if not isinstance(self.anchor, bool):
            raise InvalidCommand(f"anchor: expected true or false, got {self.anchor!r}")

    def arguments(self, model: Path, name: str) -> list[str]:
        """The program and its arguments for one model; raises InvalidCommand for a name that is not plain."""
        if "name" in _PLACEHOLDER.findall(self.command) and not _PLAIN_NAME.fullmatch(name):
            raise InvalidCommand(
                f"the name {name!r} of a model cannot stand for {{name}}: expected letters, digits, _, . and -"
            )
        values: Mapping[str, str] = {"model": str(model), "name": name}
        return [_PLACEHOLDER.sub(lambda found: values[found[1]], word) for word in shlex.split(self.command)]


def _check_template(command: object) -> None:
    if not isinstance(command, str) or not command.strip():
        raise InvalidCommand(f"command: expected a text such as './measure.sh {{model}}', got {command!r}")
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise InvalidCommand(f"command: cannot be split into words ({error}): {command!r}") from None
    names = [name for word in words for name in _PLACEHOLDER.findall(word)]
    for name in names:
        if name not in ("model", "name"):
            raise InvalidCommand(
                f"command: unknown placeholder {{{name}}}; expected {PLACEHOLDERS}. Braces that a program is to see "
                f"are written with spaces: {{ {name} }}"
            )
    if "model" not in names:
        raise InvalidCommand(f"command: no {{model}} in {command!r}; expected {PLACEHOLDERS}")
    for word in words:
        if word in _SHELL_WORDS:
            raise InvalidCommand(
                f"command: {word!r} is for a shell, and the command runs without one; "
                "write sh -c 'FIRST \"$1\" | SECOND' sh {model}, or a script"
            )


# one run -----------------------------------------------------------------------------------------------------


def run_command(arguments: Sequence[str], timeout_s: float) -> str:
    """What a command wrote to stdout, at most a mebibyte of it.

    It reads nothing from stdin and is the leader of a process group of its own, which is ended when time is out,
    when it writes without end, or when we are interrupted. What it left in the background on a normal end is its
    own business (the server of adb, the master connection of ssh).

    Raises CommandNotFound, or CommandFailed saying how it ended.
    """
    # files, since a pipe stays open as long as a child in the background has it
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        files = (output.fileno(), errors.fileno())
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except OSError as error:
            raise CommandNotFound(
                f"cannot start {arguments[0]!r}: {error.strerror}; expected a program on the PATH, or the path of an "
                "executable file"
            ) from None
        try:
            why = _wait(process, files, timeout_s)
        except BaseException:
            _end_group(process)
            raise
        if why:
            _end_group(process)
            raise CommandFailed(f"{why}{_last_line(files)}")
        if process.returncode:
            raise CommandFailed(f"{_ending(process.returncode)}{_last_line(files)}")
        return _text(files[0])


def _wait(process: subprocess.Popen[bytes], files: Sequence[int], timeout_s: float) -> str | None:
    """Why the process has to be killed, or None once it ended."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            return f"the command did not end within {timeout_s:g} s and was killed"
        if any(os.fstat(file).st_size > MOST_OUTPUT_BYTES for file in files):
            return f"the command wrote more than {MOST_OUTPUT_BYTES:,} bytes and was killed"
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(left_s, 0.1))
            return None


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group to end, so that a script can tidy up its device, and kill what is left of it.

    The leader is not waited for before, so that the group's number cannot be another's yet.
    """
    try:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        time.sleep(GRACE_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ending(status: int) -> str:
    return f"the command exited with status {status}" if status > 0 else f"the command was killed by signal {-status}"


def _text(file: int) -> str:
    return os.pread(file, MOST_OUTPUT_BYTES, 0).decode("utf-8", errors="replace")


def _last_line(files: Sequence[int]) -> str:
    """The last line of stderr, else of stdout, to end a message with."""
    for file, stream in reversed(list(zip(files, ("stdout", "stderr"), strict=True))):
        lines = _lines(_text(file))
        if lines:
            return f"; its last line on {stream}: {_quoted(lines[-1])}"
    return "; it wrote nothing"


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 160 else text[:157] + "...")


# what it printed ---------------------------------------------------------------------------------------------


def parse_latencies_ms(output: str) -> tuple[float, ...]:
    """The latencies in an output, in ms, one a run.

    A line `latency_UNIT: NUMBER` or `latency: NUMBER UNIT` (also with `=`) is a run; where there is none, a line
    `NUMBER` (ms) or `NUMBER UNIT` is. UNIT is s, ms, us or ns. Other lines are logs, as long as they cannot be
    mistaken: several numbers on a line, an unknown unit, or a label without a unit are refused.

    Raises CommandFailed saying what was got and what was expected.
    """
    lines = _lines(output)
    labelled = [(line, found) for line in lines if (found := _LABELLED.fullmatch(line))]
    if labelled:
        return tuple(_labelled_ms(line, *found.groups()) for line, found in labelled)
    runs_ms = tuple(latency_ms for line in lines if (latency_ms := _plain_ms(line)) is not None)
    if not runs_ms:
        got = f"its last line: {_quoted(lines[-1])}" if lines else "it printed nothing"
        raise CommandFailed(f"the command printed no latency ({got}); expected {EXPECTED}")
    return runs_ms


def _labelled_ms(line: str, suffix: str | None, value: str) -> float:
    found = _VALUE.fullmatch(value)
    if not found:
        raise CommandFailed(f"the command printed {_quoted(line)}: no number after the label; expected {EXPECTED}")
    number, unit = found.groups()
    units = {name for name in (suffix, unit) if name}
    if len(units) != 1:
        got = "no unit" if not units else "two units"
        raise CommandFailed(f"the command printed {_quoted(line)}: {got}; expected 'latency_ms: 12.3'")
    return _milliseconds(line, number, units.pop())


def _plain_ms(line: str) -> float | None:
    """The latency that a line consists of; None for a line of a log."""
    found = _VALUE.fullmatch(line)
    if found:
        return _milliseconds(line, found[1], found[2] or "ms")
    words = re.split(r"[\s,;|]+", line.strip(",;|"))
    if all(_VALUE.fullmatch(word) or word.lower() in UNITS_MS for word in words):
        raise CommandFailed(
            f"the command printed {_quoted(line)}: several numbers on one line; expected "
            f"{EXPECTED} (with a decimal point)"
        )
    return None


def _milliseconds(line: str, number: str, unit: str) -> float:
    if unit.lower() not in UNITS_MS:
        raise CommandFailed(
            f"the command printed {_quoted(line)}: unknown unit {unit!r}; expected s, ms, us or ns, or a number in ms"
        )
    latency_ms = float(number) * UNITS_MS[unit.lower()]
    if not math.isfinite(latency_ms) or latency_ms <= 0:
        raise CommandFailed(f"the command printed {_quoted(line)}: a latency is finite and above 0")
    return latency_ms
