"""What is printed and written: tables, JSON files, plots."""

import json
import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench import machine
from bench.timing import UNSTEADY, unsteady

console = Console(width=max(Console().width, 150), highlight=False)


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a plot: .svg, .png or .pdf")
    parser.add_argument("--markdown", action="store_true", help="also print the table of the documentation")


def start():
    """Prints the description of the machine and returns it."""
    found = machine.describe()
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {bytes_text(v) if name == 'caches' else v}" for k, v in value.items() if v) or "-"
        console.print(f"[dim]{name:>22}[/]  {value}")
    if found["busy CPUs at the start"] > machine.BUSY:
        busy = found["busy CPUs at the start"]
        console.print(f"[yellow]{busy} CPUs are busy with something else: another run may disagree in any figure[/]")
    return found


def progress(cases, text):
    return track(cases, text, console=console, transient=True)


def finish(args, found, records, plot=None, **more):
    """Writes the files that were asked for, and says whether the machine was too noisy."""
    warn_of_noise(records)
    if args.json:
        about = {"command": args.command, "quick": args.quick, "machine": found, **more}
        write_json(args.json, {**about, "records": records})
    if args.plot and plot:
        plot(args.plot)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_text(rounded(content)) + "\n")
    console.print(f"wrote {path}")


def json_text(value, depth=0):
    """JSON with one line for each record."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(map(json.dumps, value)) + "\n]"
    if isinstance(value, dict) and value and depth < 2:
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {json_text(v, depth + 1)}" for k, v in value.items()) + "\n}"
    return json.dumps(value)


def rounded(value):
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def ratios(value):
    """All summaries of ratios in records, however deep they lie."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "ratios":
                yield from inner.values()
            else:
                yield from ratios(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from ratios(inner)


def warn_of_noise(records):
    found = list(ratios(records))
    doubtful = [r["spread"] for r in found if unsteady(r)]
    if doubtful:
        console.print(
            f"[yellow]{len(doubtful)} of {len(found)} ratios are marked ~: their medians moved by more than "
            f"{UNSTEADY:.0%} within the run (the worst by {max(doubtful):.0%}), so a second run may disagree. "
            "The machine was not quiet, or the case is not steady.[/]"
        )


# ---- Texts -----------------------------------------------------------------------------------------------------------


def number_text(value):
    """Three significant digits without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def time_text(seconds):
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{number_text(seconds * scale)} {unit}"


def bytes_text(n):
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} B"


def ratio_text(ratio):
    """The median, and in brackets the minimum; ~ where it is not steady."""
    return f"{'~' * unsteady(ratio)}{number_text(ratio['median'])} ({number_text(ratio['min'])})"


def label(value):
    return value if isinstance(value, str) else f"{value:,}"


def integer(text):
    return int(float(text))  # 1.6e7 is easier to read


# ---- Tables ----------------------------------------------------------------------------------------------------------


def print_table(title, header, rows, left=1):
    """All columns but the first few are aligned to the right."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for i, text in enumerate(header):
        table.add_column(text, justify="left" if i < left else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(header, rows, left=0):
    lines = [header, ["---" if i < left else "---:" for i in range(len(header))], *rows]
    return (
        "\n".join("| " + " | ".join(line) + " |" for line in lines)
        .replace("| --- ", "|---")
        .replace("| ---: ", "|---:")
    )


# ---- Plots -----------------------------------------------------------------------------------------------------------


def figure(rows, columns, title, size=(6, 3.6)):
    """A matplotlib figure and its axes; no window is ever opened."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {
        "svg.hashsalt": "pyreg",
        "svg.fonttype": "none",
    }  # the same figures give the same file; text stays text
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False, layout="constrained"
    )
    fig.suptitle(title, fontsize=9, x=0.01, ha="left")
    return fig, axes


def save(fig, path, legend=True):
    import matplotlib.pyplot as plt

    axes = fig.axes
    for ax in axes:
        ax.grid(visible=True, alpha=0.3)
    if legend:
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        fig.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(fig)
    console.print(f"wrote {path}")
