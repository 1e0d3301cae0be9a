"""Time PyTorch's own operations in processes that import pyreg before torch, after it, or not at all.

    python -m bench imports [--busy 1] [--rounds 10]

Both are built on OpenMP: whoever is imported first chooses the library, and its settings, for both.  Each sample is a
new process, which reports the median of many calls; the kinds of processes take turns.
"""

import json
import os
import subprocess
import sys

import numpy as np

from bench import machine, output, timing
from bench.output import number_text, time_text

ORDERS = {
    "torch": "import torch",
    "torch, pyreg": "import torch, pyreg; pyreg.dropout(__import__('numpy').ones(1 << 22), 0.1)",
    "pyreg, torch": "import pyreg, torch; pyreg.dropout(__import__('numpy').ones(1 << 22), 0.1)",
}
PROGRAM = """
import json, statistics, time
{imports}
torch.set_num_threads({threads})
model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(4)))
x, a = torch.randn(64, 256), torch.randn(1 << 22)
b = torch.empty_like(a)

def linear():
    model(x).sum().backward()

def seconds(call, n):
    for _ in range(3):
        call()
    samples = []
    for _ in range(n):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)

print(json.dumps({{"4 Linear(256)": seconds(linear, 100), "add of 4e6": seconds(lambda: torch.add(a, a, out=b), 50)}}))
"""


def sample(order, threads):
    program = PROGRAM.format(imports=ORDERS[order], threads=threads)
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def measure(threads, args):
    samples = {}
    for _ in range(args.rounds):
        for order in ORDERS:
            for name, seconds in sample(order, threads).items():
                samples.setdefault(name, {}).setdefault(order, []).append(seconds)
    records = []
    for name, by_order in samples.items():
        arrays = {order: np.array(s) for order, s in by_order.items()}
        pairs = [(order, "torch") for order in ORDERS if order != "torch"]
        records.append({"operation": name, "threads": threads, "busy": args.busy, **timing.compared(arrays, pairs)})
    return records


def markdown(result):
    rows = [
        [
            r["operation"],
            str(r["threads"]),
            str(r["busy"]),
            time_text(r["seconds"]["torch"]["median"]),
            *(number_text(r["ratios"][f"{order} / torch"]["median"]) for order in ORDERS if order != "torch"),
        ]
        for r in result["records"]
    ]
    header = ["operation", "threads", "busy processes", "torch alone", *(o for o in ORDERS if o != "torch")]
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], ('torch',))}"
    return (
        f"Time of torch's own operations over that in a process without pyreg, on {where}.\n\n"
        + output.markdown_table(header, rows, left=1)
    )


def add_arguments(parser):
    output.add_arguments(parser)
    timing.add_arguments(parser)
    parser.add_argument("--threads", nargs="+", type=int, default=[2], help="of torch (%(default)s)")
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside it (%(default)s)")


def run(args):
    found = output.start()
    args.rounds = 2 if args.quick else args.rounds
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"], env=os.environ) for _ in range(args.busy)]
    try:
        records = [r for t in output.progress(args.threads, "processes") for r in measure(t, args)]
    finally:
        for process in busy:
            process.kill()
    output.finish(args, found, records)
    print(markdown({"machine": found, "records": output.rounded(records)}))
