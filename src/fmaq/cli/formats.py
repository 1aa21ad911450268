"""`fmaq hardware`: the bits and ranges of accumulators' formats."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from fmaq.numerics import Accumulator, Float32Format, Format


def hardware(
    accumulators: Annotated[
        list[str],
        typer.Argument(metavar="ACCUMULATOR...", help='Such as paper12 or "M7E4b10 product=M7E4b12 chunk=16".'),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the bits and ranges of accumulators' formats."""
    rows = [row for text in accumulators for row in _rows(Accumulator.parse(text))]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("accumulator", "role", "format") else "right")
    for row in rows:
        table.add_row(
            *(
                "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
                for value in row.values()
            )
        )
    Console().print(table)


def _rows(acc: Accumulator) -> list[dict[str, Any]]:
    roles: list[tuple[str, Format | Float32Format | None]] = [("sums", acc.format), ("products", acc.product)]
    if acc.outer is not None:
        levels = acc.levels
        roles += [("outer" if len(levels) == 1 else f"outer {i}", level.format) for i, level in enumerate(levels, 1)]
    return [_row(acc, role, format) for role, format in roles]


def _row(acc: Accumulator, role: str, format: Format | Float32Format | None) -> dict[str, Any]:
    if format is None:
        unknown = dict.fromkeys(("bits", "register", "smallest", "largest"))
        return {"accumulator": str(acc), "role": role, "format": "exact", **unknown}
    known = not format.is_template
    # zero="flag" keeps zero apart from the codes: one more bit in the register.
    flag = int(getattr(format, "zero", "exponent") == "flag")
    return {
        "accumulator": str(acc),
        "role": role,
        "format": str(format),
        "bits": format.bits,
        "register": format.bits + flag,
        "smallest": format.tiny if known else None,
        "largest": format.max if known else None,
    }
