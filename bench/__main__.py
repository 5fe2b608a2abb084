"""Runs benchmarks by name (all of them without one) and prints their ratios."""

import importlib
import json
import sys
from pathlib import Path

KEYS = ("name", "ours", "peer", "unit", "ratio", "ratio_min", "ratio_max", "share_of_roof")


def main(arguments: list[str]) -> None:
    """`python -m bench [--json | --profile] [NAME …]`; a profile says where the time of ours goes."""
    known = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    names = [name for name in arguments if not name.startswith("--")] or known
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"error: expected benchmarks among {', '.join(known)}, got {', '.join(unknown)}")
    for name in names:
        benchmark = importlib.import_module(f"bench.{name}")
        if "--profile" in arguments:
            print(f"{name}:\n{benchmark.profile()}" if hasattr(benchmark, "profile") else f"{name}: has no profile")
            continue
        figures = benchmark.run()
        for line in figures if isinstance(figures, list) else [figures]:
            assert set(KEYS) <= set(line), f"{name}: expected the keys {KEYS}, got {sorted(line)}"
            print(json.dumps(line) if "--json" in arguments else sentence(line), flush=True)


def sentence(line: dict[str, object]) -> str:
    """One line for people."""
    share = line["share_of_roof"]
    roof = "" if share is None else f", {share:.0%} of the roof"
    return (
        f"{line['name']}: {line['ours']:.4g} against {line['peer']:.4g} {line['unit']}: "
        f"× {line['ratio']:.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f}){roof}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
