"""Time one jitted training step of Flax models: without dropout, with Flax's layers, and after pyreg.nnx.convert.

    python -m bench train_step [--quick] [--models transformer-256] [--rounds 20] [--neighbour]

The variants take turns.  A ratio is taken within each turn, and the table has the medians.  The model with Flax's
layers is also run under pyreg.jax.accelerate_random().  Without dropout, a CNN still has Flax's batch-norm.  The
parameters after five steps are compared bit for bit with those that Flax's layers lead to.  --neighbour also times each
step while another process computes all the time.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pyreg.jax
import pyreg.nnx
from bench import machine, output, timing
from bench.models import FULL, MODELS, QUICK, training_step
from bench.output import number_text, time_text


def without_dropout(model):
    model.set_attributes(deterministic=True)
    return model


VARIANTS = {  # what is done to a model of Flax's layers
    "off": without_dropout,
    "Flax": lambda model: model,
    "Flax, accelerated": lambda model: model,
    "pyreg": pyreg.nnx.convert,
    "pyreg, philox": lambda model: pyreg.nnx.convert(model, impl="philox"),
}


# ---- The measurement -------------------------------------------------------------------------------------------------


def compiled_step(model, variant, x):
    """The step, the state to begin with, and the seconds it took to compile."""
    step, state = training_step(VARIANTS[variant](MODELS[model].build()))
    with pyreg.jax.accelerate_random() if variant.endswith("accelerated") else contextlib.nullcontext():
        compiled, seconds = compile_step(step, state, x)
        return compiled, state, seconds


def compile_step(step, state, x):
    """The compiled step, and the seconds that XLA took for it."""
    lowered = jax.jit(step).lower(state, x)
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def difference(parameters, others):
    """The largest one between two lists of arrays."""
    return max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(parameters, others, strict=True))


def parameters_after(step, state, x, steps=5):
    for _ in range(steps):
        state = step(state, x)
    return jax.tree.leaves(nnx.filter_state(state, nnx.Param))


def measure(model, args):
    x = jax.random.normal(jax.random.key(1), MODELS[model].shape)
    steps, variants, after = {}, {}, {}
    for name in args.layers:
        step, state, seconds = compiled_step(model, name, x)
        after[name] = parameters_after(step, state, x)
        steps[name] = lambda step=step, state=state: jax.block_until_ready(step(state, x))
        variants[name] = {"compile seconds": seconds, "temporary bytes": step.memory_analysis().temp_size_in_bytes}
    for name, variant in variants.items():
        variant["difference from Flax"] = difference(after[name], after["Flax"])
    pairs = [(name, "off") for name in steps]
    with timing.neighbour() if args.neighbour else contextlib.nullcontext() as process:
        if process:
            pairs += [(busy(name), name) for name in steps]
            steps |= {busy(name): timing.beside(process, step) for name, step in steps.items()}
        times = timing.compared(timing.interleave(steps, args, pairs), pairs)
    about = {**MODELS[model]._asdict(), "kind": MODELS[model].kind.__name__}
    return {"model": model, **about, **times, "variants": variants}


def busy(name):
    return f"{name}, beside a busy process"


def compared(name):
    """Whether the parameters should be those of Flax's layers."""
    return name != "off" and "philox" not in name


def bits_text(variant):
    difference = variant["difference from Flax"]
    return "Flax's bits" if difference == 0 else f"{difference:.1e} away"


def has_neighbour(record):
    return f"{busy('off')} / off" in record["ratios"]


def neighbour_text(record, name):
    """How much longer a step takes beside a busy process."""
    return output.ratio_text(record["ratios"][f"{busy(name)} / {name}"])


def print_model(record):
    rows = []
    for name, variant in record["variants"].items():
        rows.append(
            [
                name,
                time_text(record["seconds"][name]["median"]),
                output.ratio_text(record["ratios"][f"{name} / off"]),
                time_text(variant["compile seconds"]),
                f"{variant['temporary bytes'] / 2**20:.0f} MiB",
                bits_text(variant) if compared(name) else "",
                *([neighbour_text(record, name)] if has_neighbour(record) else []),
            ]
        )
    sizes = ", ".join(f"{name} {record[name]}" for name in ("width", "depth", "rate", "shape"))
    header = ["layers", "step", "/ off", "compile", "temporary", "parameters after 5 steps"]
    header += ["busy / idle"] * has_neighbour(record)
    output.print_table(f"{record['model']}: {sizes}", header, rows)


def markdown(result):
    """The table of the documentation: the time over that without dropout, and the time to compile."""
    records = result["records"]
    rows = [
        [
            name,
            *(
                t
                for r in records
                for t in (
                    number_text(r["ratios"][f"{name} / off"]["median"]),
                    time_text(r["variants"][name]["compile seconds"]),
                )
            ),
        ]
        for name in records[0]["variants"]
    ]
    header = ["layers", *(t for r in records for t in (r["model"], "compile"))]
    bits = ", ".join(f"{r['model']} {bits_text(r['variants']['pyreg'])}" for r in records)
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], ('jax', 'flax'))}"
    return (
        f"Time of a step over that without dropout, on {where}.\n\n{output.markdown_table(header, rows, left=1)}\n\n"
        f"Parameters after five steps with pyreg's layers, and with Flax's: {bits}."
    )


def neighbour_markdown(result):
    """The table of the documentation: the time beside a busy process over that without.  KeyError: not measured."""
    records = result["records"]
    rows = [[name, *(neighbour_text(r, name) for r in records)] for name in records[0]["variants"]]
    return output.markdown_table(["layers", *(r["model"] for r in records)], rows, left=1)


def plot(records, found, path):
    fig, axes = output.figure(1, 1, machine.title(found), size=(7, 3.6))
    ax, names = axes[0][0], list(records[0]["variants"])
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        medians = [r["ratios"][f"{name} / off"]["median"] for r in records]
        ax.bar(np.arange(len(records)) + k * width, medians, width, label=name)
    ax.set_xticks(np.arange(len(records)) + 0.4 - width / 2, [r["model"] for r in records])
    ax.set(title="one training step", ylabel="time over that without dropout")
    output.save(fig, path)


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--framework", default="flax", help="%(default)s; torch, linen, equinox, haiku, keras, others")
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"any of {', '.join(MODELS)}")
    parser.add_argument("--layers", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="off and Flax among them")
    parser.add_argument("--neighbour", action="store_true", help="also with a busy process")
    timing.add_arguments(parser)
    parser.set_defaults(seconds=30.0)


def run(args):
    found = output.start()
    records = []
    for model in output.progress(args.models or (QUICK if args.quick else FULL), "training steps"):
        records.append(measure(model, args))
        print_model(records[-1])
    output.finish(args, found, records, lambda path: plot(records, found, path))
    if args.markdown:
        result = {"machine": found, "records": records}
        print(f"\n{markdown(result)}")
        if args.neighbour:
            print(f"\n{neighbour_markdown(result)}")
