"""The formula of variance retention against the actual arithmetic: python examples/analysis/retention.py

Per length, chunk and mantissa of the products: the least mantissa that suits the length by the formula and by
simulation, the largest difference of the two ratios, and both at 7 bits, rounding to the nearest; then what truncation
keeps at 7 bits, the gain that undoes its shrinkage, and the noise left. Last, what is kept by n/4^a.
"""

import torch

from fmaq.analysis import is_suitable, least_mantissa, retention_ratio, simulate

LENGTHS = [(64, None), (576, None), (1536, None), (4096, None), (576, 16), (1536, 16), (4096, 16), (4096, 64)]
MANTISSAS = range(2, 12)
SUMS = 384


def accumulator(a: int, p: int, chunk: int | None, rounding: str) -> str:
    return f"M{a}E4 product=M{p}E4 chunk={chunk} rounding={rounding}"


def main() -> None:
    torch.set_num_threads(1)
    print(
        "| n | chunk | p | least, formula | least, simulated | largest difference | formula, a = 7 | simulated, a = 7 |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for n, chunk in LENGTHS:
        for p in (5, 7, 10):
            formula = [retention_ratio(a, p, n, chunk) for a in MANTISSAS]
            found = [simulate(accumulator(a, p, chunk, "nearest_even"), n, SUMS).retained for a in MANTISSAS]
            least = next(a for a, ratio in zip(MANTISSAS, found, strict=True) if is_suitable(ratio, n))
            apart = max((abs(f - s), a) for a, f, s in zip(MANTISSAS, formula, found, strict=True))
            at_7 = MANTISSAS.index(7)
            cells = (n, chunk or "–", p, least_mantissa(p, n, chunk), least, f"{apart[0]:.2f} (a = {apart[1]})")
            print("|", " | ".join(map(str, cells)), f"| {formula[at_7]:.4f} | {found[at_7]:.4f} |", flush=True)
    print("\n| n | chunk | truncation, a = p = 7: variance kept | gain | noise | nearest: noise |")
    print("|---|---|---|---|---|---|")
    for n, chunk in LENGTHS:
        cut = simulate(accumulator(7, 7, chunk, "toward_zero"), n, SUMS)
        near = simulate(accumulator(7, 7, chunk, "nearest_even"), n, SUMS)
        print(f"| {n} | {chunk or '–'} | {cut.retained:.4f} | {cut.gain:.3f} | {cut.noise:.2e} | {near.noise:.2e} |")
    print("\n| n/4^a | " + " | ".join(f"a = {a}" for a in (3, 4, 5, 6)) + " |\n|---|---|---|---|---|")
    for scaled in (0.25, 1, 4, 16, 64):
        kept = [simulate(accumulator(a, 10, None, "nearest_even"), int(scaled * 4**a), SUMS) for a in (3, 4, 5, 6)]
        print(f"| {scaled} | " + " | ".join(f"{k.retained:.3f}" for k in kept) + " |", flush=True)


if __name__ == "__main__":
    main()
