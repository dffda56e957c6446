"""Progress bars with an estimate of the time left: tqdm on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

__all__ = ["Progress"]

QUIET_SECONDS = 30.0


class Progress:
    """Counts steps of one activity.

    Args:
        mode: "auto", "on" or "off". label: what is counted. total: how many. start: how many are done already.
    """

    def __init__(self, mode: str, label: str, total: int, start: int = 0):
        self.label, self.total, self.done, self.start = label, total, start, start
        self.began = self.told = time.monotonic()
        self.bar = None
        self.lines = False
        if mode == "on" or (mode == "auto" and sys.stderr.isatty()):
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=start, desc=label, unit="", dynamic_ncols=True, file=sys.stderr)
        else:
            self.lines = mode == "auto"

    def advance(self, count: int = 1, **facts: str) -> None:
        """`count` more are done; `facts` go beside the bar."""
        self.done += count
        if self.bar is not None:
            if facts:
                self.bar.set_postfix(facts, refresh=False)
            self.bar.update(count)
        elif self.lines and (time.monotonic() - self.told > QUIET_SECONDS):
            self._tell(facts)

    def _tell(self, facts: dict[str, str]) -> None:
        self.told = time.monotonic()
        here = self.done - self.start
        left = (self.told - self.began) / max(here, 1) * (self.total - self.done)
        tail = "".join(f", {name} {value}" for name, value in facts.items())
        sys.stderr.write(f"{self.label}: {self.done} of {self.total}, {left:.0f} s left{tail}\n")
        sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
