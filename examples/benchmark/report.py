"""The results of a benchmark: the machine, medians and spread, tables in Markdown, pictures."""

import importlib.metadata
import io
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark.floor import Cost, Rates
from benchmark.studies import exponent
from benchmark.work import Sample
from minirlhf.io.files import atomic_write

Row = dict[str, Any]
PHASES = ("generate", "score", "passes", "update", "step", "iteration")
PACKAGES = ("numpy", "tokenizers", "safetensors", "transformers")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")
OUTLIER = 1.2  # times the shortest
LIBRARIES = {"onednn": "oneDNN", "default": "PyTorch's default"}


# ---- numbers --------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """Everything besides the code that the timings depend on."""
    info = _cpu_info()
    facts: dict[str, Any] = {
        "CPU": info.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in FLAGS if flag in info.get("flags", "").split()],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with its build, which the package's version leaves out
        **{name: version for name in PACKAGES if (version := _version(name))},
        "fp32 products": torch.get_float32_matmul_precision(),
        "preloaded": [Path(name).name for name in os.environ.get("LD_PRELOAD", "").replace(":", " ").split()],
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["GPU"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    return facts


def summarise(
    samples: Sequence[Sample], floors: Mapping[str, Mapping[str, float]] | None = None, new_tokens: int = 0
) -> list[Row]:
    """A row for each peer and phase: median, least, most, spread (most less least, over the median) and outliers.

    floors: the least seconds by peer and phase. new_tokens: sampled an iteration, for tokens a second. Outliers took
    more than OUTLIER times the shortest; memory is the most of all repeats.
    """
    rows = []
    for peer in dict.fromkeys(sample.peer for sample in samples):
        for phase in sorted({s.phase for s in samples if s.peer == peer}, key=_place):
            found = [s for s in samples if (s.peer, s.phase) == (peer, phase)]
            seconds = [s.seconds for s in found]
            median, peaks = statistics.median(seconds), [s.peak_mb for s in found if s.peak_mb is not None]
            floor = (floors or {}).get(peer, {}).get(phase)
            rows.append(
                {
                    "peer": peer,
                    "phase": phase,
                    "median s": median,
                    "min s": min(seconds),
                    "max s": max(seconds),
                    "spread": (max(seconds) - min(seconds)) / median,
                    "repeats": len(seconds),
                    "outliers": sum(s > OUTLIER * min(seconds) for s in seconds),
                    "new tokens/s": new_tokens / median if phase in ("generate", "iteration") and new_tokens else None,
                    "peak MB": max(peaks, default=None),
                    "floor s": floor,
                    "times the floor": median / floor if floor else None,
                }
            )
    return rows


def bounds(costs: Mapping[str, Sequence[Cost]], rates: Rates) -> list[Row]:
    """A row a phase: operations, bytes, the seconds that each would take alone, and the floor."""
    return [
        {
            "phase": phase,
            "GFLOP": sum(cost.flop for cost in costs[phase]) / 1e9,
            "GB": sum(cost.bytes for cost in costs[phase]) / 1e9,
            "arithmetic s": sum(cost.flop for cost in costs[phase]) / rates.flop,
            "memory s": sum(cost.bytes for cost in costs[phase]) / rates.bytes,
            "floor s": rates.seconds(costs[phase]),
        }
        for phase in sorted(costs, key=_place)
    ]


def ratios(rows: Sequence[Row], ours: Sequence[str]) -> list[Row]:
    """For each of our names and every other peer: our median over theirs by phase, and the same of memory.

    The shortest iterations are compared as well: other work on the machine lengthens them least.
    """
    medians, least = ({(row["peer"], row["phase"]): row[name] for row in rows} for name in ("median s", "min s"))
    peaks: dict[str, float] = {}
    for row in rows:
        peaks[row["peer"]] = max(peaks.get(row["peer"], 0.0), row["peak MB"] or 0.0)
    table = []
    for own in ours:
        for peer in dict.fromkeys(row["peer"] for row in rows if row["peer"] not in ours):
            shared = [p for p in PHASES if (own, p) in medians and (peer, p) in medians]
            memory = peaks[own] / peaks[peer] if peaks.get(own) and peaks[peer] else None
            whole = (least[own, "iteration"] / least[peer, "iteration"]) if "iteration" in shared else None
            table.append({"ours": own, "over": peer} | {p: medians[own, p] / medians[peer, p] for p in shared}
                         | {"shortest iteration": whole, "peak memory": memory})  # fmt: skip
    return table


def exponents(rows: Sequence[Row]) -> list[Row]:
    """The slopes of a scaling table in log-log: over all sizes, and between the last two."""
    found = []
    for over in dict.fromkeys(row["over"] for row in rows):
        part = [row for row in rows if row["over"] == over]
        sizes = [row[over] for row in part]
        for name in (n for n in part[0] if n.endswith(" s")):
            times = [row[name] for row in part]
            found.append({"over": over, "phase": name.removesuffix(" s"), "exponent": exponent(sizes, times),
                          "of the last two": exponent(sizes[-2:], times[-2:])})  # fmt: skip
    return found


# ---- Markdown -------------------------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of a result, as the benchmark writes it to results.json."""
    facts = ", ".join(f"{name} {_shown(value)}" for name, value in result["machine"].items() if value not in ([], None))
    parts = [f"`{result['command']}`, {result['date']}", facts]
    if "work" in result:
        parts.append("Work: " + ", ".join(f"{name} {_shown(value)}" for name, value in result["work"].items()))
    if "load" in result:
        parts.append(load_line(result["load"]))
    for peer, library in result.get("products by", {}).items():
        parts.append(f"fp32 products of {peer}: through {LIBRARIES[library]}")
    for precision, rates in result.get("rates", {}).items():
        parts.append(f"Measured rates, {precision}: matrix products {rates['flop'] / 1e9:.0f} GFLOP/s, memory "
                     f"{rates['bytes'] / 1e9:.1f} GB/s")  # fmt: skip
    for precision, rows in result.get("bounds", {}).items():
        parts += [f"The floor, {precision}:", table(rows)]
    titles = {
        "iteration": "Time and memory:",
        "ratios": "Our median over theirs:",
        "scaling": "Scaling (one epoch of update):",
        "exponents": "Exponents of the cost (1 is linear):",
        "ragged": "Ragged batches (one epoch of update):",
        "overhead": "Overhead of the default example with the starter weights:",
        "lora": "All weights trained, or adapters of LoRA:",
        "methods": "PPO, and methods without a value head, 32 prompts with 4 responses each; in as many steps:",
    }
    for name, title in titles.items():
        if result.get(name):
            parts += [title, table(result[name])]
    return "\n\n".join(parts) + "\n"


def load_line(turns: Sequence[Row]) -> str:
    """A sentence on whose load the machine had; turns: rows of `load`, as in results.json."""
    shared = [turn for turn in turns if turn["shared"]]
    gone = sum(turn["dropped"] for turn in turns)
    told = [turn["other cores"] for turn in turns if turn["other cores"] is not None]
    if not told:
        return "Load: the system does not say whether other work ran."
    verdict = f"**not its own in {len(shared)} of {len(turns)} turns**" if shared else "its own in all turns"
    return f"Load: {verdict}; other work took up to {max(told):.2f} cores. Turns that were repeated: {gone}."


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; columns in order of their first occurrence, empty ones left out."""
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if any(row.get(n) is not None for row in rows)]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_shown(row.get(name)) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A cell: floats with three significant digits, None as an empty cell."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


# ---- pictures -------------------------------------------------------------------------------------------------------


def draw_phases(rows: Sequence[Row], floors: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A bar a peer, and one a floor, of generation, scoring and step."""
    bars = {row["peer"]: {} for row in rows}  # type: dict[str, dict[str, float]]
    for row in rows:
        bars[row["peer"]][row["phase"]] = row["median s"]
    for precision, found in floors.items():
        bars[f"floor {precision}"] = {row["phase"]: row["floor s"] for row in found}
    drawing = figure((9, 1.2 + 0.45 * len(bars)))
    ax = drawing.subplots()
    left = [0.0] * len(bars)
    for phase, colour in (("generate", "tab:blue"), ("score", "tab:orange"), ("step", "tab:green")):
        widths = [times.get(phase, 0.0) for times in bars.values()]
        ax.barh(list(bars), widths, left=left, color=colour, label=phase)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    ax.invert_yaxis()
    ax.set(xlabel="seconds an iteration, medians")
    ax.grid(axis="x", alpha=0.3)
    ax.legend()
    _save(drawing, path)


def draw_scaling(rows: Sequence[Row], path: Path) -> None:
    """Seconds over batch and over new tokens in log-log, with a line of slope 1."""
    kinds = list(dict.fromkeys(row["over"] for row in rows))
    drawing = figure((5 * len(kinds), 4))
    for ax, over in zip(drawing.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        part = [row for row in rows if row["over"] == over]
        sizes = [row[over] for row in part]
        for name in (n for n in part[0] if n.endswith(" s")):
            ax.loglog(sizes, [row[name] for row in part], marker="o", label=name.removesuffix(" s"))
        top = max(part[-1][name] for name in part[-1] if name.endswith(" s"))
        ax.loglog(sizes, [top * size / sizes[-1] for size in sizes], "--", color="gray", label="linear")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
        ax.set(xlabel=over, ylabel="seconds", title=f"cost over {over}")
        ax.grid(alpha=0.3)
        ax.legend()
    _save(drawing, path)


def figure(size: tuple[float, float] = (9, 4)) -> Any:
    """An empty picture. Raises ImportError that names the extra if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install -e '.[examples]'") from error
    return Figure(figsize=size, layout="constrained")


def _save(drawing: Any, path: Path) -> None:
    picture = io.BytesIO()
    drawing.savefig(picture, dpi=110, format="png")
    atomic_write(path, picture.getvalue())


def _place(phase: str) -> tuple[int, str]:
    return (PHASES.index(phase) if phase in PHASES else len(PHASES), phase)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    """The first core's lines of /proc/cpuinfo; empty if the file does not exist."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
