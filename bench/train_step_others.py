"""Time one training step of a transformer in linen, Equinox, Haiku and Keras: without dropout, stock, with pyreg's.

    python -m bench train_step --framework equinox [--quick] [--models transformer-256] [--rounds 20]
    python -m bench train_step --framework others            all of them

The variants take turns.  A ratio is taken within each turn, and the table has the medians.  The parameters after five
steps are compared bit for bit with those of the framework's own dropout.
"""

import jax

from bench import machine, output, timing
from bench.models import MODELS
from bench.models_others import FRAMEWORKS
from bench.output import number_text, time_text
from bench.train_step import compile_step, difference

VARIANTS = ("off", "stock", "pyreg", "philox")
TRANSFORMERS = [name for name in MODELS if name.startswith("transformer")]
PAIRS = [(name, "off") for name in VARIANTS]


def measure(framework, model, args):
    x = jax.random.normal(jax.random.key(1), MODELS[model].shape)
    calls, variants, after = {}, {}, {}
    for name in VARIANTS:
        step, state, params_of = FRAMEWORKS[framework](MODELS[model], name)
        compiled, seconds = compile_step(step, state, x)
        variants[name] = {"compile seconds": seconds}
        calls[name] = lambda step=compiled, state=state: jax.block_until_ready(step(state, x))
        for _ in range(5):
            state = compiled(state, x)
        after[name] = jax.tree.leaves(params_of(state))
    for name, variant in variants.items():
        variant["difference from stock"] = difference(after[name], after["stock"])
    times = timing.compared(timing.interleave(calls, args, PAIRS), PAIRS)
    sizes = {key: value for key, value in MODELS[model]._asdict().items() if key != "kind"}
    return {"framework": framework, "model": model, **sizes, **times, "variants": variants}


def print_record(record):
    rows = [
        [
            name,
            time_text(record["seconds"][name]["median"]),
            output.ratio_text(record["ratios"][f"{name} / off"]),
            time_text(variant["compile seconds"]),
            f"{variant['difference from stock']:.1e}",
        ]
        for name, variant in record["variants"].items()
    ]
    header = ["dropout", "step", "/ off", "compile", "parameters from stock's after 5 steps"]
    output.print_table(f"{record['framework']}: {record['model']}", header, rows)


def markdown(result):
    """The table of the documentation: a row per framework and model."""
    rows = [
        [
            record["framework"],
            record["model"],
            *(number_text(record["ratios"][f"{name} / off"]["median"]) for name in VARIANTS),
            *(time_text(record["variants"][name]["compile seconds"]) for name in ("stock", "pyreg")),
            f"{record['variants']['pyreg']['difference from stock']:.1e}",
        ]
        for record in result["records"]
    ]
    header = ["framework", "model", *VARIANTS, "compile, stock", "compile, pyreg", "difference"]
    packages = ("jax", "flax", "equinox", "dm-haiku", "keras")
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], packages)}"
    return f"Time of a step over that without dropout, on {where}.\n\n{output.markdown_table(header, rows, left=2)}"


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--framework", help=f"{', '.join(FRAMEWORKS)}, or others, which is all of these")
    parser.add_argument("--models", nargs="+", choices=TRANSFORMERS, help=f"any of {', '.join(TRANSFORMERS)}")
    timing.add_arguments(parser)
    parser.set_defaults(seconds=30.0)


def run(args):
    found = output.start()
    frameworks = list(FRAMEWORKS) if args.framework == "others" else [args.framework]
    models = args.models or (["transformer-64"] if args.quick else ["transformer-256"])
    records = []
    for framework, model in output.progress([(f, m) for f in frameworks for m in models], "training steps"):
        records.append(measure(framework, model, args))
        print_record(records[-1])
    output.finish(args, found, records)
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'records': records})}")
