"""Whose load the machine had during a turn, so that a turn beside other work does not count as ours."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
SHARED = 0.05  # of all cores busy with other work: more, and the load was not the turn's own


@dataclass(frozen=True)
class Load:
    """wall: seconds by the clock. own: CPU seconds of this process and its children; other: of everything else, time
    that a hypervisor took included, None if the system does not say."""

    wall: float
    own: float
    other: float | None

    @property
    def own_cores(self) -> float:
        """Cores that the turn kept busy, on average."""
        return self.own / self.wall

    @property
    def other_cores(self) -> float | None:
        """Cores that other work kept busy, on average."""
        return None if self.other is None else self.other / self.wall

    @property
    def shared(self) -> bool:
        """Whether other work took so much of the machine that the timing should not be trusted."""
        return self.other_cores is not None and self.other_cores > SHARED * (os.cpu_count() or 1)

    def __str__(self) -> str:
        other = "" if self.other_cores is None else f", other work {self.other_cores:.2f}"
        return f"{self.own_cores:.2f} cores busy{other}{': THE LOAD WAS NOT ITS OWN' if self.shared else ''}"


class Meter:
    """Made when a turn begins; `load()` is what happened since."""

    def __init__(self) -> None:
        self.start = self._read()

    def load(self) -> Load:
        (wall, own, busy), (wall_before, own_before, busy_before) = self._read(), self.start
        used = own - own_before
        other = None if busy is None or busy_before is None else max(0.0, busy - busy_before - used)
        return Load(max(wall - wall_before, 1e-9), used, other)

    @staticmethod
    def _read() -> tuple[float, float, float | None]:
        times = os.times()  # children count once they have ended
        own = times.user + times.system + times.children_user + times.children_system
        return time.perf_counter(), own, busy_seconds(STAT.read_text(encoding="utf-8")) if STAT.exists() else None


def busy_seconds(stat: str) -> float:
    """CPU seconds that all cores were busy since the start, from the text of /proc/stat (see proc(5))."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, stat.split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
