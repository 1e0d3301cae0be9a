"""Run all benchmarks and bring the documentation up to date: its tables and its plots.

    python -m bench report [--quick] [--only compare plan] [--no-run]

The figures of each command go to a JSON file and a plot in a folder of docs/performance/ that has the name of the
machine.  Then every part of README.md and of the pages in docs/ that lies between <!-- bench: NAME --> and
<!-- /bench --> is written anew from the files of all machines; the rest of the pages is left alone.  --no-run writes
these parts from the files that are there.  --quick only touches docs/performance*.md.  All of it takes half an hour on
a quiet machine with 2 CPUs.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from bench import accuracy, cases, compare, imports, machine, output, pictures, plan, roofline, scaling
from bench.output import console

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "compare": [],
    "train_step": ["--neighbour"],
    "accuracy": [],
    "roofline": [],
    "scaling": ["--neighbour", "--stores"],
    "plan": [],
    "imports": [],
    "train_step_torch": ["--framework", "torch"],
    "train_step_others": ["--framework", "others"],
}


def add_arguments(parser):
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--no-run", action="store_true", help="only write the documents, from the files that are there")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs" / "performance", help="where the machines' folders are"
    )
    parser.add_argument("--documents", type=Path, nargs="*", help="Markdown files to bring up to date")


def run(args):
    failed = [] if args.no_run else [name for name in args.only if not measure(name, args)]
    results = {folder: read(folder) for folder in sorted(args.docs.iterdir()) if any(folder.glob("*.json"))}
    if args.documents is None:
        args.documents = sorted((ROOT / "docs").glob("performance*.md")) if args.quick else documents()
        pictures.draw_steps(ROOT / "docs" / "pictures" / "steps.svg")
    for document in args.documents:
        text = document.read_text()
        document.write_text(filled(text, results, document.parent))
        console.print(f"wrote {document}")
    if failed:
        raise SystemExit(f"{' '.join(failed)} failed; the files from before are still there")


def documents():
    """The pages that have figures."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if "<!-- bench: " in page.read_text()]


def read(folder):
    """What was measured on a machine, by name of the command."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def measure(name, args):
    """Runs a command in a process of its own, so that what it leaves behind does not disturb the next one."""
    folder = args.docs / machine.folder()
    folder.mkdir(parents=True, exist_ok=True)
    files = ["--json", folder / f"{name}.json", "--plot", folder / f"{name}.svg"]
    command = [sys.executable, ROOT / "bench", re.sub("_(torch|others)$", "", name), *COMMANDS[name]]
    command += [*["--quick"] * args.quick, *files]
    console.rule(" ".join(map(str, command[2:])))
    start = time.monotonic()
    done = subprocess.run(command, check=False)
    console.print(f"{name}: {time.monotonic() - start:.0f} s")
    return done.returncode == 0


def filled(text, results, place):
    """The document, which lies in the folder `place`, with all parts that can be written from the results."""

    def part(match):
        name = match[1]
        tables = [table for folder, found in results.items() if (table := of_machine(name, folder, found, place))]
        if not tables:
            console.print(f"[yellow]left as it was[/] {name}: no machine has figures")
            return match[0]
        return "\n".join([f"<!-- bench: {name} -->", "\n\n".join(tables), "<!-- /bench -->"])

    return re.sub(r"<!-- bench: (.*?) -->\n.*?<!-- /bench -->", part, text, flags=re.DOTALL)


def of_machine(name, folder, results, place):
    """A part of a document, and on what machine it was measured; None if it was not."""
    if name.startswith("plot "):
        plot = folder / f"{name.removeprefix('plot ')}.svg"
        return f"![{name} on {title(results)}]({os.path.relpath(plot, place)})" if plot.exists() else None
    try:
        table = PARTS[name](results)
    except KeyError:
        return None
    return table if title(results) in table else f"On {title(results)}:\n\n{table}"


def title(results):
    return machine.title(next(iter(results.values()))["machine"])


def about(results):
    """The machine, and when each command ran there."""
    texts = []
    for name, result in results.items():
        found = result["machine"]
        busy = found["busy CPUs at the start"]
        quick = ", quick" * result["quick"]
        doubtful = f"; **{busy} CPUs were busy with something else: figures are doubtful**" * (busy > machine.BUSY)
        texts.append(f"* {name}: {found['date']}{quick}{doubtful}")
    caches = ", ".join(f"{k} {output.bytes_text(v)}" for k, v in found["caches"].items())
    facts = {
        "CPU": found["cpu"] + ", virtual" * found["virtual"],
        "CPUs, NUMA nodes": f"{found['cpus']}, {found['NUMA nodes']}",
        "caches": caches,
        "instruction set": found["instruction set"],
        "huge pages, kernel": f"{found['huge pages']}, {found['kernel']}",
        "compiler, OpenMP": f"{found['compiler']}, {found['OpenMP']}",
        "Python, pyreg": f"{found['python']}, {found['pyreg']}",
        "packages": machine.versions(found),
    }
    table = output.markdown_table(["", ""], [[k, v] for k, v in facts.items()], left=2)
    return f"{table}\n\n" + "\n".join(texts)


def losses(results):
    """Where a peer is quicker."""
    rows = list(compare.loss_rows(results["compare"]["records"]))
    if not rows:
        return "Nowhere in this run."
    return output.markdown_table(compare.LOSS_HEADER, rows, left=4)


def noise(results):
    """How many ratios may come out differently in another run."""
    rows = []
    for name, result in results.items():
        found = list(output.ratios(result["records"]))
        if found:
            doubtful = sum(output.unsteady(r) for r in found)
            rows.append([name, str(len(found)), str(doubtful)])
    if not rows:
        raise KeyError("ratios")
    return output.markdown_table(["command", "ratios", "unsteady (~)"], rows, left=1)


def pay_from(results):
    return "\n".join(f"* {line}" for line in scaling.pay_from_lines(results["scaling"]))


def neighbour(results):
    rows = scaling.neighbour_rows(results["scaling"]["records"]["neighbour"])
    return output.markdown_table(scaling.NEIGHBOUR_HEADER, rows, left=1)


def stores(results):
    rows = scaling.stores_rows(results["scaling"]["records"]["stores"])
    return output.markdown_table(scaling.STORES_HEADER, rows, left=1)


def train_step(results):
    from bench import train_step  # needs JAX

    return train_step.markdown(results["train_step"])


def train_step_neighbour(results):
    from bench import train_step  # needs JAX

    return train_step.neighbour_markdown(results["train_step"])


def train_step_torch(results):
    from bench import train_step_torch as command  # needs torch

    return command.markdown(results["train_step_torch"])


def train_step_others(results):
    from bench import train_step_others as command  # needs JAX

    return command.markdown(results["train_step_others"])


PARTS = {
    "machine": about,
    "noise": noise,
    **{f"compare {op}": lambda results, op=op: compare.markdown(results["compare"], op) for op in cases.OPS},
    "losses": losses,
    "train_step": train_step,
    "train_step neighbour": train_step_neighbour,
    "train_step torch": train_step_torch,
    "train_step others": train_step_others,
    "imports": lambda results: imports.markdown(results["imports"]),
    "accuracy": lambda results: accuracy.markdown(results["accuracy"]),
    "roofline": lambda results: roofline.markdown(results["roofline"]),
    "scaling": lambda results: scaling.markdown(results["scaling"]),
    "pay from": pay_from,
    "neighbour": neighbour,
    "stores": stores,
    "plan": lambda results: plan.markdown(results["plan"]),
}
