"""This module measures MoC attention against dense attention on one GPU, side by side in one run."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import moc
from evaluation.benchmarks.attention_report import write_plot, write_tables
from evaluation.benchmarks.measurements import header, put_row, read_rows
from evaluation.benchmarks.timing import check_gpu, median_ms
from moc.cost import attention_cost
from moc.errors import UserError
from moc.kernels import anchors, dense, sizes, triton_index

GRID, TEXT, GLOBAL_TEXT = (36, 20, 32), 64, 256
CHUNKS = [(1280, 5), (640, 10), (320, 20), (160, 40)]  # tokens of a chunk, and top_k of as many tokens in all
SHORT_TEXT, SHORT_GLOBAL_TEXT = 12, 30
SHORT = [(220, (3, 4, 6), 24), (28, (6, 8, 12), 96), (4, (11, 18, 20), 360)]  # scenes of 4 shots, grid, chunk tokens
HEAD_DIM = 128
KEY = (
    "impl", "shots", "heads", "head_dim", "chunk_tokens", "top_k", "inputs", "single", "scenes", "grid", "pass",
)  # fmt: skip


class Suite(StrEnum):
    """A suite is a set of cases that are measured together."""

    shots = "shots"
    chunks = "chunks"
    heads = "heads"
    single = "single"
    million = "million"
    short = "short"


class Impl(StrEnum):
    """This setting names a dense kernel."""

    fa2 = "fa2"
    cudnn = "cudnn"
    fa3 = "fa3"
    fa4 = "fa4"


@dataclass(frozen=True)
class AttentionBenchmarkConfig:
    """These settings say what to measure.

    suites: the sets of cases, namely number of shots, sizes of chunks, number of heads, a single short shot, a million
    tokens, packs of short shots.
    impls: the dense kernels to compare; null takes every one that is installed.
    output: the path of the files to write, without their endings.
    """

    suites: list[Suite] = field(default_factory=lambda: list(Suite))
    impls: list[Impl] | None = None
    output: str = "docs/benchmarks/attention"


@dataclass(frozen=True)
class Case:
    """A case is one stream and one way to attend over it; `impl` is a dense kernel's name or moc-<its name>."""

    impl: str
    shots: int
    heads: int = 12
    head_dim: int = HEAD_DIM
    chunk_tokens: int = 1280
    top_k: int = 5
    inputs: str = "random"
    single: bool = False
    scenes: int = 1
    grid: tuple[int, int, int] = GRID
    repeats: int = 5

    @property
    def is_moc(self) -> bool:
        return self.impl.startswith("moc-")

    @property
    def is_short(self) -> bool:
        return self.grid != GRID

    def layout(self) -> moc.ShotLayout:
        if self.single:
            return moc.ShotLayout.build([moc.Shot(77, (26, 12, 20))], 0, self.chunk_tokens).to("cuda")
        if self.is_short:
            shots = [moc.Shot(SHORT_TEXT, self.grid)] * self.shots
            scene = moc.ShotLayout.build(shots, SHORT_GLOBAL_TEXT, self.chunk_tokens)
            return moc.ShotLayout.pack([scene] * self.scenes).to("cuda")
        shots = [moc.Shot(TEXT, self.grid)] * self.shots
        return moc.ShotLayout.build(shots, GLOBAL_TEXT, self.chunk_tokens).to("cuda")

    def config(self) -> moc.MoCConfig:
        common = moc.MoCConfig(chunk_tokens=self.chunk_tokens, top_k=self.top_k)
        if self.single:
            return replace(common, causal=False, own_anchor=moc.OwnAnchor.chunk)
        if self.is_short:
            return replace(common, dense=not self.is_moc, text_anchor=moc.TextAnchor.global_and_own)
        return common

    @property
    def execution(self) -> moc.Execution:
        return moc.Execution(moc.Backend.triton, self.impl.removeprefix("moc-"))


def make_inputs(case: Case, layout: moc.ShotLayout) -> list[Tensor]:
    """Returns q, k, v of a case, bf16 [L, N, D]."""
    make = structured_inputs if case.inputs == "structured" else random_inputs
    return make(layout, case.heads, case.head_dim)


def random_inputs(layout: moc.ShotLayout, heads: int, head_dim: int) -> list[Tensor]:
    """Returns q, k, v of normal noise, bf16 [L, N, D]."""
    shape = (layout.num_tokens, heads, head_dim)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def structured_inputs(layout: moc.ShotLayout, heads: int, head_dim: int) -> list[Tensor]:
    """Returns queries and keys that share a smooth field over space and time, and one of three identities a shot."""
    q, k, v = random_inputs(layout, heads, head_dim)
    identities = torch.randn(3, heads, head_dim, device="cuda")
    for index, group in enumerate(g for g in layout.groups if g.grid is not None):
        coarse = torch.randn(1, heads * head_dim, 6, 4, 4, device="cuda")
        field = torch.nn.functional.interpolate(coarse, size=group.grid, mode="trilinear")
        field = field.flatten(2)[0].T.view(-1, heads, head_dim) + identities[index % 3]
        rows = slice(group.start + group.text_tokens, group.end)
        q[rows] += field.to(q.dtype)
        k[rows] += field.to(k.dtype)
    return [q, k, v]


def graph_ms(function: Callable[[], object]) -> float:
    """Returns the time of `function` replayed from a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay, 20)


def compiled_ms(case: Case, layout: moc.ShotLayout, qkv: list[Tensor], direction: Tensor) -> float:
    """Returns the time of forward and backward, compiled, with the CUDA graphs that torch.compile makes of them."""
    config, execution, leaves = case.config(), case.execution, [x.detach().requires_grad_() for x in qkv]
    attend = torch.compile(
        lambda q, k, v: moc.moc_attention(q, k, v, layout, config, backend=execution),
        mode="reduce-overhead",
        fullgraph=True,
    )

    def both() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        torch.autograd.grad(attend(*leaves), leaves, direction)

    return median_ms(both, 20)


def passes(case: Case, layout: moc.ShotLayout, qkv: list[Tensor], direction: Tensor) -> tuple[Callable, Callable]:
    """Returns forward() -> state, and backward(state). A dense kernel is called directly on one scene."""
    if case.is_moc or case.is_short:
        config, execution = case.config(), case.execution
        q, k, v = (x.detach().requires_grad_() for x in qkv)
        return (
            lambda: moc.moc_attention(q, k, v, layout, config, backend=execution),
            lambda out: torch.autograd.grad(out, (q, k, v), direction, retain_graph=True),
        )
    kernel = dense.choose(qkv[0], case.impl)
    return (lambda: kernel.forward(*qkv)), (lambda state: kernel.backward(direction, *qkv, *state))


def measure(case: Case) -> list[dict]:
    """Returns rows of one case: forward, backward, and for the short stream both from a graph."""
    torch.cuda.empty_cache()
    layout = case.layout()
    qkv = make_inputs(case, layout)
    direction = torch.randn_like(qkv[0])
    density = 1.0
    if case.is_moc:
        routes = moc.route(qkv[0], qkv[1], layout, case.config(), backend=case.execution)
        density = attention_cost(layout, case.config(), routes, case.heads, case.head_dim).density
        del routes
    forward, backward = passes(case, layout, qkv, direction)
    torch.cuda.reset_peak_memory_stats()
    state = forward()
    backward(state)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    times = {"forward": median_ms(forward, case.repeats), "backward": median_ms(lambda: backward(state), case.repeats)}
    if case.single:
        times["graph"] = graph_ms(lambda: _both(*passes(case, layout, qkv, direction)))
        if case.is_moc:
            times["compiled"] = compiled_ms(case, layout, qkv, direction)
    fields = {name: value for name, value in asdict(case).items() if name not in ("repeats", "single")}
    return [
        {**fields, "tokens": layout.num_tokens, "single": case.single, "pass": name, "ms": round(ms, 4),
         "peak_bytes": peak, "density": round(density, 5)}
        for name, ms in times.items()
    ]  # fmt: skip


def _both(forward: Callable, backward: Callable) -> None:
    backward(forward())


KERNEL_STAGES = {
    "means_kernel": "descriptors", "route_kernel": "routing", "bound_kernel": "routing", "list_kernel": "routing",
    "select_kernel": "routing",
    "forward_kernel": "routed", "merge_kernel": "merge", "delta_kernel": "routed: delta",
    "gather_kernel": "routed: gather", "dkv_kernel": "routed: dK, dV", "add_dq_kernel": "routed: sum dQ",
    "dq_kernel": "routed: dQ",
}  # fmt: skip


def stages(case: Case) -> dict[str, float]:
    """Returns milliseconds of each stage of one MoC case: own kernels by profiler, index and anchored attention by
    events."""
    layout, config = case.layout(), case.config()
    qkv = make_inputs(case, layout)
    direction = torch.randn_like(qkv[0])
    forward, backward = passes(case, layout, qkv, direction)
    backward(forward())
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        backward(forward())
        torch.cuda.synchronize()
    times = dict.fromkeys(KERNEL_STAGES.values(), 0.0)
    for event in profiler.key_averages():
        stage = KERNEL_STAGES.get(event.key)
        if stage:
            times[stage] += event.device_time_total / 1000
    q, k, v = (x.detach() for x in qkv)
    routes = moc.route(q, k, layout, config, backend=case.execution)
    tile = sizes.blocks_for(q, layout.chunk_tokens).tile
    times["index"] = median_ms(lambda: triton_index.build_lists(routes, layout.num_chunks, tile), 5)
    kernel, plan = dense.choose(q, case.execution.dense_kernel), anchors.anchor_plan(layout, config, layout.num_tokens)
    out, lse = anchors.forward(kernel, q, k, v, plan)
    own = [
        call._replace(text_start=0, text_end=0, later_start=0, later_end=0) if call.num_own else call
        for call in plan.calls
    ]
    for suffix, run in (
        ("", lambda plan: anchors.forward(kernel, q, k, v, plan)),
        (", backward", lambda plan: anchors.backward(kernel, direction, q, k, v, out, lse, plan)),
    ):
        # One dense call takes own shot and text together: text costs what it adds to the own shot's.
        times[f"own shot{suffix}"] = median_ms(partial(run, plan._replace(calls=own)), 5) if own else 0.0
        times[f"text{suffix}"] = median_ms(partial(run, plan), 5) - times[f"own shot{suffix}"]
    return {stage: round(ms, 4) for stage, ms in times.items()}


def cases(suites: Sequence[str], impls: Sequence[str]) -> list[Case]:
    """Returns everything to measure, each case once."""
    found: list[Case] = []
    for impl in impls:
        sparse = Case(f"moc-{impl}", 8)
        with_moc = impl != "fa2"  # FA2 is measured as a dense kernel only
        if "shots" in suites:
            for shots in (1, 2, 4, 8, 16):
                found.append(Case(impl, shots, repeats=1 if shots == 16 else 3))
                found += [replace(sparse, shots=shots)] * with_moc
        if "chunks" in suites and with_moc:
            found += [replace(sparse, chunk_tokens=chunk, top_k=k) for chunk, k in CHUNKS[1:]]
            found += [replace(sparse, inputs="structured", chunk_tokens=c, top_k=k) for c, k in (CHUNKS[0], CHUNKS[3])]
        if "heads" in suites and with_moc:
            found += [Case(impl, 8, heads=24, repeats=1), replace(sparse, heads=24)]
        if "single" in suites:
            single = Case(impl, 1, chunk_tokens=256, top_k=3, single=True, repeats=20)
            found += [single, *([replace(single, impl=f"moc-{impl}")] * with_moc)]
    if "short" in suites:
        for scenes, grid, chunk in SHORT:
            short = Case("fa2", 4, head_dim=64, chunk_tokens=chunk, top_k=3, scenes=scenes, grid=grid, repeats=20)
            found += [short, replace(short, impl="moc-fa2")]
    fastest = [impl for impl in impls if impl != "fa2"][-1:]
    if "million" in suites:
        found += [Case(f"moc-{impl}", 44, repeats=2) for impl in fastest]
    return list(dict.fromkeys(found))


def write_record(config: AttentionBenchmarkConfig) -> None:
    """Measures the cases and writes their record, tables and plot."""
    check_gpu()
    impls = config.impls or [impl for impl in Impl if dense.is_installed(impl)]
    output = Path(config.output)
    file = output.with_suffix(".json")
    head = header() | {"text_tokens": TEXT, "global_text_tokens": GLOBAL_TEXT, "dtype": "bfloat16"}
    others = {row["gpu"] for row in read_rows(file)} - {head["gpu"]}
    if others:
        raise UserError(f"{file} was measured on {', '.join(others)}; write to another output=PATH")
    todo = cases(config.suites, impls)
    for number, case in enumerate(todo, 1):
        rows = measure(case)
        print(
            f"[{number}/{len(todo)}] {case} " + ", ".join(f"{row['pass']} {row['ms']:.2f} ms" for row in rows),
            flush=True,
        )
        if case.is_moc and case.shots == 8 and case.heads == 12:
            rows[0]["stages"] = stages(case)
        for row in rows:
            record = put_row(file, row, KEY, head)
    print(write_tables(record, output.with_suffix(".md")))
    write_plot(record, output.with_suffix(".png"))
