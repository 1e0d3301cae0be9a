"""Time ops against their peers.

    python -m bench compare [dropout] [batchnorm] [jax] [--quick] [--shapes 1e6 1.6e7] [--dtypes float32] [--markdown]

Results are checked first.  Then contenders take turns (A B C, A B C, ...), and a ratio is taken within each turn: the
tables give its median, and in brackets its minimum.
"""

import itertools

from bench import cases, machine, output, timing
from bench.output import console, label, number_text, time_text

OPS = tuple(cases.OPS)
PEERS = ("NumPy", "PyTorch", "Flax", "oneDNN")


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {' '.join(OPS)}; all by default")
    parser.add_argument("--shapes", nargs="+", help='for example 1e6, "32,64,56,56 NCHW", "dropout 1000"; one OP then')
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", help="of dropout")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, machine.cpus()}))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS, help=f"any of {' '.join(PEERS)}")
    timing.add_arguments(parser)


def run(args):
    ops = args.ops or OPS
    if unknown := set(ops) - set(OPS):
        raise SystemExit(f"no op {' '.join(unknown)}; there are {' '.join(OPS)}")
    if args.shapes and len(ops) > 1:
        raise SystemExit(f"--shapes was given for {' '.join(ops)}; wanted one op")
    found = output.start()
    for peer in args.peers:
        if not cases.installed(peer):
            console.print(f"[yellow]skipped[/] {peer}: it is not installed")
    args.peers = [peer for peer in args.peers if cases.installed(peer)]
    records, details, names = [], [], []
    for name in ops:
        if name == "jax" and not cases.installed("Flax"):
            console.print("[yellow]skipped[/] jax: Flax is not installed")
            continue
        op, params = cases.load(name), parameters(name, args)
        check(op, params)
        records += measure(name, op, params, args)
        console.print(op.NOTES, style="dim")
        if hasattr(op, "details"):
            details += print_details(list(op.details(params["shape"])))
        names.append(name)
    print_losses(records)

    def plot_all(path):
        for name in names:
            chosen = [r for r in records if r["op"] == name]
            plot(name, chosen, found, path.with_stem(f"{path.stem}-{name}") if len(names) > 1 else path)

    output.finish(args, found, records, plot_all, details=details)
    if args.markdown:
        for name in names:
            print(f"\n{markdown({'machine': found, 'records': records}, name)}")


def parameters(name, args):
    """The parameters of the file in shapes/, or those of the command line."""
    params = cases.shapes(name)["quick" if args.quick else "full"]
    params |= {
        k: v for k, v in (("dtype", args.dtypes), ("shape", args.shapes), ("rate", args.rates)) if v and k in params
    }
    if name == "dropout":
        params["shape"] = [output.integer(n) for n in params["shape"]]
    for dtype in params["dtype"]:
        if reason := cases.missing(dtype):
            console.print(f"[yellow]skipped[/] {dtype}: {reason}")
    params["dtype"] = [dtype for dtype in params["dtype"] if not cases.missing(dtype)]
    return params | {"threads": [machine.cpus()] if name == "jax" else args.threads}


def each(params, names):
    for values in itertools.product(*(params[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def check(op, params):
    for chosen in each(params, op.TABLE_BY):
        for right in op.check(**chosen):
            console.print(f"[green]checked[/] {' '.join(map(str, chosen.values()))}: {right}")


def measure(name, op, params, args):
    """A record for each combination of the parameters."""
    pairs = [(a.format(s), b.format(s)) for s in op.SUBJECTS for _, a, b in op.COLUMNS if b]

    def contenders(case):
        calls = op.contenders(**case, peers=args.peers)
        return calls, [pair for pair in pairs if calls.keys() >= set(pair)]

    chosen = list(each(params, [*op.TABLE_BY, *(p for p in params if p not in op.TABLE_BY)]))
    samples = timing.in_passes(chosen, contenders, args, lambda steps: output.progress(steps, name))
    records = [
        {"op": name, **case, "elements": op.elements(case["shape"]), **timing.compared(s, pairs)}
        for case, s in zip(chosen, samples, strict=True)
    ]
    for table in each(params, op.TABLE_BY):
        print_table(name, op, [r for r in records if table.items() <= r.items()])
    return records


# ---- Tables ----------------------------------------------------------------------------------------------------------


def cells(record, subject, name, over):
    """The time and the time per element, or the ratio; None if it was not measured."""
    name = name.format(subject)
    if over is None:
        seconds = record["seconds"].get(name, {}).get("median")
        return [time_text(seconds), f"{seconds / record['elements'] * 1e9:.3f}"] if seconds else None
    ratio = record["ratios"].get(f"{name} / {over.format(subject)}")
    return [output.ratio_text(ratio)] if ratio else None


def print_table(name, op, records):
    # A peer that was not measured has no column.
    columns = [c for c in op.COLUMNS if any(cells(r, s, *c[1:]) for r in records for s in op.SUBJECTS)]
    header = ["shape", "threads", ""]
    for text, _, over in columns:
        header += [text] if over else [text, "ns/elem"]
    rows = []
    for record in records:
        for subject in op.SUBJECTS:
            row = [label(record["shape"]), str(record["threads"]), subject]
            for column in columns:
                row += cells(record, subject, *column[1:]) or ["-"] * (1 if column[2] else 2)
            rows.append(row)
    title = ", ".join(f"{by} {records[0][by]}" for by in op.TABLE_BY)
    output.print_table(f"{name}: {title}", header, rows, left=3)


def print_details(details):
    """What a module that has details() says beside the times."""
    rows = [["" if v is None else v if isinstance(v, str) else number_text(v) for v in d.values()] for d in details]
    output.print_table("memory and compilation", list(details[0]), rows, left=2)
    return details


def losses(records):
    """Where a peer was quicker, the worst first: record, name of the ratio, ratio."""
    found = [
        (record, name, ratio)
        for record in records
        for name, ratio in record["ratios"].items()
        if name.startswith(cases.load(record["op"]).PEERS) and ratio["median"] < 1
    ]
    return sorted(found, key=lambda loss: loss[2]["median"])


def loss_rows(records):
    for record, name, ratio in losses(records):
        by = " ".join(str(record[k]) for k in ("dtype", "rate") if k in record)
        yield [record["op"], name, by, label(record["shape"]), str(record["threads"]), output.ratio_text(ratio)]


LOSS_HEADER = ["op", "ratio of times", "dtype, rate", "shape", "threads", "median (min)"]


def print_losses(records):
    rows = list(loss_rows(records))
    if rows:
        output.print_table("Where a peer is quicker", LOSS_HEADER, rows, left=4)


def markdown(result, name):
    """The table of the documentation: the first value of everything in TABLE_BY, all threads."""
    op, records = cases.load(name), [r for r in result["records"] if r["op"] == name]
    if not records:
        raise KeyError(name)
    first = {by: records[0][by] for by in op.TABLE_BY}
    rows = [r for r in records if first.items() <= r.items()]
    rows = [r for r in rows if r["threads"] == max(r["threads"] for r in rows)]
    columns = {title: key for title, key in op.MARKDOWN.items() if any(key in r["seconds"] for r in rows)}
    what = ", ".join(f"{by} {value}" for by, value in first.items())
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], op.PACKAGES)}"
    body = [
        [
            label(row["shape"]),
            *(time_text(row["seconds"][k]["median"]) if k in row["seconds"] else "" for k in columns.values()),
        ]
        for row in rows
    ]
    caption = f"{what.capitalize()}, {rows[0]['threads']} threads, on {where}."
    return f"{caption}\n\n{output.markdown_table(['shape', *columns], body)}"


# ---- Plot ------------------------------------------------------------------------------------------------------------


def plot(name, records, found, path):
    """Time per element, with all threads.  Sizes have a panel for each dtype, other shapes one for each subject."""
    op = cases.load(name)
    first = {by: records[0][by] for by in op.TABLE_BY if by != "dtype"}  # of several rates, the first
    most = max(r["threads"] for r in records)
    records = [r for r in records if first.items() <= r.items() and r["threads"] == most]
    dtypes = list(dict.fromkeys(r["dtype"] for r in records))
    sizes = not isinstance(records[0]["shape"], str)
    panels = [(dtype, op.SUBJECTS) for dtype in dtypes] if sizes else [(dtypes[0], [s]) for s in op.SUBJECTS]
    fig, axes = output.figure(len(panels), 1, machine.title(found), size=(9, 3.4))
    for ax, (dtype, subjects) in zip(axes[:, 0], panels, strict=True):
        chosen = [r for r in records if r["dtype"] == dtype]
        for k, (contender, text) in enumerate(plotted(op, subjects).items()):
            rows = [r for r in chosen if contender in r["seconds"]]
            ns = [r["seconds"][contender]["median"] / r["elements"] * 1e9 for r in rows]
            style = ("s" if contender.startswith(op.PEERS) else "o") + "-" * sizes
            if rows:
                ax.plot([r["shape"] for r in rows], ns, style, color=f"C{k}", label=text, markersize=5)
        what = ", ".join([*([] if sizes else subjects), dtype, *(f"{a} {b}" for a, b in first.items())])
        ax.set(title=f"{name}: {what}, {most} threads", ylabel="time per element [ns]", yscale="log")
        if sizes:
            ax.set(xlabel="elements", xscale="log")
        else:
            ax.tick_params("x", rotation=90, labelsize=7)
            ax.label_outer()
    output.save(fig, path)


def plotted(op, subjects):
    """The contenders of the tables, and what they are called in a plot.  A single subject needs no name."""
    names = {n.format(s): n for s in subjects for _, *pair in op.COLUMNS for n in pair if n}
    if len(subjects) > 1:
        return {name: name for name in names}
    return {name: n.replace("{}", "pyreg" if n.startswith("{}") else "").strip() for name, n in names.items()}
