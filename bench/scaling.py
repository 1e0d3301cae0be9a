"""How the time of one op falls with the number of threads, for several sizes, beside a copy by one thread.

    python bench/scaling.py dropout [--threads 1 2 4] [--sizes 1e6 1.6e7]

All numbers of threads take turns, and so does the copy: see compare.py.  The figures go to a JSON file and a plot.
"""

import argparse
import importlib
from pathlib import Path

from rich import box
from rich.progress import track
from rich.table import Table
from timing import console, cpus, environment, interleave, number_text, show_environment, summary, time_text, write_json

import pyreg


def with_threads(n, call):
    """A call that sets the number of threads first: one store, much quicker than any size worth scaling."""

    def run():
        pyreg.set_num_threads(n)
        call()

    return run


def measure(op, subject, size, threads, rounds):
    calls = op.contenders("float32", 0.1, size, 1, peers=())
    copy, ours = calls["copyto"], calls[f"{subject} out="]
    seconds = interleave({"copyto": copy, **{str(n): with_threads(n, ours) for n in threads}}, rounds)
    return {
        "subject": subject,
        "size": size,
        "seconds": {name: summary(s) for name, s in seconds.items()},
        "speedup": {str(n): summary(seconds[str(threads[0])] / seconds[str(n)]) for n in threads},
    }


def print_table(records, threads):
    table = Table("size", "", title="float32, rate 0.1, out=", box=box.SIMPLE_HEAD)
    table.add_column("copyto", justify="right")
    for n in threads:
        table.add_column(f"{n} threads" if n > 1 else "1 thread", justify="right")
    for record in records:
        row = [time_text(record["seconds"]["copyto"]["median"])]
        for n in map(str, threads):
            speedup = record["speedup"][n]["median"]
            row.append(f"{time_text(record['seconds'][n]['median'])} ({number_text(speedup)}x)")
        table.add_row(f"{record['size']:,}", record["subject"], *row)
    console.print(table)


def plot(records, threads, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    subjects = list(dict.fromkeys(r["subject"] for r in records))
    fig, axes = plt.subplots(1, len(subjects), figsize=(6 * len(subjects), 4), squeeze=False, sharey=True)
    for ax, subject in zip(axes[0], subjects, strict=True):
        chosen = [r for r in records if r["subject"] == subject]
        for name in ["copyto", *map(str, threads)]:
            ns = [r["seconds"][name]["median"] / r["size"] * 1e9 for r in chosen]
            style, label = ("k--", "copyto, 1 thread") if name == "copyto" else ("o-", f"threads {name}")
            ax.loglog([r["size"] for r in chosen], ns, style, label=label, markersize=4)
        ax.set(title=subject, xlabel="elements", ylabel="ns an element")
        ax.grid(visible=True, alpha=0.3)
        ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    console.print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["dropout"])
    parser.add_argument("--threads", type=int, nargs="+", default=list(range(1, cpus() + 1)))
    parser.add_argument("--sizes", type=lambda text: int(float(text)), nargs="+")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file and the plot")
    args = parser.parse_args()

    op = importlib.import_module(args.op)
    env = environment()
    show_environment(env)
    sizes = args.sizes or [size for size in op.SIZES if size >= 10_000]
    cases = [(subject, size) for subject in op.SUBJECTS for size in sizes]
    records = [
        measure(op, subject, size, args.threads, args.rounds)
        for subject, size in track(cases, "scaling", console=console, transient=True)
    ]
    print_table(records, args.threads)
    write_json(args.out / f"scaling-{args.op}.json", environment=env, records=records)
    plot(records, args.threads, args.out / f"scaling-{args.op}.png")


if __name__ == "__main__":
    main()
