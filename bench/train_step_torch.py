"""Time one training step of PyTorch models: without dropout, with torch's, with pyreg's.

    python -m bench train_step --framework torch [--quick] [--models SDPA] [--rounds 20]

The variants take turns.  A ratio is taken within each turn, and the tables have the medians.  Without dropout torch's
attention has a fused kernel, that takes no dropout; "off, math" is without dropout and without that kernel.  A CNN's
batch-norm is torch's in "off" and "torch", pyreg's in the others.
"""

import contextlib
import ctypes
import gc
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pyreg.torch
from bench import machine, output, timing
from bench.models_torch import FULL, MODELS, QUICK, training_step
from bench.output import number_text, time_text


def without_dropout(model):
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    return model


def as_it_is(model):
    return model


def accelerated():
    return pyreg.torch.accelerate(dropout=True, batch_norm=True)


def math_attention():
    return sdpa_kernel(SDPBackend.MATH)


VARIANTS = {  # what is done to a model, and around its step
    "off": (without_dropout, contextlib.nullcontext),
    "off, math": (without_dropout, math_attention),
    "torch": (as_it_is, contextlib.nullcontext),
    "convert": (pyreg.torch.convert, contextlib.nullcontext),
    "accelerate": (as_it_is, accelerated),
}
PAIRS = [
    *((name, "off") for name in VARIANTS),
    ("convert", "torch"),
    ("accelerate", "torch"),
    ("accelerate", "off, math"),
]


class Step:
    """A step of a variant.  What the variant turns on is turned on outside of what is timed."""

    def __init__(self, model, variant, compiled):
        change, self.around = VARIANTS[variant]
        self.model = change(MODELS[model].build())
        run = torch.compile(self.model) if compiled else self.model
        self.step = training_step(run, MODELS[model].input())

    def seconds(self, clock):
        with self.around():
            start = clock()
            self.step()
            return clock() - start

    def saved_bytes(self):
        """Memory that autograd keeps for the backward pass, parameters apart."""
        parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept = {}

        def pack(x):
            storage = x.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with self.around(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self.step()
        return sum(kept.values())

    def peak_bytes(self):
        """Memory of the process during a step, over that before it."""
        status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
        gc.collect()
        try:
            ctypes.CDLL(None).malloc_trim(0)  # gives what is free back to the system
            with self.around():
                clear.write_text("5")  # the peak begins anew
                before = memory(status, "VmRSS")
                self.step()
                return memory(status, "VmHWM") - before
        except (OSError, AttributeError):
            return 0  # not to be had on this system


def memory(status, name):
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(model, threads, args):
    torch.set_num_threads(threads)
    steps = {name: Step(model, name, args.compile) for name in VARIANTS}
    about = {name: {"saved bytes": s.saved_bytes(), "peak bytes": s.peak_bytes()} for name, s in steps.items()}
    clock = time.process_time if args.cpu_time else time.perf_counter
    calls = {name: lambda step=step: step.seconds(clock) for name, step in steps.items()}
    times = timing.compared(timing.take_turns(calls, args, PAIRS), PAIRS)
    m = MODELS[model]
    described = {"model": model, "width": m.width, "depth": m.depth, "p": m.p, "shape": m.shape}
    return {**described, "threads": threads, "compiled": args.compile, **times, "variants": about}


def print_model(record):
    rows = [
        [
            name,
            time_text(record["seconds"][name]["median"]),
            output.ratio_text(record["ratios"][f"{name} / off"]),
            number_text(record["ratios"][f"{name} / torch"]["median"]) if f"{name} / torch" in record["ratios"] else "",
            f"{variant['saved bytes'] / 2**20:.0f} MiB",
            f"{variant['peak bytes'] / 2**20:.0f} MiB",
        ]
        for name, variant in record["variants"].items()
    ]
    over_math = record["ratios"]["accelerate / off, math"]["median"]
    title = f"{record['model']}, {record['threads']} threads: accelerate over off with math attention {over_math:.2f}"
    output.print_table(title, ["variant", "step", "/ off", "/ torch", "saved", "peak"], rows)


def markdown(result):
    records = result["records"]
    rows = [
        [
            record["model"],
            str(record["threads"]),
            *(number_text(record["ratios"][f"{name} / off"]["median"]) for name in VARIANTS if name != "off"),
            *(f"{record['variants'][name]['saved bytes'] / 2**20:.0f}" for name in ("off", "torch", "accelerate")),
        ]
        for record in records
    ]
    saved = ["MiB saved, off", "saved, torch", "saved, accelerate"]
    header = ["model", "threads", *(n for n in VARIANTS if n != "off"), *saved]
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], ('torch', 'transformers'))}"
    return f"Time of a step over that without dropout, on {where}.\n\n{output.markdown_table(header, rows, left=1)}"


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--framework", help="torch")
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of torch (%(default)s)")
    parser.add_argument("--compile", action="store_true", help="time torch.compile(model)")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, and not the clock's")
    timing.add_arguments(parser)
    parser.set_defaults(seconds=30.0)


def run(args):
    found = output.start()
    models = args.models or (QUICK if args.quick else FULL)
    records = []
    for model, threads in output.progress([(m, t) for m in models for t in args.threads], "training steps"):
        records.append(measure(model, threads, args))
        print_model(records[-1])
    output.finish(args, found, records)
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'records': records})}")
