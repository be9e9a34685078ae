"""This module writes the record of films that are timed (scripts/benchmark_sampling.py) as a page."""

from typing import Any

from evaluation.benchmarks.measurements import markdown_table, measured_on


def rival(mode: str) -> str:
    """Returns the mode of dense attention that a mode is compared with: it has no cache, so that modes which differ in
    the cache alone share a rival."""
    return mode.partition("_")[0]


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the record as a Markdown page."""
    same = ("gpu", "shape", "film", "guidance_scale", "context_shots", "processes")
    rows = [row | {"shape": "{dim} x {num_layers}".format(**row["model"])} for row in rows]
    dense_rows = {
        (row["mode"], *(row[name] for name in same)): row
        for row in rows
        if row["impl"] == "dense" and not row["weights"]
    }
    lines = []
    for row in rows:
        against = dense_rows.get((rival(row["mode"]), *(row[name] for name in same)), {})
        times = [
            f"{against[name] / row[name]:.2f}" if name in against and name in row else ""
            for name in ("step_seconds", "film_seconds")
        ]
        lines.append([
            row["shape"], row["film"], row["tokens"], row["mode"], row["impl"], row["weights"] or "as computed",
            row["guidance_scale"], row["context_shots"] or "all", row["processes"], row.get("history", ""),
            row.get("step_seconds", row.get("problem")), times[0],
            row.get("film_seconds", ""), times[1],
            f"{row['timed_steps']} of {row['film_steps']}" if "timed_steps" in row else "",
            f"{row['outside']:.1%}" if "outside" in row else "",
            *(f"{row[name] / 2**30:.1f}" if name in row else "" for name in ("peak_bytes", "host_bytes")),
            f"{row['error']:.1%}" if "error" in row else "",
            str(row["commit"])[:7],
        ])  # fmt: skip
    columns = [
        "model", "film", "tokens", "mode", "attention", "weights", "guidance", "context", "GPUs", "history", "step s",
        "x over dense", "film s", "x over dense", "steps timed", "outside the model", "peak GiB", "host GiB", "error",
        "commit",
    ]  # fmt: skip
    about = (
        f"{measured_on(rows)} Random weights in the shapes of Wan2.1-T2V, 1536 x 30 (features x blocks) that of 1.3B "
        "and 5120 x 40 that of 14B; dense kernel "
        f"{', '.join(sorted({str(row['dense_kernel']) for row in rows}))}. A step is one of the longest stream, both "
        "sides of guidance; a film of 50 steps a shot is extrapolated from the steps timed; `decode` is one shot, and "
        "all of them by count; `error` is how far weights in fewer bytes, and products in fp8 where it says so, move "
        "the velocity of two short shots, relative to it. Made by scripts/benchmark_sampling.py."
    )
    return f"# Sampling films\n\n{about}\n\n{markdown_table(columns, lines)}\n"
