"""Heat maps as inline SVG, and tables: numbers by block and by layer. See `plot.py` for the classes."""

from collections.abc import Sequence

from lora_core.spec.plot import WIDTH, safe, shortened, svg


def heat_plot(
    label: str,
    rows: Sequence[tuple[str, Sequence[float | None]]],
    columns: Sequence[str],
    shares: Sequence[Sequence[float]],
    words: Sequence[Sequence[str]],
) -> str:
    """A heat map: a row a block, each column on a scale of its own.

    Args:
        label: what it shows.
        rows: a name and its values; None where there is none.
        columns: their names.
        shares: from 0 to 1, how strongly each cell is coloured.
        words: written into each cell.
    """
    names, row, head = 182.0, 24, 22
    side = (WIDTH - names - 8) / max(1, len(columns))
    parts = [
        f'<text x="{names + 8 + (column + 0.5) * side:.1f}" y="14" text-anchor="middle">{safe(name)}</text>'
        for column, name in enumerate(columns)
    ]
    for index, (name, values) in enumerate(rows):
        y = head + index * row
        parts.append(f'<text x="{names}" y="{y + 15}" text-anchor="end">{safe(shortened(name))}</text>')
        for column in range(len(values)):
            x = names + 8 + column * side
            share = min(1.0, max(0.0, shares[index][column]))
            parts.append(
                f'<rect class="cell" x="{x + 1:.1f}" y="{y + 1}" width="{side - 2:.1f}" height="{row - 2}"'
                f' rx="3" fill-opacity="{0.06 + 0.5 * share:.2f}"/><text class="in" x="{x + side / 2:.1f}"'
                f' y="{y + 15}" text-anchor="middle">{safe(words[index][column])}</text>'
            )
    return svg(label, "".join(parts), head + len(rows) * row + 4)


def square_plot(label: str, table: Sequence[Sequence[float]], titles: tuple[str, str]) -> str:
    """A heat map of a table of shares from 0 to 1, ranks below and beside it.

    Args:
        label: what it shows.
        table: rows of equal length.
        titles: of the rows and of the columns.
    """
    count = max(len(table), 1)
    side = min(28.0, 320.0 / count)
    left, top = 60.0, 26.0
    parts = [f'<text x="{left}" y="12">{safe(titles[1])} (across), {safe(titles[0])} (down)</text>']
    for i, row in enumerate(table):
        y = top + i * side
        parts.append(f'<text x="{left - 6}" y="{y + side / 2 + 4:.1f}" text-anchor="end">{i + 1}</text>')
        for j, value in enumerate(row):
            share = min(1.0, max(0.0, value))
            parts.append(
                f'<rect class="cell" x="{left + j * side:.1f}" y="{y:.1f}" width="{side - 1:.1f}"'
                f' height="{side - 1:.1f}" fill-opacity="{0.05 + 0.95 * share:.3f}"/>'
            )
    for j in range(0, count, 1 if count <= 8 else 3):
        x = left + (j + 0.5) * side
        parts.append(
            f'<text x="{x:.1f}" y="{top + count * side + 14:.1f}" text-anchor="middle">{j + 1}</text>'
        )
    return svg(label, "".join(parts), top + count * side + 22)


def table_html(
    headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "", numbers: bool = True
) -> str:
    """A table with its first column as row headers; every cell is escaped.

    Args:
        headers: of the columns.
        rows: cells.
        caption: said of it.
        numbers: whether all but the first column are set as numbers.
    """
    kind = ' class="num"' if numbers else ""
    head = "".join(f'<th scope="col">{safe(name)}</th>' for name in headers)
    body = "".join(
        f'<tr><th scope="row">{safe(row[0])}</th>'
        + "".join(f"<td{kind}>{safe(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    said = f"<caption>{safe(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{safe(caption or headers[0])}"><table'
        f' class="numbers">{said}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
