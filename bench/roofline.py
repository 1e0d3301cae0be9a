"""The bandwidth of each cache level, and how far every kernel is from it.

    python -m bench roofline [--quick] [--dtypes float32] [--threads 1 2] [--markdown]

Bandwidth is measured with NumPy's own loops (bench/bandwidth.py): the better one of ordinary and non-temporal copies.
What a kernel has to read and to copy is in bench/shapes/roofline.toml.  Its limit is the time of these reads and copies
in the same level and by as many threads, measured in turns with the kernel.  A ratio below 1 is no error: kernels
prefetch, and memmove does not always.

`core` is the time of the kernel on data in the second-level cache, by one thread, divided by the number of threads.  If
a kernel takes more than 1.3 times its limit, `time goes to` says why: to arithmetic, if core alone explains the time;
to both in turns, if core and limit together do; otherwise to neither, which means waiting, or traffic that was not
counted.
"""

import math

import numpy as np

from bench import bandwidth, cases, machine, output, timing
from bench.output import bytes_text, console

FAR = 1.3  # times the limit: a kernel that takes longer is explained
FROM = "L2"  # a call takes microseconds: too long for what L1 holds


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=machine.thread_counts())
    parser.add_argument("--levels", nargs="+", choices=bandwidth.levels(), default=list(bandwidth.levels()))
    timing.add_arguments(parser)
    parser.set_defaults(rounds=15, seconds=6.0)


def run(args):
    found = output.start()
    config = cases.shapes("roofline")
    dtypes = args.dtypes or config["quick" if args.quick else "full"]["dtype"]
    dtypes = [dtype for dtype in dtypes if not cases.missing(dtype)]
    with bandwidth.streaming_copy() as streaming:
        bandwidths = measure_bandwidths(args, streaming)
        print_bandwidths(bandwidths)
        kernels = measure_kernels(config["kernel"], dtypes, args, streaming)
    for dtype in dtypes:
        print_kernels(dtype, [r for r in kernels if r["dtype"] == dtype])
    for sentence in explanations(kernels):
        console.print(sentence)
    records = {"bandwidth": bandwidths, "kernels": kernels}
    output.finish(args, found, records, lambda path: plot(records, found, path))
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'records': records})}")


# ---- Bandwidth -------------------------------------------------------------------------------------------------------


def places(args, first=None):
    """(level, bytes of its working set, threads)"""
    sizes = {level: size for level, size in bandwidth.levels().items() if level in args.levels}
    levels = [level for level in sizes if not first or level >= first]  # their names are in order
    return [(level, sizes[level], n) for level in levels for n in args.threads]


def measure_bandwidths(args, streaming):
    records = []
    for level, size, n in output.progress(places(args), "bandwidth"):
        calls, moved = bandwidth.contenders(level, size, n, streaming)
        samples = timing.interleave(calls, args)
        rates = {
            name: timing.summary(moved[name] / s) | {"best": float(moved[name] / s.min())}
            for name, s in samples.items()
        }
        records.append({"level": level, "bytes": size, "threads": n, "rates": rates})
    return records


def bandwidth_rows(records):
    for r in records:
        rates = [r["rates"].get(kind) for kind in RATES]
        texts = (f"{rate['median'] / 1e9:.1f} ({rate['best'] / 1e9:.1f})" if rate else "-" for rate in rates)
        yield [r["level"], bytes_text(r["bytes"]), str(r["threads"]), *texts]


RATES = ("copy", "streaming copy", "read", "write")
BANDWIDTH_HEADER = ["level", "working set", "threads", *RATES]


def print_bandwidths(records):
    output.print_table("GB/s, median (best); a copy counts both ways", BANDWIDTH_HEADER, bandwidth_rows(records))


# ---- Kernels ---------------------------------------------------------------------------------------------------------


def shape_of(kernel, nbytes, dtype):
    """A shape whose arrays have about so many bytes, and a small one, whose time is that of a call."""
    n = max(64, nbytes // kernel["arrays"] // cases.numpy_dtype(dtype).itemsize)
    if kernel["op"] == "dropout":
        return n, 64
    if kernel["layout"] == "NHWC":
        return f"{n // 64},64", "1,64"
    return f"32,{max(1, n // (32 * 784))},784 NCHW", "2,1,8 NCHW"


def measure_kernels(kernels, dtypes, args, streaming):
    """Each kernel in turns with the copy and the read of its level; L2 by one thread, as pyreg uses no more there."""
    chosen = [(d, *p) for d in dtypes for p in places(args, FROM) if not (p[0] == "L2" and p[2] > 1)]
    moved = {}

    def contenders(case):
        dtype, level, size, n = case
        calls, moved[case] = bandwidth.contenders(level, size, n, streaming)
        del calls["write"]  # no kernel only writes
        return calls | kernel_calls(kernels, dtype, size, n), ()

    samples = timing.in_passes(chosen, contenders, args, lambda steps: output.progress(steps, "kernels"))
    records, core = [], {}
    for case, s in zip(chosen, samples, strict=True):
        copies = [s[kind] / moved[case][kind] for kind in ("copy", "streaming copy")]
        copy, read = min(copies, key=np.median), s["read"] / moved[case]["read"]
        for kernel in kernels:
            record = against_limit(kernel, *case, s, copy, read)
            if record["level"] == "L2":
                core[record["kernel"], record["dtype"]] = record["seconds"]["median"]
            record["core"] = core.get((record["kernel"], record["dtype"]), math.nan) / record["threads"]
            records.append(record)
    return records


def against_limit(kernel, dtype, level, size, threads, samples, copy, read):
    """copy, read: samples of seconds per byte."""
    name, (shape, _) = kernel["name"], shape_of(kernel, size, dtype)
    elements = cases.load(kernel["op"]).elements(shape)
    seconds = (samples[name] - np.median(samples[f"call of {name}"])) / elements
    limit = cases.numpy_dtype(dtype).itemsize * (kernel["reads"] * read + 2 * kernel["copies"] * copy)
    return {
        "kernel": name,
        "dtype": dtype,
        "level": level,
        "threads": threads,
        "shape": shape,
        "seconds": timing.summary(seconds),
        "limit": timing.summary(limit),
        "ratios": {"kernel / limit": timing.summary(seconds / limit)},
    }


def kernel_calls(kernels, dtype, size, threads):
    """Each kernel on data of the level, and on a few elements."""
    calls = {}
    for kernel in kernels:
        op = cases.load(kernel["op"])
        large, small = (op.contenders(dtype=dtype, shape=s, threads=threads) for s in shape_of(kernel, size, dtype))
        calls[kernel["name"]] = large[kernel["call"]]
        calls[f"call of {kernel['name']}"] = small[kernel["call"]]
    return calls


def bound(record):
    """What the time of the kernel is spent on: memory and arithmetic may hide behind each other, or take turns."""
    seconds, limit, core = record["seconds"]["median"], record["limit"]["median"], record["core"]
    if seconds <= FAR * limit:
        return "memory"
    if core >= seconds / FAR:
        return "arithmetic"
    return "both in turns" if core + limit >= seconds / FAR else "neither"


def kernel_rows(records):
    for r in records:
        ns = (f"{value * 1e9:.3f}" for value in (r["seconds"]["median"], r["limit"]["median"], r["core"]))
        yield [
            r["kernel"],
            r["level"],
            str(r["threads"]),
            *ns,
            output.ratio_text(r["ratios"]["kernel / limit"]),
            bound(r),
        ]


KERNEL_HEADER = ["kernel", "level", "threads", "ns/elem", "limit", "core", "/ limit", "time goes to"]


def print_kernels(dtype, records):
    output.print_table(f"{dtype}: kernels against the bandwidth", KERNEL_HEADER, kernel_rows(records))


def explanations(records):
    """A sentence for each kernel that is far from its limit, in memory and with all threads."""
    most = max((r["threads"] for r in records), default=1)
    for kernel in cases.shapes("roofline")["kernel"]:
        mine = [r for r in records if (r["kernel"], r["level"], r["threads"]) == (kernel["name"], "memory", most)]
        far = {r["dtype"]: r for r in mine if r["ratios"]["kernel / limit"]["median"] > FAR}
        what = ", ".join(f"{d} {r['ratios']['kernel / limit']['median']:.2f}x, {bound(r)}" for d, r in far.items())
        if far:
            yield f"{kernel['name']} ({what}): {kernel['slower']}"


def markdown(result):
    """The tables of the documentation: bandwidth, and the kernels in float32."""
    records = result["records"]
    kernels = [r for r in records["kernels"] if r["dtype"] == records["kernels"][0]["dtype"]]
    return "\n\n".join(
        [
            f"Bandwidth in GB/s, median (best), on {machine.title(result['machine'])}; a copy counts both ways.",
            output.markdown_table(BANDWIDTH_HEADER, bandwidth_rows(records["bandwidth"]), left=1),
            f"Kernels, {kernels[0]['dtype']}: nanoseconds per element, without the time of a call.",
            output.markdown_table(KERNEL_HEADER, kernel_rows(kernels), left=1),
            "In memory and with all threads, these take more than 1.3 times the limit:",
            "\n".join(f"* {sentence}" for sentence in explanations(records["kernels"])) or "None.",
        ]
    )


def plot(records, found, path):
    """Left: bandwidth over levels.  Right: each kernel's distance from its limit."""
    fig, axes = output.figure(1, 2, machine.title(found), size=(6.5, 4.2))
    left, right = axes[0]
    threads = list(dict.fromkeys(r["threads"] for r in records["bandwidth"]))
    for k, kind in enumerate(RATES):
        for n in threads:
            chosen = [r for r in records["bandwidth"] if r["threads"] == n]
            rates = [r["rates"].get(kind, {}).get("median", math.nan) / 1e9 for r in chosen]
            style = "o-" if n == threads[-1] else "s--"
            left.plot(
                [r["level"] for r in chosen], rates, style, color=f"C{k}", label=f"{kind}, {n} threads", markersize=4
            )
    left.set(title="bandwidth", ylabel="GB/s", yscale="log")
    left.legend(fontsize=7)
    last, most = (records["kernels"][-1][k] for k in ("level", "threads"))
    kernels = [r for r in records["kernels"] if (r["level"], r["threads"]) == (last, most)]
    for k, dtype in enumerate(dict.fromkeys(r["dtype"] for r in kernels)):
        chosen = [r for r in kernels if r["dtype"] == dtype]
        right.plot(
            [r["ratios"]["kernel / limit"]["median"] for r in chosen],
            [r["kernel"] for r in chosen],
            "o",
            color=f"C{k}",
            label=dtype,
        )
    right.axvline(1, color="k", linewidth=1)
    right.invert_yaxis()
    right.set(title=f"{last}, {most} threads", xlabel="time over the limit of reads and copies")
    right.legend(fontsize=7)
    output.save(fig, path, legend=False)
