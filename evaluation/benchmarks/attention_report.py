"""This module makes tables and a plot from the rows of `scripts/benchmark_attention.py`."""

from collections.abc import Iterable
from pathlib import Path

from evaluation.benchmarks.measurements import markdown_table, measured_on, write_figure
from moc.files import write_whole

COLORS = {"fa2": "tab:orange", "cudnn": "tab:blue", "fa3": "tab:green", "fa4": "tab:red"}
SINGLE_PASSES = ("forward", "backward", "graph", "compiled")
STAGE_ORDER = (
    "descriptors", "routing", "index", "own shot", "text", "routed", "merge", "own shot, backward", "text, backward",
    "routed: delta", "routed: gather", "routed: dK, dV", "routed: dQ", "routed: sum dQ",
)  # fmt: skip


def _grouped(rows: Iterable[dict]) -> dict[tuple, dict]:
    """Returns rows of one case together: its fields, plus ms by pass and their sum."""
    out: dict[tuple, dict] = {}
    for row in rows:
        fields = {name: value for name, value in row.items() if name not in ("pass", "ms", "stages")}
        case = out.setdefault(tuple(sorted((name, str(value)) for name, value in fields.items())), {**fields, "ms": {}})
        case["ms"][row["pass"]] = row["ms"]
    for case in out.values():
        case["total"] = case["ms"]["forward"] + case["ms"]["backward"]
    return out


def _is_pack(case: dict) -> bool:
    return case.get("scenes", 1) > 1


def _dense(cases: list[dict], like: dict, impl: str) -> dict | None:
    same = ("shots", "heads", "single")
    return next((c for c in cases if c["impl"] == impl and all(c[n] == like[n] for n in same)), None)


def _case_line(case: dict, cases: list[dict]) -> list[object]:
    is_moc = case["impl"].startswith("moc-")
    own = _dense(cases, case, case["impl"].removeprefix("moc-"))
    fa2 = _dense(cases, case, "fa2")
    speedup = own["total"] / case["total"] if own and is_moc else None
    return [
        case["impl"], case["shots"], case["tokens"], case["heads"],
        f"{case['chunk_tokens']}, {case['top_k']}" if is_moc else "", case["inputs"] if is_moc else "",
        f"{case['ms']['forward']:.2f}", f"{case['ms']['backward']:.2f}", f"{case['total']:.2f}",
        f"{case['peak_bytes'] / 2**30:.2f}", f"{case['density']:.3f}" if is_moc else "",
        f"{1 / case['density']:.2f}" if is_moc else "", f"{speedup:.2f}" if speedup else "",
        f"{100 * speedup * case['density']:.0f} %" if speedup else "",
        f"{fa2['total'] / case['total']:.2f}" if fa2 else "",
        f"{1e3 * case['total'] / case['tokens']:.3f}",
    ]  # fmt: skip


def write_tables(rows: list[dict], path: Path) -> str:
    """Writes the rows as Markdown tables; returns the text."""
    cases = list(_grouped(rows).values())
    long = sorted(
        (c for c in cases if not c["single"] and not _is_pack(c)),
        key=lambda c: (c["heads"], c["shots"], -c["chunk_tokens"], c["impl"]),
    )
    head = [
        "impl", "shots", "tokens", "heads", "chunk, k", "inputs", "forward ms", "backward ms", "sum ms", "peak GiB",
        "density", "ideal x", "x over own kernel dense", "of ideal", "x over FA2", "us a token",
    ]  # fmt: skip
    sections = [
        "# Attention benchmark",
        f"{measured_on(rows)} bf16; a row has times and peak memory of one case. Forward times of MoC include routing "
        f"and index; ideal = 1 / density.{''.join(dict.fromkeys(row.get('note', '') for row in rows))}",
    ]
    if long:
        sections += [
            f"## Shots of {long[0]['grid']} tokens with {long[0]['text_tokens']} text tokens, global text of "
            f"{long[0]['global_text_tokens']}, head dim 128",
            markdown_table(head, [_case_line(case, cases) for case in long]),
        ]
    single = [c for c in cases if c["single"]]
    if single:
        sections += [
            "## The paper's single-shot case: 6.3k tokens, chunk 256, k 3, not causal, own chunk as anchor",
            markdown_table(
                ["impl", "tokens", "forward ms", "backward ms", "both from a graph ms", "both compiled ms", "density"],
                [_single_line(case) for case in single],
            ),
        ]
    short = [c for c in cases if _is_pack(c)]
    if short:
        sections += [
            "## Packs of short shots, 12 heads of 64, k 3: against dense attention within each scene",
            markdown_table(
                ["impl", "scenes", "shots", "grid", "tokens", "chunk", "forward ms", "backward ms", "sum ms", "density",
                 "of dense"],
                [_short_line(case, short) for case in short],
            ),
        ]  # fmt: skip
    staged = [row for row in rows if "stages" in row]
    if staged:
        sections += ["## Stages of MoC, 8 shots, ms", _stage_table(staged)]
    text = "\n\n".join(sections) + "\n"
    write_whole(path, text.encode())
    return text


def _single_line(case: dict) -> list[object]:
    times = (f"{case['ms'][name]:.3f}" if name in case["ms"] else "" for name in SINGLE_PASSES)
    return [case["impl"], case["tokens"], *times, f"{case['density']:.3f}"]


def _short_line(case: dict, cases: list[dict]) -> list[object]:
    dense = next(c for c in cases if c["impl"] == "fa2" and c["grid"] == case["grid"])
    return [
        case["impl"], case["scenes"], case["shots"], "x".join(map(str, case["grid"])), case["tokens"],
        case["chunk_tokens"], *(f"{case['ms'][name]:.2f}" for name in ("forward", "backward")), f"{case['total']:.2f}",
        f"{case['density']:.3f}", f"{case['total'] / dense['total']:.2f}",
    ]  # fmt: skip


def _stage_table(rows: list[dict]) -> str:
    forward = STAGE_ORDER[: STAGE_ORDER.index("own shot, backward")]
    lines = []
    for row in rows:
        case, times = (row["impl"], f"{row['chunk_tokens']}, {row['top_k']}", row["inputs"]), row["stages"]
        share = sum(times[stage] for stage in forward[:3]) / sum(times[stage] for stage in forward)
        lines.append([*case, *(f"{times[stage]:.2f}" for stage in STAGE_ORDER), f"{100 * share:.1f} %"])
    share_of = "descriptors, routing and index, of the forward"
    return markdown_table(["impl", "chunk, k", "inputs", *STAGE_ORDER, share_of], lines)


def write_plot(rows: list[dict], path: Path) -> None:
    """Plots forward plus backward against the number of shots, dense and MoC (figure 5 of arXiv 2508.21058)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = [
        c for c in _grouped(rows).values()
        if not c["single"] and not _is_pack(c) and (c["heads"], c["inputs"], c["chunk_tokens"]) == (12, "random", 1280)
    ]  # fmt: skip
    figure, axes = plt.subplots(figsize=(6, 4))
    for impl in sorted({case["impl"] for case in cases}):
        line = sorted((c["shots"], c["total"]) for c in cases if c["impl"] == impl and c["shots"] <= 16)
        style, colour = "-" if impl.startswith("moc-") else "--", COLORS[impl.removeprefix("moc-")]
        axes.plot(*zip(*line, strict=True), marker="o", label=impl, linestyle=style, color=colour)
    axes.set(xlabel="shots of 23k tokens", ylabel="forward + backward, ms", yscale="log", title=rows[0]["gpu"])
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small", handlelength=3)
    figure.tight_layout()
    write_figure(figure, path, dpi=120)
