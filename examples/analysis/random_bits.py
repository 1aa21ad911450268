"""What few random bits take from a sum on average: python examples/analysis/random_bits.py

Sums of 64 numbers between 0.2 and 1 in M4E6, one chunk, rounded stochastically: how far their mean is from the exact
one, by the number of random bits, as they are and centred.
"""

import torch

import fmaq

ROWS, STEPS, COLUMNS = 400, 64, 64


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    a, b = 0.2 + 0.8 * torch.rand(ROWS, STEPS), torch.ones(STEPS, COLUMNS)
    exact = a.double() @ b.double()
    print("| random bits | as they are | centred |")
    print("|---|---|---|")
    for bits in (3, 5, 8, 13):
        found = []
        for centred in (False, True):
            acc = fmaq.Accumulator("M4E6b31", chunk=None, rounding="stochastic", random_bits=bits, centred=centred)
            found.append(float((fmaq.matmul(a, b, acc) / exact).mean()) - 1)
        print(f"| {bits} | {found[0]:+.2%} | {found[1]:+.2%} |")


if __name__ == "__main__":
    main()
