"""A plan of memory as people see it: a line for each category, with a bar for its share."""

from collections.abc import Mapping

from rich.bar import Bar
from rich.table import Table

from ftkit.plan.budget import written

_CELLS = 24


def bars(by_category: Mapping[str, int], whole: int) -> Table:
    """Bytes by category, the largest first, beside bars of which the longest possible stands for `whole`."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    table.add_column()
    for name, size in sorted(by_category.items(), key=lambda item: -item[1]):
        table.add_row(written(size), name, Bar(max(1, whole), 0, size, width=_CELLS, color="cyan"))
    return table
