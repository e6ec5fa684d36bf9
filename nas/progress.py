"""Progress bars: live on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from tqdm import tqdm

LOG_SECONDS = 10.0


class _Lines:
    """Turns what tqdm redraws in place into lines, which is all that a log can show."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        shown = text.strip("\r\n ")
        if shown:
            self._stream.write(shown + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(iterable: Any = None, **options: Any) -> tqdm[Any]:
    """`tqdm(iterable, **options)` on stderr; where that is no terminal, a line at the ends and every ten seconds."""
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, dynamic_ncols=True, **options)
    quiet = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, "ncols": 110}
    return tqdm(iterable, file=_Lines(sys.stderr), **(quiet | options))
