"""How the time of one op falls with the number of threads, for several sizes or shapes, beside a copy by one thread.

    python bench/scaling.py dropout [--threads 1 2 4] [--sizes 1e6 1.6e7]
    python bench/scaling.py batchnorm [--threads 1 2 4] [--shapes "32,56,56,64 NHWC"]

All numbers of threads take turns, and so does the copy: see compare.py.  The figures go to a JSON file and a plot.
"""

import argparse
import importlib
from pathlib import Path

from rich import box
from rich.progress import track
from rich.table import Table
from timing import (
    console,
    cpus,
    environment,
    integer,
    interleave,
    label,
    number_text,
    show_environment,
    summary,
    time_text,
    write_json,
)

import pyreg


def with_threads(n, call):
    """A call that sets the number of threads first: one store, much quicker than any size worth scaling."""

    def run():
        pyreg.set_num_threads(n)
        call()

    return run


def measure(op, subject, value, threads, rounds):
    case = {**op.FIXED, op.SWEEP: value}
    calls = op.contenders(**case, threads=1, peers=())
    copy, ours = with_threads(1, calls[op.COPY]), calls[subject]
    seconds = interleave({"copy": copy, **{str(n): with_threads(n, ours) for n in threads}}, rounds)
    return {
        "subject": subject,
        **case,
        "elements": op.elements(**case),
        "seconds": {name: summary(s) for name, s in seconds.items()},
        "speedup": {str(n): summary(seconds[str(threads[0])] / seconds[str(n)]) for n in threads},
    }


def print_table(op, records, threads):
    title = ", ".join(f"{name} {value}" for name, value in op.FIXED.items())
    table = Table(op.SWEEP, "", title=f"{op.__name__}: {title}", box=box.SIMPLE_HEAD)
    table.add_column(f"{op.COPY}, 1 thread", justify="right")
    for n in threads:
        table.add_column(f"{n} threads" if n > 1 else "1 thread", justify="right")
    for record in records:
        row = [time_text(record["seconds"]["copy"]["median"])]
        for n in map(str, threads):
            speedup = record["speedup"][n]["median"]
            row.append(f"{time_text(record['seconds'][n]['median'])} ({number_text(speedup)}x)")
        table.add_row(label(record[op.SWEEP]), record["subject"], *row)
    console.print(table)


def plot(op, records, threads, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    subjects = list(dict.fromkeys(r["subject"] for r in records))
    fig, axes = plt.subplots(1, len(subjects), figsize=(6 * len(subjects), 4.5), squeeze=False, sharey=True)
    for ax, subject in zip(axes[0], subjects, strict=True):
        chosen = [r for r in records if r["subject"] == subject]
        for name in ["copy", *map(str, threads)]:
            ns = [r["seconds"][name]["median"] / r["elements"] * 1e9 for r in chosen]
            style, text = ("k--", f"{op.COPY}, 1 thread") if name == "copy" else ("o-", f"threads {name}")
            ax.plot([r[op.SWEEP] for r in chosen], ns, style, label=text, markersize=4)
        ax.set(title=subject, xlabel=op.SWEEP, ylabel="ns an element", yscale="log")
        if isinstance(chosen[0][op.SWEEP], str):
            ax.tick_params("x", rotation=90)
        else:
            ax.set_xscale("log")
        ax.grid(visible=True, alpha=0.3)
        ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    console.print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["batchnorm", "dropout"])
    parser.add_argument("--threads", type=int, nargs="+", default=list(range(1, cpus() + 1)))
    parser.add_argument("--sizes", dest="size", type=integer, nargs="+")
    parser.add_argument("--shapes", dest="shape", nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the plot")
    args = parser.parse_args()

    op = importlib.import_module(args.op)
    env = environment()
    show_environment(env)
    large = [value for value in op.PARAMS[op.SWEEP] if op.elements(**{op.SWEEP: value}) >= 10_000]
    cases = [(subject, value) for subject in op.SWEPT for value in getattr(args, op.SWEEP) or large]
    records = [
        measure(op, subject, value, args.threads, args.rounds)
        for subject, value in track(cases, "scaling", console=console, transient=True)
    ]
    print_table(op, records, args.threads)
    write_json(args.out / f"scaling-{args.op}.json", environment=env, records=records)
    plot(op, records, args.threads, args.out / f"scaling-{args.op}.png")


if __name__ == "__main__":
    main()
