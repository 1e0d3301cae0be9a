"""How the time of a call falls with the number of threads, from 100 bytes to 1 GB.

    python -m bench scaling [--quick] [--calls philox forward] [--sizes 1e6] [--threads 1 2] [--neighbour] [--stores]

Strong scaling: the same array for any number of threads.  Weak scaling: an array for each thread.  Threads are used at
every size, also where the library would not use them.  `pay from` is the size from which they win, with the time of one
thread there; beside it is the time that is built in.  Efficiency is the speedup divided by the number of threads.
`copy` is pyreg's dropout at rate 0, which is a copy by as many threads: no kernel can scale better than that for long.

--neighbour adds a process that computes all the time.  A parallel region ends when its slowest thread does, and a
thread that shares its CPU may wait for a whole time slice.  So the slowest calls are shown, too.  --stores finds from
which size on stores around the cache win.  Built in is the size of the last-level cache.
"""

import functools
import signal
import sys
import time

import numpy as np

from bench import cases, machine, output, timing
from bench.output import bytes_text, console, number_text, time_text
from bench.timing import with_threads
from pyreg import _core

CHANNELS = 64
STREAMING = {"philox": 2, "inference": 2, "backward": 3}  # calls that may store around the cache, and their arrays


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--calls", nargs="+", choices=cases.shapes("scaling")["calls"])
    parser.add_argument("--sizes", type=output.integer, nargs="+", help="bytes of x")
    parser.add_argument("--threads", type=int, nargs="+", default=machine.thread_counts(), help="1 is added")
    parser.add_argument("--dtype", default="float32", help="(%(default)s)")
    parser.add_argument("--neighbour", action="store_true", help="also with a busy process")
    parser.add_argument("--stores", action="store_true", help="also with and without stores around the cache")
    timing.add_arguments(parser)
    parser.set_defaults(seconds=2.0)


def run(args):
    found = output.start()
    config = cases.shapes("scaling")
    sizes = config["quick" if args.quick else "full"]
    if args.sizes:
        sizes = dict.fromkeys(sizes, args.sizes)
    sizes = {name: [int(n) for n in values] for name, values in sizes.items()}
    args.threads = sorted({1, *args.threads})
    calls = {call: config["calls"][call] for call in args.calls or config["calls"]}

    pairs = pairs_of(args.threads)
    found_strong = each(strong, pairs, "strong scaling", calls, sizes["bytes"], args)
    records = {"strong": with_efficiency(found_strong, args.threads, divide=True)}
    records["pay from"] = pay_from(records["strong"], args.threads)
    print_strong(records["strong"])
    for line in pay_from_lines({"built": built_in(), "records": records}):
        console.print(line)
    if args.threads[-1] > 1:
        found_weak = each(weak, pairs, "weak scaling", calls, sizes["weak"], args)
        records["weak"] = with_efficiency(found_weak, args.threads, divide=False)
        print_weak(records["weak"])
    if args.neighbour:
        chosen = [(call, n) for n in sizes["neighbour"] for call in calls]
        records["neighbour"] = [beside_neighbour(*case, args) for case in output.progress(chosen, "busy neighbour")]
        print_neighbour(records["neighbour"])
    if args.stores:
        pair = [("ordinary", "around")]
        records["stores"] = each(stores, pair, "stores", STREAMING, sizes["stores"], args)
        print_stores(records["stores"])
    _core.set_gears()
    output.finish(args, found, records, lambda path: plot(records, found, path), built=built_in(), dtype=args.dtype)
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'dtype': args.dtype, 'records': records})}")


def built_in():
    return {name: timing.BUILT[name] for name in ("parallel_from_ns", "cache_bytes")}


def each(contenders, pairs, text, calls, sizes, args):
    """A record for each call and size."""
    chosen = [(call, n) for n in sizes for call in calls]
    show = functools.partial(output.progress, text=text)
    samples = timing.in_passes(chosen, lambda case: (contenders(*case, args), pairs), args, show)
    return [
        {"call": call, "bytes": n, **timing.compared(s, pairs)} for (call, n), s in zip(chosen, samples, strict=True)
    ]


def call_of(name, nbytes, dtype="float32"):
    """The call on an array of this many bytes, and a copy of that array."""
    op = cases.load(cases.shapes("scaling")["calls"][name])
    elements = max(1, nbytes // cases.numpy_dtype(dtype).itemsize)
    shape = elements
    if op.__name__.endswith("batchnorm"):
        shape = f"{max(1, elements // CHANNELS)},{CHANNELS}"
    calls = op.contenders(dtype=dtype, shape=shape, threads=1)
    return calls[f"{name} out="], calls["copy"]


# ---- Strong and weak -------------------------------------------------------------------------------------------------


def pairs_of(threads):
    return [(f"{kind}1", f"{kind}{n}") for n in threads[1:] for kind in ("", "copy ")]


def strong(name, nbytes, args):
    call, copy = call_of(name, nbytes, args.dtype)
    calls = {str(n): with_threads(n, call, parallel_from=0) for n in args.threads}
    return calls | {f"copy {n}": with_threads(n, copy, parallel_from=0) for n in args.threads}


def weak(name, nbytes, args):
    """The same work for each thread: the time should stay the same."""
    calls = {}
    for n in args.threads:
        call, copy = call_of(name, n * nbytes, args.dtype)
        calls[str(n)] = with_threads(n, call, parallel_from=0)
        calls[f"copy {n}"] = with_threads(n, copy, parallel_from=0)
    return calls


def with_efficiency(records, threads, divide):
    """Adds the efficiency of the call and of the copy for each number of threads.  divide: ratios by that number."""
    for r in records:
        for key, kind in (("efficiency", ""), ("copy efficiency", "copy ")):
            speedup = {n: r["ratios"][f"{kind}1 / {kind}{n}"]["median"] for n in threads[1:]}
            r[key] = {str(n): s / n if divide else s for n, s in speedup.items()}
    return records


def pay_from(records, threads):
    """For each call, where threads begin to win, interpolated between sizes.  None: never, or at every size."""
    found = []
    for name in dict.fromkeys(r["call"] for r in records):
        rows = [r for r in records if r["call"] == name]
        for n in threads[1:]:
            gain = np.array([np.log(r["ratios"][f"1 / {n}"]["median"]) for r in rows])
            lost = np.flatnonzero(gain <= 0)
            crossing = None
            if lost.size and lost[-1] + 1 < len(rows):
                i = lost[-1]
                share = gain[i] / (gain[i] - gain[i + 1])
                log = [np.log([r["bytes"], r["seconds"]["1"]["median"]]) for r in rows[i : i + 2]]
                size, seconds = np.exp(log[0] + share * (log[1] - log[0]))
                crossing = {"bytes": float(size), "serial seconds": float(seconds)}
            found.append({"call": name, "threads": n, "wins": [bool(g > 0) for g in gain], "from": crossing})
    return found


def print_strong(records):
    header = ["call", "bytes", "1 thread", "copy", *strong_header(records)]
    rows = []
    for r in records:
        row = [r["call"], bytes_text(r["bytes"])] + [time_text(r["seconds"][k]["median"]) for k in ("1", "copy 1")]
        rows.append(row + strong_cells(r))
    output.print_table("strong scaling: speedup (minimum), efficiency, that of a copy", header, rows)


def strong_header(records):
    return [t for n in records[0]["efficiency"] for t in (f"{n} threads", "efficiency", "copy's")]


def strong_cells(r):
    cells = []
    for n in r["efficiency"]:
        cells += [output.ratio_text(r["ratios"][f"1 / {n}"])]
        cells += [f"{r[key][n]:.0%}" for key in ("efficiency", "copy efficiency")]
    return cells


def print_weak(records):
    rows = [[r["call"], bytes_text(r["bytes"]), *weak_cells(r)] for r in records]
    header = ["call", "bytes per thread", *(t for n in records[0]["efficiency"] for t in (f"{n} threads", "copy's"))]
    output.print_table("weak scaling: time of one thread over that of all", header, rows)


def weak_cells(r):
    return [f"{r[key][n]:.0%}" for n in r["efficiency"] for key in ("efficiency", "copy efficiency")]


def pay_from_lines(result):
    built = result["built"]["parallel_from_ns"] / 1e3
    for f in result["records"]["pay from"]:
        crossing = f["from"]
        if crossing:
            text = f"from {bytes_text(crossing['bytes'])} on, {time_text(crossing['serial seconds'])} of one thread"
        else:
            text = "at every size" if all(f["wins"]) else "at no size: the largest loses, too"
        yield f"{f['call']}: {f['threads']} threads pay {text}; built in: {built:.0f} us, estimated"


# ---- A busy neighbour ------------------------------------------------------------------------------------------------


def times_of(call, seconds):
    """The times of calls, one after the other, for this many seconds."""
    times = []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or len(times) < 3:
        call()
        times.append(time.perf_counter() - start)
    return times


def beside_neighbour(name, nbytes, args):
    """The distribution of the time, without and with the neighbour in turns, over the median of one thread without."""
    call, _ = call_of(name, nbytes, args.dtype)
    times = {(n, busy): [] for busy in (False, True) for n in args.threads}
    with timing.neighbour() as process:
        for _ in range(3):
            for (n, busy), kept in times.items():
                process.send_signal(signal.SIGCONT if busy else signal.SIGSTOP)
                time.sleep(0.05)  # lets the scheduler settle
                kept += times_of(with_threads(n, call, parallel_from=0), args.seconds / 30)
            process.send_signal(signal.SIGSTOP)
    base = float(np.median(times[1, False]))
    rows = []
    for (n, busy), kept in times.items():
        found = {"mean": np.mean(kept), "median": np.median(kept), "p90": np.percentile(kept, 90), "max": np.max(kept)}
        over = {k: float(v) / base for k, v in found.items()}
        rows.append({"threads": n, "busy": busy, "calls": len(kept), **over})
    return {"call": name, "bytes": nbytes, "base seconds": base, "rows": rows}


NEIGHBOUR_HEADER = ["call", "bytes", "threads", "neighbour", "mean", "median", "90 %", "longest"]


def neighbour_rows(records):
    for r in records:
        for row in r["rows"]:
            numbers = (number_text(row[k]) for k in ("mean", "median", "p90", "max"))
            yield [r["call"], bytes_text(r["bytes"]), str(row["threads"]), "busy" if row["busy"] else "-", *numbers]


def print_neighbour(records):
    title = "with a busy neighbour: times over the median of one thread without it"
    output.print_table(title, NEIGHBOUR_HEADER, neighbour_rows(records))


# ---- Stores around the cache -----------------------------------------------------------------------------------------


def stores(name, nbytes, args):
    """Calls with ordinary stores and with stores around the cache, by all threads."""
    call, _ = call_of(name, nbytes, args.dtype)
    sizes = {"around": 1, "ordinary": sys.maxsize}
    return {kind: with_threads(args.threads[-1], call, cache_bytes=size) for kind, size in sizes.items()}


STORES_HEADER = ["call", "bytes of x", "of all arrays", "ordinary / around the cache"]


def stores_rows(records):
    for r in records:
        ratio = output.ratio_text(r["ratios"]["ordinary / around"])
        yield [r["call"], bytes_text(r["bytes"]), bytes_text(STREAMING[r["call"]] * r["bytes"]), ratio]


def print_stores(records):
    output.print_table("ordinary stores over stores around the cache: time", STORES_HEADER, stores_rows(records))
    cache = built_in()["cache_bytes"]
    console.print(f"built in: around from {bytes_text(cache)} on, of all arrays together; dropout tries both by itself")


# ---- Documentation ---------------------------------------------------------------------------------------------------


def markdown(result):
    records = result["records"]
    rows = [
        [r["call"], bytes_text(r["bytes"]), time_text(r["seconds"]["1"]["median"]), *strong_cells(r)]
        for r in records["strong"]
    ]
    parts = [
        f"Strong scaling, {result['dtype']}, on {machine.title(result['machine'])}: "
        "speedup (its minimum), efficiency, that of a copy.",
        output.markdown_table(["call", "bytes", "1 thread", *strong_header(records["strong"])], rows, left=1),
    ]
    return "\n\n".join(parts)


def plot(records, found, path):
    """Speedup over bytes, with a panel for each number of threads."""
    strong = records["strong"]
    threads = list(strong[0]["efficiency"])
    fig, axes = output.figure(1, max(1, len(threads)), machine.title(found), size=(6.5, 4))
    for ax, n in zip(axes[0], threads, strict=False):
        for k, name in enumerate(dict.fromkeys(r["call"] for r in strong)):
            rows = [r for r in strong if r["call"] == name]
            ax.plot(
                [r["bytes"] for r in rows],
                [r["efficiency"][n] * int(n) for r in rows],
                "o-",
                color=f"C{k}",
                label=name,
                markersize=4,
            )
        rows = [r for r in strong if r["call"] == strong[0]["call"]]
        ax.plot([r["bytes"] for r in rows], [r["copy efficiency"][n] * int(n) for r in rows], "k--", label="copy")
        ax.axhline(1, color="k", linewidth=0.5)
        ax.set(title=f"{n} threads", xlabel="bytes of x", ylabel="speedup over one thread", xscale="log", ylim=0)
    output.save(fig, path)
