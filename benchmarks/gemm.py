"""Matrix products against `torch.mm` in float32 on the same threads, and what a first call and an import cost.

python -m benchmarks.gemm [--sizes 256,512,1024] [--threads 1] [--target avx2]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import compare
from fmaq import kernels
from fmaq.numerics import Accumulator

PAPER = Accumulator.paper12


def float32(n: int, scale: float) -> Tensor:
    """Normal random numbers, too many bits for any narrow product."""
    return torch.randn(1, n, n) * scale


def fp8(n: int, scale: float) -> Tensor:
    """Normal random numbers in E4M3, whose products M7 holds exactly."""
    return (torch.randn(1, n, n) * scale).to(torch.float8_e4m3fn).float()


CASES = (
    ("float32, checked where bounds ask", PAPER, float32, 1.0),
    ("float32, no saturation possible", PAPER, float32, 0.05),
    ("float32, saturates everywhere", PAPER, float32, 4.0),
    ("float32, product kept exact", Accumulator("M7E4b10"), float32, 0.05),
    ("FP8 E4M3, products exact", Accumulator("M7E4b10 product=M7E4b18"), fp8, 0.1),
    ("nearest even", Accumulator("M7E4b10 product=M7E4b12 rounding=nearest_even"), float32, 0.05),
    ("stochastic, 10 bits", Accumulator("M7E4b10 product=M7E4b12 rounding=stochastic"), float32, 0.05),
    ("fixed, saturating", Accumulator("I16f8 product=I16f8"), float32, 1.0),
    ("fixed, wrapping", Accumulator("I16f8w product=I16f8w"), float32, 1.0),
)


def products(sizes: list[int], console: Console) -> None:
    """One row a case and size."""
    threads = torch.get_num_threads()
    table = Table(title=f"n×n×n against torch.mm, {threads} thread(s), target {kernels.current_target().name}")
    for heading in ("operands", "n", "GMAC/s", "torch GMAC/s", "ratio (median)"):
        table.add_column(heading, justify="left" if heading == "operands" else "right")
    for name, acc, make, scale in CASES:
        for n in sizes:
            a, b = make(n, scale), make(n, scale)
            found = compare(lambda a=a, b=b, acc=acc: kernels.matmul(a, b, acc), lambda a=a, b=b: torch.mm(a[0], b[0]))
            rates = (n**3 / found.ours / 1e9, n**3 / found.theirs / 1e9)
            table.add_row(name, str(n), f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{found.ratio:.2f}")
    console.print(table)


def first_calls(console: Console) -> None:
    """What compiling a format for the first time costs, after the process has compiled another one."""
    a = torch.randn(1, 64, 64)
    kernels.matmul(a, a, PAPER)
    times = []
    for bias in range(3, 8):
        start = time.perf_counter()
        kernels.matmul(a, a, Accumulator(f"M6E4b{bias}", product=f"M6E4b{bias + 2}"))
        times.append(time.perf_counter() - start)
    console.print(f"first call of a new format: {sorted(times)[2]:.3f} s (median of {len(times)})")


def imports(console: Console) -> None:
    """What `import fmaq` adds to `import torch`, in a fresh process."""
    code = "import time, torch; t = time.perf_counter(); import fmaq; print(time.perf_counter() - t)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in "abc"
    ]
    console.print(f"`import fmaq` after `import torch`: {sorted(times)[1]:.3f} s (median of {len(times)})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256,512,1024", help="sizes n, comma-separated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", help="avx512, avx2, sse2 or neon; the fastest available unless given")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    console = Console()
    with kernels.use_target(options.target or kernels.current_target().name):
        products([int(n) for n in options.sizes.split(",")], console)
        first_calls(console)
    imports(console)


if __name__ == "__main__":
    main()
