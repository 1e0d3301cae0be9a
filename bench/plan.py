"""What the figures of this machine predict for larger ones.

    python -m bench plan [--cores 16 64 128] [--nodes 1 2 2] [--node-bandwidth 150e9] [--bytes 1e7 1e9]

    time(p) = call + region * log2(p) + max(core / p, traffic / min(p * one, memory))

These are measured here, by one thread:

    call      the time of a call on a few elements
    core      the time of all elements of an array, if they were in the second-level cache
    one       the bandwidth of one core, of copies and of reads, in the level that holds the arrays
    region    what a parallel region of two threads costs

These are assumed: the bandwidth of a NUMA node (`memory`); that caches have no such limit, and are as large as here;
and that a region costs the same amount once more each time that the number of threads doubles.  Where threads do not
pay, p is 1.  The formula is also printed for the threads of this machine, beside the times that they take.  This shows
how far it can be trusted.

A page lies on the node of the thread that first writes it, and pyreg's threads claim chunks in any order.  `one node`:
one thread has first written the whole array, as NumPy and the loaders of PyTorch do; then all cores share the memory of
that node.  `interleaved`: the pages are spread over the nodes (numactl --interleave=all); then at least half are
remote.
"""

import math

import numpy as np

from bench import bandwidth, cases, machine, output, timing
from bench.output import bytes_text, console, number_text, time_text
from bench.roofline import kernel_calls, shape_of
from bench.scaling import call_of

REMOTE = 0.7  # the share of the bandwidth that is left where pages are interleaved over several nodes: an assumption
SHARED_FROM = timing.BUILT["parallel_from_ns"] * 1e-9


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--cores", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 2], help="NUMA nodes of each")
    parser.add_argument(
        "--node-bandwidth", type=float, default=150e9, help="bytes/s of a node (%(default).3g; 8 channels)"
    )
    parser.add_argument("--bytes", type=output.integer, nargs="+", default=[10**7, 10**9], help="of x, float32")
    timing.add_arguments(parser)


def run(args):
    if len(args.cores) != len(args.nodes):
        raise SystemExit(f"--cores has {len(args.cores)} numbers and --nodes {len(args.nodes)}; wanted as many of both")
    found = output.start()
    measured = measure(args)
    print_measured(measured)
    checked = check(measured, args)
    print_checked(checked)
    kernels, machines = measured["kernels"], list(zip(args.cores, args.nodes, strict=True))
    records = [
        {
            "kernel": name,
            "bytes": n,
            "cores": p,
            "nodes": nodes,
            "pages": pages,
            **predict(measured, name, n, p, node_rate),
        }
        for name in kernels
        for n in args.bytes
        for p, nodes in machines
        for pages, node_rate in placements(nodes, args.node_bandwidth)
    ]
    print_predicted(records)
    everything = {"predicted": records, "measured": measured, "checked": checked}
    output.finish(args, found, everything, lambda path: plot(records, found, path))
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'records': everything})}")


def placements(nodes, rate):
    """Where the pages are, and the bandwidth of all memory that holds them."""
    yield "one node", rate
    if nodes > 1:
        yield "interleaved", nodes * rate * REMOTE


# ---- Measured --------------------------------------------------------------------------------------------------------


def chosen_kernels():
    return [k for k in cases.shapes("roofline")["kernel"] if k.get("layout", "NHWC") == "NHWC"]


def measure(args):
    sizes, kernels = bandwidth.levels(), chosen_kernels()
    calls = kernel_calls(kernels, "float32", sizes["L2"], 1)
    found = {name: s.min() for name, s in timing.interleave(calls, args).items()}
    measured = {"region": region(args), "levels": {}, "kernels": {}}
    for level in list(sizes)[1:]:  # a call takes too long for what the first level holds
        team = bandwidth.Team(1, sizes[level])
        moved = {kind: team.run(kind) for kind in ("copy", "read")}
        rates = timing.interleave({kind: lambda kind=kind, team=team: team.run(kind) for kind in moved}, args)
        best = {kind: float(moved[kind] / s.min()) for kind, s in rates.items()}
        measured["levels"][level] = {"bytes": machine.caches().get(level), **best}
    for kernel in kernels:
        name, op = kernel["name"], cases.load(kernel["op"])
        elements = op.elements(shape_of(kernel, sizes["L2"], "float32")[0])
        call = float(found[f"call of {name}"])
        core = (float(found[name]) - call) / elements
        traffic = {k: kernel[k] for k in ("arrays", "reads", "copies")}
        measured["kernels"][name] = {"call": call, "core": core, **traffic}
    return measured


def region(args):
    """Two threads against one on a small array: what it costs to start and to join them."""
    if machine.cpus() < 2:
        return 5e-6
    _, copy = call_of("philox", 1 << 19)  # two chunks
    calls = {n: timing.with_threads(n, copy, parallel_from=0) for n in (1, 2)}
    samples = timing.interleave(calls, args)
    return float(max(1e-6, np.median(samples[2]) - np.median(samples[1]) / 2))


def print_measured(measured):
    for level, rates in measured["levels"].items():
        console.print(
            f"measured: one core, {level}: copy {rates['copy'] / 1e9:.1f}, read {rates['read'] / 1e9:.1f} GB/s"
        )
    console.print(f"measured: a parallel region of two threads {time_text(measured['region'])}")
    rows = [[name, time_text(k["call"]), f"{k['core'] * 1e9:.3f}"] for name, k in measured["kernels"].items()]
    output.print_table("measured: one core", ["kernel", "call", "ns per element"], rows)


# ---- Predicted -------------------------------------------------------------------------------------------------------


def predict(measured, name, nbytes, cores, node_rate):
    """node_rate: bytes per second of all the memory that the pages are on."""
    k, levels = measured["kernels"][name], measured["levels"]
    arithmetic = k["core"] * nbytes / 4
    fits = [level for level in levels.values() if (level["bytes"] or math.inf) >= k["arrays"] * nbytes]
    level = fits[0]
    most = math.inf if level["bytes"] else node_rate

    def memory(p):
        reads, copies = (min(p * level[kind], most) for kind in ("read", "copy"))
        return k["reads"] * nbytes / reads + 2 * k["copies"] * nbytes / copies

    one = k["call"] + max(arithmetic, memory(1))
    if one < SHARED_FROM:
        cores = 1
    extra = measured["region"] * math.log2(cores)
    seconds = k["call"] + extra + max(arithmetic / cores, memory(cores))
    parts = {"call and region": k["call"] + extra, "arithmetic": arithmetic / cores, "memory": memory(cores)}
    return {"seconds": seconds, "speedup": one / seconds, "bound": max(parts, key=parts.get)}


def check(measured, args):
    """The formula against this machine, with the bandwidth of all its CPUs instead of that of a node."""
    threads = machine.cpus()
    level = bandwidth.levels()["memory"]
    team = bandwidth.Team(threads, level // threads)
    moved = team.run("copy")
    node = moved / timing.interleave({"copy": lambda: team.run("copy")}, args)["copy"].min()
    records = []
    for name in measured["kernels"]:
        for nbytes in (10**6, level // 2):
            call, _ = call_of(name.split()[0], nbytes)
            counts = sorted({1, threads})
            samples = timing.interleave({n: timing.with_threads(n, call) for n in counts}, args)
            for n in counts:
                predicted = predict(measured, name, nbytes, n, node)["seconds"]
                seconds = float(samples[n].min())
                records.append(
                    {"kernel": name, "bytes": nbytes, "threads": n, "seconds": seconds, "predicted": predicted}
                )
    return records


def print_checked(checked):
    rows = [
        [
            r["kernel"],
            bytes_text(r["bytes"]),
            str(r["threads"]),
            time_text(r["seconds"]),
            time_text(r["predicted"]),
            number_text(r["seconds"] / r["predicted"]),
        ]
        for r in checked
    ]
    header = ["kernel", "bytes of x", "threads", "measured (best)", "the formula", "measured / formula"]
    output.print_table("the formula on this machine", header, rows)


HEADER = ["kernel", "bytes of x", "cores", "nodes", "pages on", "time", "speedup", "efficiency", "bound by"]


def predicted_rows(records):
    for r in records:
        numbers = [time_text(r["seconds"]), number_text(r["speedup"]), f"{r['speedup'] / r['cores']:.0%}"]
        where = [str(r["cores"]), str(r["nodes"]), r["pages"]]
        yield [r["kernel"], bytes_text(r["bytes"]), *where, *numbers, r["bound"]]


def print_predicted(records):
    output.print_table(
        "PREDICTED, not measured: float32, over one core of the same machine", HEADER, predicted_rows(records)
    )


def markdown(result):
    records = result["records"]
    rows = list(predicted_rows(records["predicted"]))
    errors = [r["seconds"] / r["predicted"] for r in records["checked"]]
    return (
        f"Predicted from one core of {machine.title(result['machine'])}. On that machine itself measured times are "
        f"{min(errors):.2f} to {max(errors):.2f} times the formula's.\n\n{output.markdown_table(HEADER, rows, left=1)}"
    )


def plot(records, found, path):
    """Predicted speedup over cores, for the largest array."""
    fig, axes = output.figure(1, 1, f"predicted from {machine.title(found)}", size=(7, 4))
    ax, largest = axes[0][0], max(r["bytes"] for r in records)
    for k, name in enumerate(dict.fromkeys(r["kernel"] for r in records)):
        for pages, style in (("one node", "o-"), ("interleaved", "s--")):
            rows = [r for r in records if (r["kernel"], r["pages"], r["bytes"]) == (name, pages, largest)]
            if rows:
                ax.plot(
                    [r["cores"] for r in rows],
                    [r["speedup"] for r in rows],
                    style,
                    color=f"C{k}",
                    label=f"{name}, {pages}",
                    markersize=4,
                )
    ax.set(
        title=f"{bytes_text(largest)}, predicted",
        xlabel="cores",
        ylabel="speedup over one core",
        xlim=0,
        ylim=0,
    )
    output.save(fig, path)
