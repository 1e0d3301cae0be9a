"""Time one op of pyreg against its peers.

    python bench/compare.py dropout [--quick] [--sizes 1e6 1.6e7] [--dtypes float32] [--markdown]

The result is checked first.  Then contenders take turns (A B C, A B C, ...), and a ratio is taken within each turn:
the tables give its median, and in brackets its minimum.  All figures go to a JSON file and a plot.

An op is a module beside this file: PARAMS, QUICK, TABLE_BY, SUBJECTS, COLUMNS, MARKDOWN, NOTES, PACKAGES as data, and
check(), contenders(), elements().  For the other benchmarks: SWEEP, FIXED, SWEPT, COPY, CONTENTION.  See
dropout.py.  A module may have details(), too: figures that are no times.
"""

import argparse
import importlib
import itertools
import math
from pathlib import Path

from rich import box
from rich.progress import Progress
from rich.table import Table
from timing import (
    console,
    environment,
    integer,
    interleave,
    label,
    number_text,
    show_environment,
    skip,
    summary,
    time_text,
    write_json,
)


def measure(op, params, rounds, peers):
    """One record for each combination of the parameters.  Each table is printed as soon as it is complete."""
    names = list(params)
    cases = [dict(zip(names, values, strict=True)) for values in itertools.product(*params.values())]
    records = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(op.__name__, total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join(map(str, case.values())))
            seconds = interleave(op.contenders(**case, peers=peers), rounds)
            ratios = {
                f"{name} / {over}": summary(seconds[name] / seconds[over])
                for name, over in compared(op)
                if name in seconds and over in seconds
            }
            times = {name: summary(samples) for name, samples in seconds.items()}
            records.append({**case, "elements": op.elements(**case), "seconds": times, "ratios": ratios})
            progress.advance(task)
            table = [r for r in records if all(r[name] == case[name] for name in op.TABLE_BY)]
            if len(table) * math.prod(len(params[name]) for name in op.TABLE_BY) == len(cases):
                print_table(op, table)
    return records


def compared(op):
    return [(a.format(s), b.format(s)) for s in op.SUBJECTS for _, a, b in op.COLUMNS if b]


def check(op, params):
    for values in itertools.product(*(params[name] for name in op.TABLE_BY)):
        for found in op.check(**dict(zip(op.TABLE_BY, values, strict=True))):
            console.print(f"[green]checked[/] {' '.join(map(str, values))}: {found}")


# ---- Tables ----------------------------------------------------------------------------------------------------------


def cells(record, subject, name, over):
    """The time and the time an element, or the ratio; None if it was not measured."""
    name = name.format(subject)
    if over is None:
        seconds = record["seconds"].get(name, {}).get("median")
        return [time_text(seconds), f"{seconds / record['elements'] * 1e9:.3f}"] if seconds else None
    ratio = record["ratios"].get(f"{name} / {over.format(subject)}")
    return [f"{number_text(ratio['median'])} ({number_text(ratio['min'])})"] if ratio else None


def print_table(op, records):
    labels = [name for name in op.PARAMS if name not in op.TABLE_BY]
    # A peer that was not measured gets no column.
    columns = [c for c in op.COLUMNS if any(cells(r, s, *c[1:]) for r in records for s in op.SUBJECTS)]
    title = ", ".join(f"{name} {records[0][name]}" for name in op.TABLE_BY)
    table = Table(*labels, "", title=f"{op.__name__}: {title}", box=box.SIMPLE_HEAD, pad_edge=False)
    for header, _, over in columns:
        for text in [header] if over else [header, "ns/elem"]:
            table.add_column(text, justify="right")
    for record in records:
        for subject in op.SUBJECTS:
            row = [label(record[name]) for name in labels] + [subject]
            for column in columns:
                row += cells(record, subject, *column[1:]) or (["-"] if column[2] else ["-", "-"])
            table.add_row(*row)
    console.print(table)


def print_markdown(op, records, env):
    """The README's table: the first of everything in TABLE_BY, all threads."""
    first = {name: records[0][name] for name in op.TABLE_BY}
    rows = [r for r in records if first.items() <= r.items()]
    rows = [r for r in rows if r["threads"] == rows[-1]["threads"]]
    columns = {title: name for title, name in op.MARKDOWN.items() if any(name in r["seconds"] for r in rows)}
    what = ", ".join(f"{name} {value}" for name, value in first.items())
    versions = ", ".join(f"{package} {env[package]}" for package in op.PACKAGES if env[package] != "not installed")
    print(f"\n{what}, {rows[0]['threads']} threads, on {env['cpu']} ({env['instruction set']}); {versions}.\n")
    row_of = next(name for name in op.PARAMS if name not in (*op.TABLE_BY, "threads"))
    print(f"| {row_of} |", " | ".join(columns), "|")
    print("|---:|" + "---:|" * len(columns))
    for row in rows:
        seconds = [row["seconds"].get(name) for name in columns.values()]
        print(f"| {label(row[row_of])} |", " | ".join(time_text(s["median"]) if s else "" for s in seconds), "|")


# ---- Plot ------------------------------------------------------------------------------------------------------------


def plot(op, records, path):
    """Time an element against size: a panel for each dtype and number of threads."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    by, *rest = op.TABLE_BY
    first = {name: records[0][name] for name in rest}  # one rate is enough
    records = [r for r in records if first.items() <= r.items()]
    rows, threads = (list(dict.fromkeys(r[name] for r in records)) for name in (by, "threads"))
    names = list(dict.fromkeys(name for r in records for name in r["seconds"]))  # a name has one colour in all panels
    size = (6 * len(threads), 3.6 * len(rows))
    fig, axes = plt.subplots(
        len(rows), len(threads), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for (i, row), (j, n), (k, name) in itertools.product(enumerate(rows), enumerate(threads), enumerate(names)):
        chosen = [r for r in records if r[by] == row and r["threads"] == n and name in r["seconds"]]
        if not chosen:
            continue
        elements = [r["elements"] for r in chosen]
        ns = [r["seconds"][name]["median"] / r["elements"] * 1e9 for r in chosen]
        ours = any(name.startswith(subject) for subject in op.SUBJECTS)
        axes[i][j].loglog(elements, ns, "o-" if ours else "s--", color=f"C{k}", label=name, markersize=4)
        axes[i][j].set_title(", ".join(map(str, [row, *(f"{a} {b}" for a, b in first.items()), f"threads {n}"])))
        axes[i][j].grid(visible=True, alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel("elements")
    for ax in axes[:, 0]:
        ax.set_ylabel("ns an element")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    fig.savefig(path, dpi=110)
    console.print(f"wrote {path}")


# ---- Command line ----------------------------------------------------------------------------------------------------


def print_details(details):
    """What a module with details() has to say beside times."""
    table = Table(*details[0], box=box.SIMPLE_HEAD, pad_edge=False)
    for row in details:
        table.add_row(*("" if v is None else v if isinstance(v, str) else number_text(v) for v in row.values()))
    console.print(table)


MODULES = {"batchnorm": "batchnorm", "dropout": "dropout", "jax": "jax_ops"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=MODULES)
    parser.add_argument("--quick", action="store_true", help="a few cases only, under half a minute")
    parser.add_argument("--sizes", dest="size", type=integer, nargs="+")
    parser.add_argument("--dtypes", dest="dtype", nargs="+")
    parser.add_argument("--rates", dest="rate", type=float, nargs="+")
    parser.add_argument("--shapes", dest="shape", nargs="+", help='of batchnorm, for example "32,56,56,64 NHWC"')
    parser.add_argument("--cases", dest="case", nargs="+", help='of jax, for example "dropout 1,000,000"')
    parser.add_argument("--threads", type=int, nargs="+")
    peers = ["NumPy", "PyTorch", "Flax", "oneDNN"]
    parser.add_argument("--peers", nargs="*", default=peers, help=f"any of {' '.join(peers)}")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--markdown", action="store_true", help="also print the README's table")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the plot")
    args = parser.parse_args()

    op = importlib.import_module(MODULES[args.op])
    defaults = op.QUICK if args.quick else op.PARAMS
    params = {name: tuple(getattr(args, name) or defaults[name]) for name in op.PARAMS}
    for dtype in params["dtype"]:
        if reason := skip(dtype):
            console.print(f"[yellow]skipped[/] {dtype}: {reason}")
    params["dtype"] = tuple(dtype for dtype in params["dtype"] if not skip(dtype))
    env = environment(op.PACKAGES)
    show_environment(env)
    check(op, params)
    records = measure(op, params, args.rounds, args.peers)
    console.print(op.NOTES, style="dim")
    details = list(op.details(params["case"])) if hasattr(op, "details") else []
    if details:
        print_details(details)
    write_json(args.out / f"compare-{args.op}.json", environment=env, records=records, details=details)
    plot(op, records, args.out / f"compare-{args.op}.png")
    if args.markdown:
        print_markdown(op, records, env)


if __name__ == "__main__":
    main()
