"""The benchmark: what it counts and compares, its files and its messages, on tiny sizes; no test depends on speed."""

import json
import mmap
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from fmaq import Accumulator, kernels
from fmaq.bench import conv, costs, gemm, networks, profile, timing
from fmaq.bench.instructions import Count, Loop, count, inner_loops, launched
from fmaq.bench.machine import load_average, vector_rate, warning
from fmaq.bench.rows import Case, Report, Row, Unavailable
from fmaq.bench.run import run, select
from fmaq.bench.tables import comparison_table, differences, report_table, summary
from fmaq.cli import main
from fmaq.training.progress import Bars
from huggingface_cases import tiny

ROW = Row(
    *("gemm", "8×8×8", "float32"),
    target=2.0,
    macs=512,
    value=1.5,
    seconds=3e-6,
    against_seconds=2e-6,
    quartiles=(1.4, 1.6),
    instructions=4.0,
    moves=0.75,
    bound=20.0,
)
MACHINE = {"processor": "some", "threads": 1, "target": "avx2", "fmaq": "0.1.0", "commit": "0123456789abcdef+"}


def text_of(table: Table) -> str:
    console = Console(width=250)
    with console.capture() as caught:
        console.print(table)
    return caught.get()


# --- Instructions -----------------------------------------------------------------------------------------------------

LOOPS = """\
store:
.LBB1_1:
\tvmovups\t(%rdi), %zmm0
\taddq\t$1, %rax
\tcmpq\t%rcx, %rax
\tjl\t.LBB1_1
tile:
\tvxorps\t%xmm5, %xmm5, %xmm5
.LBB0_3:
\tcmpq\t%rcx, %r10
\tjge\t.LBB0_9
.LBB0_7:
\tvbroadcastss\t-8(%rdi,%r15), %zmm21
\tvmovups\t-64(%rsi,%r15,8), %zmm25
\tvmulps\t%zmm25, %zmm21, %zmm27
\tvandps\t%zmm2, %zmm27, %zmm27
\tvfmadd213ps\t%zmm13, %zmm3, %zmm27
\tvandps\t%zmm2, %zmm27, %zmm13
\tincq\t%rbx
\taddq\t$16, %r15
\tcmpq\t%r14, %rbx
\tjl\t.LBB0_7
\tjmp\t.LBB0_3
.LBB0_8:
\tvbroadcastss\t%xmm1, %zmm21
\tvmovaps\t%zmm1, %zmm2 {%k1}
\tvmulps\t(%rsi), %zmm21, %zmm27
\tvcmpltps\t%zmm1, %zmm2, %k1
\taddq\t$2, %rbx
\tcmpq\t%r14, %rbx
\tjl\t.LBB0_8
.LBB0_9:
\tretq
"""


def test_inner_loops_are_the_blocks_that_jump_to_themselves() -> None:
    assert inner_loops(LOOPS) == [Loop(computing=4, moving=2, steps=1), Loop(computing=4, moving=0, steps=2)]


def test_inner_loops_of_sse() -> None:
    text = (
        "tile:\n.LBB0_5:\n\tmovaps\t%xmm1, %xmm0\n\tmulpd\t%xmm9, %xmm0\n\tmovlhps\t%xmm1, %xmm1\n"
        "\tdecq\t%r8\n\tcmpq\t$0, %r8\n\tjne\t.LBB0_5\n"
    )
    assert inner_loops(text) == [Loop(computing=2, moving=1, steps=1)]


def test_no_loops_without_a_tile() -> None:
    assert inner_loops("run:\n.LBB0_1:\n\tvmulps\t%zmm1, %zmm2, %zmm2\n\tjne\t.LBB0_1\n") == []


@pytest.mark.parametrize("name", [t.name for t in kernels.available_targets() if t.name in ("avx512", "avx2")])
def test_instructions_of_known_steps(name: str) -> None:
    a = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.05

    def counts(acc: Accumulator) -> tuple[Count | None, Count | None]:
        kernel = launched(lambda: kernels.matmul(a, a, acc))[-1]
        return count(kernel.gemm, is_checked=False), count(kernel.gemm, is_checked=True)

    with kernels.use_target(name) as target:
        paper, checked = counts(Accumulator.paper12)
        exact, _ = counts(Accumulator("M7E4b10"))
    assert paper is not None and checked is not None and exact is not None
    assert paper.computing == 4  # multiply, and, fused multiply-add, and
    assert exact.computing == 2  # fused multiply-add, and
    assert checked.computing >= paper.computing
    assert paper.lanes == target.lanes(4) and paper.moving > 0


def test_count_says_nothing_of_other_processors() -> None:
    a = torch.ones(1, 8, 8)
    kernel = launched(lambda: kernels.matmul(a, a, Accumulator.paper12))[-1]
    elsewhere = type(kernel.gemm)(
        kernel.gemm.arithmetic, 16, replace(kernel.gemm.target, architecture="aarch64"), kernel.gemm.tile
    )
    assert count(elsewhere, is_checked=False) is None


def test_launched_restores_what_it_watches_through() -> None:
    from fmaq.kernels import products

    before = products.kernel
    with pytest.raises(RuntimeError, match="stop"):
        launched(lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert products.kernel is before


def test_bound_is_lanes_times_rate_by_instructions() -> None:
    assert Count(computing=4.0, moving=1.0, lanes=16).bound(5e9) == 20.0
    assert vector_rate(kernels.current_target()) > 0


# --- Timing -----------------------------------------------------------------------------------------------------------


class Clock:
    """A clock that only work moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.order = 0.0, ""
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, *durations: float) -> Callable[[], None]:
        """An operation that takes these seconds, one after another, the last for ever."""
        left = list(durations)

        def run() -> None:
            self.order += name
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_compare_alternates_and_takes_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    ours = clock.work("o", 9.0, 3.0, 3.0, 30.0, 3.0)
    found = timing.compare(ours, clock.work("t", 1.0), rounds=3, least=0.5)
    assert clock.order == "oott" + "ot" * 3
    assert (found.ours, found.theirs, found.ratio) == (3.0, 1.0, 3.0)
    assert found.quartiles == (3.0, 16.5)


def test_compare_repeats_the_quick_and_cuts_rounds_of_the_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timing.compare(clock.work("o", 0.25), clock.work("t", 0.5), rounds=1, least=1.0)
    assert clock.order == "oott" + "oooott"
    clock.order = ""
    timing.compare(clock.work("o", 60.0), clock.work("t", 1.0), rounds=9)
    assert clock.order == "oott" + "ot" * 3


# --- Rows and files ---------------------------------------------------------------------------------------------------


def test_rows_know_their_rates_and_targets() -> None:
    assert ROW.is_met is True and replace(ROW, value=2.5).is_met is False
    assert replace(ROW, at_least=True).is_met is False and replace(ROW, target=None).is_met is None
    assert ROW.rate == pytest.approx(512 / 3e3) and ROW.against_rate == pytest.approx(512 / 2e3)
    assert ROW.least == pytest.approx(512 / 2e3 / 20.0)
    assert replace(ROW, macs=None).rate is None and replace(ROW, bound=None).least is None


def test_report_round_trip(tmp_path: Path) -> None:
    rows = [ROW, Row("networks", "a", "b", skipped="not here"), Row("memory", "c", "d", 64.0, unit="MiB", value=0.0)]
    report = Report(MACHINE, rows, is_complete=True)
    report.save(tmp_path / "deep" / "out.json")
    assert Report.load(tmp_path / "deep" / "out.json") == report


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read .*x.json: No such file"),
        ("{", "x.json is not JSON"),
        ("[1]", "x.json is not the result of a benchmark; give a file that `fmaq bench --json` wrote"),
        ('{"kind": "fmaq bench"}', "x.json is of another version"),
        (json.dumps({"kind": "fmaq bench", "machine": {}, "is_complete": True, "rows": [{"speed": 1}]}), "keys speed"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=expected):
        Report.load(tmp_path / "x.json")


def test_report_table_and_summary() -> None:
    report = Report(
        MACHINE, [ROW, replace(ROW, work="9×9×9", value=3.0), Row("conv", "x", "y", skipped="no such file")]
    )
    text = text_of(report_table(report))
    assert "1.50×" in text and "≤ 2.00×" in text and "met" in text and "missed" in text and "skipped" in text
    assert summary(report) == ["1 of 2 targets met", "skipped: x, y: no such file"]


def test_comparison_shows_the_change_and_what_only_one_has() -> None:
    faster = replace(ROW, value=1.2, quartiles=(1.1, 1.3))
    old = Report(MACHINE, [ROW, replace(ROW, case="gone")], is_complete=True)
    new = Report(MACHINE | {"threads": 2}, [faster, replace(ROW, case="fresh"), replace(ROW, case="skips", value=None)])
    lines = text_of(comparison_table(old, new)).splitlines()
    found = {name: next(line for line in lines if name in line) for name in ("float32", "gone", "fresh", "skips")}
    assert "-20 %" in found["float32"] and "1.50×" in found["float32"] and "1.20×" in found["float32"]
    assert "–" in found["gone"] and "–" in found["fresh"] and "skipped" in found["skips"]
    assert differences(old, new) == ["threads differs: 1 and 2", "the new run was interrupted"]


def test_a_change_within_the_spread_is_not_coloured() -> None:
    def styles(new: Row) -> set[str]:
        table = comparison_table(Report(MACHINE, [ROW]), Report(MACHINE, [new]))
        return {str(cell.style) for cell in table.columns[4].cells}

    assert styles(replace(ROW, value=1.55, quartiles=(1.5, 1.7))) == {"dim"}
    assert styles(replace(ROW, value=1.9, quartiles=(1.8, 2.0))) == {"red"}
    assert styles(replace(ROW, value=1.1, quartiles=(1.0, 1.2))) == {"green"}
    assert styles(replace(ROW, value=1.9, quartiles=(1.8, 2.0), at_least=True)) == {"green"}


# --- Cases ------------------------------------------------------------------------------------------------------------


def quick(case: Case) -> Row:
    return case.run(rounds=1)


def test_gemm_cases_measure_every_kind() -> None:
    cases = [case for case in gemm.cases((16,)) if case.row.work == "16×16×16"]
    rows = [quick(case) for case in cases]
    assert len(rows) == len(gemm.KINDS) + len(gemm.IDEAS) + 2
    assert all(row.value is not None and row.value > 0 for row in rows if row.skipped is None)
    assert all(row.target is None for row in rows), "targets are for 256³ and more"
    plain = {"M5E4b10, M5E4b12", "M5E4b10h, M5E4b12h", "I16f8, I16f8"}
    assert {row.against for row in rows} == {"torch float32", "1 thread", "plain forward"} | plain
    if kernels.current_target().architecture == "x86_64":
        assert all(row.instructions and row.bound for row in rows if row.against != "1 thread")


def test_gemm_targets_are_those_of_the_sizes_measured() -> None:
    targets = {(case.row.work, case.row.case): case.row.target for case in gemm.cases((128, 256))}
    name = "float32, no saturation possible"
    assert targets["256×256×256", name] == 1.9 and targets["128×128×128", name] is None
    assert targets["1×1024×1024", "linear, the weight frozen"] == 3.0
    half_unit = 1.1 if kernels.current_target().name == "avx512" else 1.3
    assert targets["256×256×256", "half-unit"] == half_unit and targets["128×128×128", "half-unit"] is None
    with kernels.use_target("sse2" if kernels.current_target().architecture == "x86_64" else "neon"):
        assert dict((case.row.case, case.row.target) for case in gemm.cases((256,)))["half-unit"] == 1.3


def test_checked_operands_saturate_by_the_bounds_and_the_others_do_not() -> None:
    limit = Accumulator.paper12.format.max
    for make, is_possible in ((gemm._small, False), (gemm._large, True)):
        a = make(64)[0]
        norms = a.view(64, 4, 16).norm(dim=2)
        assert bool((norms.min() ** 2 > limit) if is_possible else (norms.max() ** 2 < limit))


def test_conv_cases() -> None:
    shapes = (conv.Shape("3×3", 4, 2, 3, 3, 1, 3.0, images=1), conv.Shape("depthwise", 4, 2, 2, 3, 2, 4.0, images=1))
    rows = [quick(case) for case in conv.cases(shapes)]
    assert [row.macs for row in rows] == [16 * 3 * 2 * 9, 16 * 2 * 9]
    assert all(row.value and row.value > 0 for row in rows)
    assert [shape.size for shape in conv.SHAPES if shape.name == "3×3"] == [56, 28, 14, 7]


def test_memory_and_start_run_in_their_own_processes() -> None:
    if not costs.CLEAR.exists():
        pytest.skip("the peak of a process's memory is read from Linux's /proc")
    memory = quick(costs.memory_cases(size=64)[0])
    assert memory.skipped is None and memory.value is not None and 0 <= memory.value < 64 and memory.unit == "MiB"
    first, imported = (quick(case) for case in costs.start_cases())
    assert first.value and imported.value and first.unit == imported.unit == "s"


def test_extra_memory_counts_what_a_product_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    if not costs.CLEAR.exists():
        pytest.skip("the peak of a process's memory is read from Linux's /proc")
    kept = []

    def wasteful(a: torch.Tensor, b: torch.Tensor, acc: Accumulator) -> torch.Tensor:
        pages = mmap.mmap(-1, 8 << 20)  # new ones, whatever the heap has free
        pages[:: mmap.PAGESIZE] = b"\1" * (len(pages) // mmap.PAGESIZE)
        kept.append(pages)
        return torch.ones_like(a)

    monkeypatch.setattr(kernels, "matmul", wasteful)
    assert 7 < costs.extra_memory(Accumulator.paper12, 64) < 12


def test_a_process_that_fails_is_a_reason() -> None:
    with pytest.raises(Unavailable, match="its process failed: ValueError: oh no"):
        costs._in_new_process("raise ValueError('oh no')")


@pytest.fixture
def small_network(tmp_path: Path) -> networks.Network:
    (tmp_path / "small.yaml").write_text(
        "name: small\ntask: classification\ndata: {kind: digits, limit: 8}\n"
        "model: {callable: 'fmaq.recipes.residual_cnn:residual_cnn', arguments: {width: 4}}\n"
    )
    return networks.Network("small", str(tmp_path / "small.yaml"), 3.0, 4)


def test_network_cases(small_network: networks.Network) -> None:
    inference = quick(networks.inference_cases([small_network])[0])
    training = quick(networks.training_cases(small_network)[0])
    assert inference.value and training.value and inference.target == 3.0 and training.target == 1.4
    assert inference.macs and training.macs and 2 < training.macs / inference.macs <= 3
    assert inference.work == "small, batch 4"


def test_networks_that_are_not_there_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\n")
    missing, bad = (networks.Network("n", str(tmp_path / name), 3.0, 1) for name in ("none.yaml", "bad.yaml"))
    rows = [quick(case) for case in networks.inference_cases([missing, bad])]
    assert "install fmaq from a checkout" in str(rows[0].skipped) and rows[0].value is None
    assert "bad.yaml" in str(rows[1].skipped) and "make fetch" in str(rows[1].skipped)


def test_the_networks_are_examples() -> None:
    assert all((networks.EXAMPLES / network.recipe).exists() for network in networks.NETWORKS)


def test_sharing_copy_shares_tensors_and_nothing_else() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    copied = networks.sharing_copy(model)
    assert copied[0] is not model[0] and copied[0].weight is model[0].weight
    assert copied[1].running_mean is model[1].running_mean


def test_macs_count_attention_too() -> None:
    q = torch.ones(1, 2, 8, 4)
    with torch.no_grad():
        assert networks.macs(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q)) == 2 * 2 * 8 * 8 * 4
        assert networks.macs(lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 5))) == 60


# --- Running ----------------------------------------------------------------------------------------------------------


def test_rows_are_saved_as_they_come(tmp_path: Path) -> None:
    output = tmp_path / "out.json"

    def look(row: Row, rounds: int) -> Row:
        saved = Report.load(output)
        assert not saved.is_complete and len(saved.rows) == 1
        return replace(row, value=float(rounds))

    cases = [Case(ROW, lambda row, rounds: row), Case(replace(ROW, case="second"), look)]
    report = run(cases, 7, output, Bars(False))
    assert Report.load(output) == report and report.is_complete
    assert report.rows[1].value == 7.0 and report.machine["target"] == kernels.current_target().name
    assert {"processor", "torch", "fmaq", "commit", "load_average", "cores"} <= set(report.machine)


def test_an_interrupted_run_keeps_its_rows(tmp_path: Path) -> None:
    def interrupt(row: Row, rounds: int) -> Row:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([Case(ROW, lambda row, rounds: row), Case(ROW, interrupt)], 1, tmp_path / "out.json", Bars(False))
    kept = Report.load(tmp_path / "out.json")
    assert kept.rows == [ROW] and not kept.is_complete


def test_select() -> None:
    assert {case.row.suite for case in select([])} == {
        "gemm",
        "conv",
        "networks",
        "decoding",
        "training",
        "gradients",
        "memory",
        "start",
    }
    assert {case.row.work for case in select(["gemm"], [32])} == {"32×32×32", "1×1024×1024", "8×1024×1024"}
    keys = [case.row.key for case in select([])]
    assert len(keys) == len(set(keys))
    with pytest.raises(ValueError, match="no suite 'gem'; did you mean 'gemm'"):
        select(["gem"])
    with pytest.raises(ValueError, match="sizes must be at least 1, got 0"):
        select(["gemm"], [0])


def test_warning_of_a_busy_machine() -> None:
    assert warning(None) is None and warning(0.2) is None and warning(2.3, own=2) is None
    assert "not idle: 3.1 processes" in str(warning(3.1)) and "2 of them this benchmark's" in str(warning(3.1, own=2))
    assert load_average() is None or load_average() >= 0


# --- The command ------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["fmaq", "bench", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        torch.set_num_threads(threads)
    return int(caught.value.code or 0)


def test_bench_and_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    small = [case for case in gemm.cases((8,)) if case.row.case == "float32, no saturation possible"]
    monkeypatch.setattr(gemm, "cases", lambda sizes: small)
    assert command(monkeypatch, "--suite", "gemm", "--sizes", "8", "--rounds", 1, "--json", out) == 0
    assert "8×8×8" in capsys.readouterr().out
    report = Report.load(out)
    assert report.is_complete and report.machine["threads"] == 1 and len(report.rows) == 1
    assert command(monkeypatch, "--compare", out, out) == 0
    assert "+0 %" in capsys.readouterr().out


def test_profile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--profile", "--sizes", "8,40", "--rounds", 1) == 0
    shown = capsys.readouterr().out
    assert "8×8×8" in shown and "40×40×40" in shown and "packing, %" in shown


def test_a_profile_adds_up_to_the_whole() -> None:
    """Of a matrix, of attention's and of a convolution; a share may be below zero by the clock's noise alone."""
    works = {work.name: work for work in profile.works()}
    assert len(works) == len(profile.SIZES) + len(profile.HEADS) + len(conv.SHAPES)
    for name in ("64×64×64", "12 heads, 128×64×128", "3×3, 8×512×7² → 512"):
        found = profile.profile(works[name], Accumulator.paper12, 1)
        assert found.work == name and tuple(found.parts) == profile.PARTS
        assert sum(found.parts.values()) == pytest.approx(found.seconds) and found.parts["packing"] > 0
        if kernels.current_target().architecture == "x86_64":
            assert found.loop is not None and found.loop > 0


def test_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen model and the other decode what the plain one does not have to."""
    model = tiny("llama").eval()
    monkeypatch.setattr(networks, "load", lambda network: (model, {"input_ids": torch.arange(20)[None]}, None))
    monkeypatch.setattr(networks, "NEW_TOKENS", 2)
    for case in networks.decoding_cases():
        row = case.run(1)
        assert row.skipped is None and row.value is not None and row.value > 0


def test_an_interrupted_command_says_where_the_rows_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(row: Row, rounds: int) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(gemm, "cases", lambda sizes: [Case(ROW, lambda row, rounds: row), Case(ROW, interrupt)])
    out = tmp_path / "out.json"
    assert command(monkeypatch, "-s", "gemm", "--sizes", 8, "--json", out) == 130
    assert "the rows so far are in" in capsys.readouterr().err and Report.load(out).rows == [ROW]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--suite", "gem"], "no suite 'gem'; did you mean 'gemm'?"),
        (["--sizes", "3,x"], "--sizes takes whole numbers set apart by commas, like 256,512; got '3,x'"),
        (["--target", "mmx"], "target 'mmx' does not run on this machine; it runs"),
        (["--compare", "a.json", "b.json"], "cannot read a.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message and "Traceback" not in message


def test_another_target_limits_torch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from fmaq.cli import bench

    monkeypatch.setattr(bench.os, "environ", {"ONEDNN_MAX_CPU_ISA": "ALL"})
    bench._limit_torch("avx2")
    assert bench.os.environ["MKL_ENABLE_INSTRUCTIONS"] == "AVX2" and bench.os.environ["ONEDNN_MAX_CPU_ISA"] == "ALL"
    bench._limit_torch(None)
    assert bench.os.environ["ATEN_CPU_CAPABILITY"] == "avx2"


def test_help_has_examples(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert "Examples" in text and "--compare before.json after.json" in text
