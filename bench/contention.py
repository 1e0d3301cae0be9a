"""What one busy process on the machine costs an op: its time with the neighbour, over its time at one thread without.

    python bench/contention.py dropout [--threads 1 2] [--sizes 1e6 1.6e7]
    python bench/contention.py batchnorm [--threads 1 2] [--shapes "32,56,56,64 NHWC"]

A parallel region ends when its slowest thread does, and a thread that shares its CPU may wait for a whole time slice.
So the tail counts, too: the median, the 90th percentile and the longest of many calls.  Nothing is pinned.
"""

import argparse
import contextlib
import importlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from timing import busy_cpus, console, cpus, environment, integer, label, show_environment, time_text, write_json

import pyreg

# It ends by itself after ten minutes, should this process be killed before it can do that.
BUSY = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"

QUIET = 0.15  # CPUs that may be busy before a measurement


@contextlib.contextmanager
def neighbour():
    """A process that computes between resume() and pause()."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_quiet(patience=10):
    """How many CPUs other processes use, once it is few or patience is over."""
    end = time.monotonic() + patience
    while (busy := busy_cpus()) > QUIET and time.monotonic() < end:
        pass
    return busy


def times_of(call, seconds):
    """The time of each call, one after the other, for so long."""
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        times.append(time.perf_counter() - start)
    return times


def measure(op, subject, value, threads, seconds, turns):
    """Times at each number of threads, idle and with the neighbour, in turns."""
    case = {**op.FIXED, op.SWEEP: value}
    call = op.contenders(**case, threads=1, peers=())[subject]
    times = {(n, busy): [] for busy in (False, True) for n in threads}
    others = []
    with neighbour() as process:
        for _ in range(turns):
            others.append(wait_until_quiet())
            for (n, busy), kept in times.items():
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                pyreg.set_num_threads(n)
                time.sleep(0.1)  # lets the scheduler settle
                kept += times_of(call, seconds)
            process.send_signal(signal.SIGSTOP)
    base = float(np.median(times[1, False]))
    rows = [
        {
            "threads": n,
            "neighbour": busy,
            "calls": len(kept),
            **{name: float(np.percentile(kept, q)) for name, q in (("median", 50), ("p90", 90), ("max", 100))},
            "median ratio": float(np.median(kept)) / base,
            "p90 ratio": float(np.percentile(kept, 90)) / base,
        }
        for (n, busy), kept in times.items()
    ]
    return {"subject": subject, **case, "busy CPUs before": max(others), "rows": rows}


def print_table(op, records):
    title = ", ".join(f"{name} {value}" for name, value in op.FIXED.items())
    table = Table("", op.SWEEP, "threads", "neighbour", title=f"{op.__name__}: {title}", box=box.SIMPLE_HEAD)
    for header in ("calls", "median", "p90", "longest", "median / idle at 1 thread", "p90 / the same"):
        table.add_column(header, justify="right")
    for record in records:
        for row in record["rows"]:
            table.add_row(
                record["subject"],
                label(record[op.SWEEP]),
                str(row["threads"]),
                "busy" if row["neighbour"] else "-",
                str(row["calls"]),
                *(time_text(row[name]) for name in ("median", "p90", "max")),
                *(f"{row[name]:.2f}" for name in ("median ratio", "p90 ratio")),
            )
        if record["busy CPUs before"] > QUIET:
            console.print(f"[yellow]{record['busy CPUs before']:.2f} CPUs were busy already: this was disturbed[/]")
    console.print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", choices=["batchnorm", "dropout"])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cpus()}), help="1 must be among them")
    parser.add_argument("--sizes", dest="size", type=integer, nargs="+")
    parser.add_argument("--shapes", dest="shape", nargs="+")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3, help="of each measurement")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file")
    args = parser.parse_args()

    op = importlib.import_module(args.op)
    env = environment()
    show_environment(env)
    cases = [(subject, value) for subject in op.SWEPT for value in getattr(args, op.SWEEP) or op.CONTENTION]
    records = [measure(op, subject, value, args.threads, args.seconds, args.turns) for subject, value in cases]
    print_table(op, records)
    write_json(args.out / f"contention-{args.op}.json", environment=env, records=records)


if __name__ == "__main__":
    main()
