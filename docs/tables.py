"""Writes what the documents take from code and data: knobs, errors, variables, the README's measured figures.

`make docs` runs it; a test fails when a page is not what this makes of it.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import api

from fagen import env, errors, families

FOLDER = Path(__file__).parent


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells) + "\n"


def knobs() -> str:
    """A section a family: what may vary, and what removes a combination."""
    text = "# Knobs and constraints\n\nMade by `make docs` from the families' declarations. Do not edit.\n"
    for family in families.all_families():
        module = sys.modules[f"fagen.families.{family.name}"]
        rows = [
            (f"`{k.name}`", f"`{k.cpp}`" if k.cpp else "the template", ", ".join(map(str, k.choices)), k.doc)
            for k in family.knobs
        ]
        text += f"\n## {family.name}\n\n{(module.__doc__ or '').strip()}\n\n"
        text += (
            f"Template `templates/{family.template}`; {', '.join(family.dtypes)}; {family.size():,} combinations.\n\n"
        )
        text += _table(("knob", "in C++", "values", "what it decides"), rows)
        names = ", ".join(f"`{c.name}`" for c in family.constraints)
        text += f"\nConstraints, in the order in which they are asked: {names or 'none'}.\n"
        text += "`fagen tune --dry-run` counts what each of them removes from a problem's space.\n"
    return text


def reference() -> str:
    """Errors with their exit codes, and environment variables."""
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.FagenError)]
    rows = [(f"`{c.__name__}`", str(c.exit_code), " ".join((c.__doc__ or "").split())) for c in classes]
    text = "# Errors and variables\n\nMade by `make docs`. Do not edit.\n\n## Errors\n\n"
    text += "Every message is at most three lines: what happened, the numbers, what to do.\n\n"
    text += _table(("error", "exit code", "meaning"), rows)
    text += "\n## Environment variables\n\n"
    return text + _table(("variable", "meaning"), [(f"`{name}`", meaning) for name, meaning in env.VARIABLES.items()])


# ---- measured -------------------------------------------------------------------------------------------------------


Figures = dict[tuple[int, int, str], tuple[float, float]]  # by head dim, length and mask: ours and the peer's


def _results(name: str, pick: Callable[[dict[str, Any]], tuple[float, float]]) -> tuple[dict[str, Any], Figures]:
    """A file of benchmarks/, and what `pick` finds in its rows."""
    data = json.loads((FOLDER.parent / "benchmarks" / name).read_text())
    figures = {}
    for row in data["rows"]:
        key = row.get("key") or row["problem"]
        found = re.search(r"/d(\d+)/(\w+)/.*/q(\d+)-", key)
        assert found, key
        figures[int(found[1]), int(found[3]), found[2]] = pick(row)
    return data, figures


def _side_by_side(figures: Figures, peer: str) -> str:
    """A line a head dim and length."""
    lines = []
    for dim, length in dict.fromkeys((dim, length) for dim, length, _ in figures):
        line = [str(dim), f"{length // 1024}k" if length % 1024 == 0 else str(length)]
        for mask in ("none", "causal"):
            ours, theirs = figures[dim, length, mask]
            line += [f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}x"]
        lines.append(tuple(line))
    return _table(("head dim", "length", "full: fagen", peer, "ratio", "causal: fagen", peer, "ratio"), lines)


def _mean(figures: Figures) -> str:
    ratios = [ours / theirs for ours, theirs in figures.values()]
    mean = statistics.geometric_mean(ratios)
    return f"Geometric mean of the ratios {mean:.2f}x, from {min(ratios):.2f}x to {max(ratios):.2f}x"


def _versions(data: dict[str, Any], *tools: str) -> str:
    return ", ".join(f"{tool} {data['environment'][tool]}" for tool in tools)


def _where(data: dict[str, Any], *tools: str) -> str:
    return f"{_versions(data, *tools)};\n`{data['command']}`"


def _against_fa2(row: dict[str, Any]) -> tuple[float, float]:
    """TFLOP/s of both, in the bench's layout or in that of the script that was before it."""
    found = row.get("participants", row)
    return found["fagen"]["tflops"], found["fa2"]["tflops"]


def measured_gpu() -> str:
    data, figures = _results("h200_fa2_rows.json", _against_fa2)
    return (
        f"**`sm80_forward`, tuned, against PyTorch's FlashAttention 2 backend** on an {data['device']}, in TFLOP/s.\n"
        f"bf16, batch x length = 16384, heads x head dim = 2048. {_mean(figures)}\n"
        f"({_versions(data, 'torch', 'driver')});\n"
        "`fagen bench --problems benchmarks/problems/fa2_rows.toml --family sm80_forward --peers fa2`\n"
        "measures it anew.\n"
        f"\n{_side_by_side(figures, 'FA2')}"
    )


def _by_length(data: dict[str, Any]) -> tuple[str, str]:
    """Ours, and its ratio to the better peer: a table of head dims by length, and one of what stands alone."""
    grid: dict[str, dict[int, str]] = {}
    alone: list[tuple[str, ...]] = []
    for row in data["rows"]:
        ours = row["participants"]["fagen"]["tflops"]
        best = max(p["tflops"] for name, p in row["participants"].items() if name != "fagen" and p["outcome"] == "ok")
        cell = f"{ours:.0f} ({ours / best:.2f}x)"
        if re.match(r"d\d", row["series"]):
            grid.setdefault(row["series"], {})[row["length"]] = cell
        else:
            alone.append((row["name"], cell))
    lengths = sorted({length for cells in grid.values() for length in cells})
    table = _table(
        ("head dim, mask", *map(str, lengths)),
        [(name, *(cells.get(length, "") for length in lengths)) for name, cells in grid.items()],
    )
    return table, _table(("layer", "TFLOP/s"), alone)


def _peers(data: dict[str, Any]) -> str:
    names = {"cudnn": f"cuDNN {int(data['peers']['cudnn']['version']) / 1e4:.2f}", "fa3": "FlashAttention 3"}
    return " and ".join(names[peer] for peer in sorted(data["peers"]))


def measured_hopper() -> str:
    data = json.loads((FOLDER.parent / "benchmarks" / "h200_peers.json").read_text())
    table, alone = _by_length(data)
    s, limit, peers = data["summary"], data["limit"]["tflops"], _peers(data)
    mean, worst = s["geometric_mean"], s["worst"]["ratio"]
    return (
        f"**`fagen.attention` against {peers}** on an {data['device']}, in TFLOP/s, and as\n"
        "a ratio to the better of them in the same run. bf16, batch x length = 16384, heads x head dim = 2048.\n"
        f"Geometric mean {mean:.3f}x over {s['compared']} rows, ahead on {s['ahead']}, worst {worst:.2f}x;\n"
        f"an 8192-cubed matrix product reaches {limit:.0f} TFLOP/s in the same run\n"
        f"({_where(data, 'torch', 'driver')}).\n"
        f"`fagen bench --suite peers` measures it anew.\n\n{table}\n{alone}\n"
        f"{_untuned('h200_random.json', 'fagen bench --suite random --seed 1')}\n"
        "![TFLOP/s by length](docs/img/forward.svg)\n"
    )


def _untuned(name: str, command: str) -> str:
    data = json.loads((FOLDER.parent / "benchmarks" / name).read_text())
    s = data["summary"]
    return (
        f"Problems that nobody tuned (`{command}`: odd head dims, lengths and groups of\n"
        f"heads), on an {data['device']}: {s['geometric_mean']:.2f}x the better of {_peers(data)}"
        f" over {s['compared']} rows,\nahead on {s['ahead']}, worst {s['worst']['ratio']:.2f}x.\n"
    )


def measured_gradients() -> str:
    data = json.loads((FOLDER.parent / "benchmarks" / "h200_backward_rows.json").read_text())
    table, alone = _by_length(data)
    s = data["summary"]
    return (
        f"**Gradients, `sm90_backward`, against {_peers(data)}** on an {data['device']}, in TFLOP/s of kernel time,\n"
        "and as a ratio to the better of them in the same run. bf16, batch x length = 16384, heads x head dim = 2048.\n"
        f"Geometric mean {s['geometric_mean']:.3f}x over {s['compared']} rows, ahead on {s['ahead']},"
        f" worst {s['worst']['ratio']:.2f}x\n({_where(data, 'torch', 'driver')}).\n\n{table}\n{alone}\n"
        f"{_untuned('h200_random_backward.json', 'fagen bench --op backward --suite random --seed 1')}\n"
        "![TFLOP/s of the gradients by length](docs/img/backward.svg)\n"
    )


def measured_fp8() -> str:
    """Ours, and its ratios to FlashAttention 3's fp8 and to our own 16 bits."""
    data = json.loads((FOLDER.parent / "benchmarks" / "h100_fp8.json").read_text())
    grid: dict[str, dict[int, str]] = {}
    ratios: dict[str, list[float]] = {"fa3": [], "fagen_16_bits": []}
    for row in data["rows"]:
        speeds = {name: p["tflops"] for name, p in row["participants"].items() if p["outcome"] == "ok"}
        each = [speeds["fagen"] / speeds[peer] for peer in ratios]
        for found, ratio in zip(ratios.values(), each, strict=True):
            found.append(ratio)
        cell = f"{speeds['fagen']:.0f} ({' / '.join(f'{ratio:.2f}' for ratio in each)}x)"
        grid.setdefault(row["series"].removeprefix("fp8 "), {})[row["length"]] = cell
    lengths = sorted({length for cells in grid.values() for length in cells})
    table = _table(
        ("head dim, mask", *map(str, lengths)),
        [(name, *(cells.get(length, "") for length in lengths)) for name, cells in grid.items()],
    )
    of_fa3, of_ours = (statistics.geometric_mean(found) for found in ratios.values())
    return (
        f"**fp8, `sm90_forward_fp8`** on an {data['device']}, in TFLOP/s, and as ratios to FlashAttention 3's fp8 and\n"
        f"to our own 16 bits in the same run: {of_fa3:.3f}x and {of_ours:.2f}x in the mean of 36 rows.\n"
        "batch x length = 16384, heads x head dim = 2048, e4m3 with a scale a head, bf16 out\n"
        f"({_where(data, 'torch', 'driver')}).\n\n{table}"
    )


def measured_decode() -> str:
    """A line a step, a column a kind of cache."""
    data = json.loads((FOLDER.parent / "benchmarks" / "h100_decode.json").read_text())
    grid: dict[str, dict[str, str]] = {}
    for row in data["rows"]:
        found = re.fullmatch(r"decode (?:(page\d+|fp8) )?(b\d+ .*)", row["name"])
        if found is None:
            continue
        rates = {name: p["gbps"] for name, p in row["participants"].items() if p["outcome"] == "ok"}
        ours = rates.pop("fagen")
        ratio = f" ({ours / max(rates.values()):.2f}x)" if rates else ""
        grid.setdefault(found[2], {})[found[1] or "contiguous"] = f"{ours:.0f}{ratio}"
    kinds = ("contiguous", "page64", "page16", "page1", "fp8")
    heads = tuple(kind.replace("page", "pages of ") for kind in kinds)
    table = _table(("step", *heads), [(name, *(cells.get(kind, "") for kind in kinds)) for name, cells in grid.items()])
    s, limit = data["summary"], data["limit"]["read_gbps"]
    return (
        f"**A step of decoding, `fagen.flash_attn_with_kvcache`, against {_peers(data)}** on an {data['device']},\n"
        "in GB/s of the cache, L2 cold, in a graph, and as a ratio to the better of them that takes such a cache.\n"
        f"Geometric mean {s['geometric_mean']:.3f}x over {s['compared']} rows, ahead on {s['ahead']},"
        f" worst {s['worst']['ratio']:.2f}x;\n"
        f"PyTorch's sum reads {limit:.0f} GB/s in the same run ({_where(data, 'torch', 'driver')}).\n\n{table}\n"
        "![GB/s of steps of decoding](docs/img/decode.svg)\n"
    )


def measured_masks() -> str:
    """Ours over each peer, mask by mask."""
    data = json.loads((FOLDER.parent / "benchmarks" / "h200_masks.json").read_text())
    names = {"fa3": "FlashAttention 3", "flex": "FlexAttention"}

    def against(row: dict[str, Any], peer: str) -> str:
        ours, other = (row["participants"].get(name, {}).get("tflops") for name in ("fagen", peer))
        return f"{other:.0f} ({ours / other:.2f}x)" if other else "–"

    table = _table(
        ("mask", "fagen", *(names[peer] for peer in data["peers"])),
        [
            (row["name"], f"{row['participants']['fagen']['tflops']:.0f}", *(against(row, p) for p in data["peers"]))
            for row in data["rows"]
        ],
    )
    return (
        f"**Masks**, on an {data['device']}, in TFLOP/s of the cells that are seen, and ours as a ratio to each:\n"
        "a window of 1024, eight packed documents of unequal lengths (FlashAttention 3: varlen), a prefix.\n"
        f"d128, 16k tokens ({_where(data, 'torch', 'driver')}).\n\n{table}"
    )


def measured_cpu() -> str:
    data, figures = _results("cpu_vs_sdpa.json", lambda row: (row["gflops_best"], row["gflops_sdpa"]))
    device, default = data["environment"]["device"], data["geometric_mean"]["default_over_sdpa"]
    return (
        f"**`cpu_forward` against PyTorch's SDPA** on {data['threads']} cores of an {device}, in GFLOP/s.\n"
        "float32, batch 1, 8 heads; the fastest of the family's default and its few first guesses.\n"
        f"{_mean(figures)}; {default:.2f}x for the default\nalone ({_where(data, 'torch')}).\n\n"
        f"{_side_by_side(figures, 'SDPA')}"
    )


def measured_ablation(data: dict[str, Any]) -> str:
    """The steps of `fagen ablation fa1-fa2-fa3`, what each gains, and their speeds."""
    from fagen.ablation import report

    return (
        f"## {data['title']}\n\nOn an {data['device']}, bf16, batch x length = 16384, heads x head dim = 2048\n"
        f"({_where(data, 'torch', 'driver')}).\n\n{report.markdown(data)}\n"
        "![TFLOP/s from step to step](img/ablation.svg)\n"
    )


def ablation() -> str:
    """The page with its measured figures, once there are some."""
    path = FOLDER.parent / "benchmarks" / "h200_ablation.json"
    text = measured_ablation(json.loads(path.read_text())) if path.is_file() else "Not measured on a GPU yet.\n"
    return _filled(FOLDER / "ablation.md", text)


def readme() -> str:
    """The README with its measured figures filled in."""
    parts = (
        measured_gpu(), measured_hopper(), measured_gradients(), measured_fp8(), measured_decode(), measured_masks(),
        measured_cpu(),
    )  # fmt: skip
    return _filled(FOLDER.parent / "README.md", "\n".join(parts))


def _filled(page: Path, text: str) -> str:
    begin, end = "<!-- measured: begin -->\n", "<!-- measured: end -->"
    before, _, rest = page.read_text().partition(begin)
    return f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


METHODS = {
    "guided": "as a run: the default, then the model",
    "guided-cold": "the model from the first trial on",
    "guided-ahead": "the same with 14 compilers, so that most are chosen ahead of what they could know",
    "guesses-3": "three of the family's guesses, then the model",
    "guesses-all": "all of the family's guesses, then the model",
    "cost-alone": "the cost model's order, nothing learned",
    "no-cost": "the model without the cost model",
    "tpe": "Optuna's TPE",
    "random": "chance",
}  # what benchmarks/search_peers.py calls them; others are Kernel Tuner's strategies
KINDS = {
    "sampled": "Random legal configs of today's whole space",
    "restricted": "Every legal config of a few knobs' values, of earlier knobs",
}


def _trials(found: dict[str, Any]) -> str:
    """Median and p90."""
    return " · ".join("–" if v is None else f"{v:.0f}" for v in (found["median"], found["p90"]))


def _regret(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _methods(pooled: dict[str, Any]) -> str:
    rows = []
    for name, found in pooled.items():
        regrets = [_regret(found[f"regret {count}"]["p90"]) for count in (20, 40, 80, 160)]
        what = METHODS.get(name, "Kernel Tuner")
        mean = f"{found['1%']['mean']:.1f}"
        rows.append((f"`{name}`: {what}", _trials(found["2%"]), _trials(found["1%"]), mean, *regrets))
    head = ("method", "to 2 %", "to 1 %", "mean to 1 %", "p90 regret after 20", "40", "80", "160")
    return _table(head, rows)


def _spaces(spaces: list[dict[str, Any]], public: str) -> str:
    rows = []
    for space in spaces:
        ours, theirs = space["methods"]["guided-cold"], space["methods"][public]
        rows.append(
            (space["key"].removeprefix("forward/"), space["device"].removeprefix("NVIDIA "), f"{space['configs']}",
             f"{space['legal']}", _trials(ours["2%"]), _trials(ours["1%"]), _regret(ours["regret 40"]["p90"]),
             _trials(theirs["1%"]), f"{theirs['1%']['mean'] / ours['1%']['mean']:.1f}")
        )  # fmt: skip
    head = (
        "problem",
        "on",
        "configs",
        "legal",
        "to 2 %",
        "to 1 %",
        "p90 regret after 40",
        f"`{public}` to 1 %",
        "times",
    )
    return _table(head, rows)


def search() -> str:
    """The page with its figures filled in: what benchmarks/search_peers.py wrote."""
    begin, end = "<!-- simulated: begin -->\n", "<!-- simulated: end -->"
    before, _, rest = (FOLDER / "search.md").read_text().partition(begin)
    data = json.loads((FOLDER.parent / "benchmarks" / "search_peers.json").read_text())
    fewer = ", ".join(f"`{name}` {count}" for name, count in data["fewer"].items() if count < data["seeds"])
    text = f"`{data['command']}`, {data['seeds']} seeds{f' ({fewer})' if fewer else ''}, "
    text += f"{', '.join(f'{name} {version}' for name, version in data['versions'].items())}.\n\n"
    for kind, about in KINDS.items():
        if kind not in data["pooled"]:
            continue
        spaces = [space for space in data["spaces"] if space["kind"] == kind]
        against = data["against"][kind]
        text += f"{about}, {len(spaces)} spaces together:\n\n{_methods(data['pooled'][kind])}\n"
        text += (
            f"Each by itself, `guided-cold` beside the best public one of the table, `{against['best public']}`, which "
        )
        median = against["times the median"]
        text += f"takes {against['times the mean']:.1f} times as many trials to 1 % in the mean"
        text += f", {median:.1f} in the median" if median else ""
        text += f":\n\n{_spaces(spaces, against['best public'])}\n"
    return f"{before}{begin}\n{text}{end}{rest.partition(end)[2]}"


PAGES = {
    "search.md": search, "ablation.md": ablation, "knobs.md": knobs, "reference.md": reference, "api.md": api.page,
    "../README.md": readme,
}  # fmt: skip

if __name__ == "__main__":
    for file, make in PAGES.items():
        (FOLDER / file).write_text(make())
