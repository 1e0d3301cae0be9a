"""Time one jitted training step: dropout off, Flax's, and pyreg's.

    python -m bench train_step [--quick] [--models transformer-256] [--rounds 20]

The transformer has dropout 0.1 at attention weights, residual branches and the MLP's hidden layer.  The variants take
turns; a ratio is taken within each turn, and the table gives the medians.  Flax's is also run under
pyreg.jax.accelerate_random().  Parameters after five steps are compared bit for bit with those of Flax's.
"""

import contextlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import pyreg.jax
from bench import machine, output, timing
from bench.output import number_text, time_text

RATE = 0.1
DROPOUTS = {
    "off": lambda x, key: x,
    "Flax": lambda x, key: nnx.Dropout(RATE, deterministic=False)(x, rngs=key),
    "Flax, accelerated": lambda x, key: nnx.Dropout(RATE, deterministic=False)(x, rngs=key),
    "pyreg": lambda x, key: pyreg.jax.dropout(x, RATE, key=key),
    "pyreg, philox": lambda x, key: pyreg.jax.dropout(x, RATE, key=key, impl="philox"),
}


# ---- The model -------------------------------------------------------------------------------------------------------


def transformer_parameters(width, layers):
    rng = np.random.default_rng(0)

    def matrix(rows, columns):
        return jnp.asarray(rng.standard_normal((rows, columns)) / rows**0.5, jnp.float32)

    return [
        {"qkv": matrix(width, 3 * width), "out": matrix(width, width), "up": matrix(width, 4 * width)}
        | {"down": matrix(4 * width, width)}
        for _ in range(layers)
    ]


def layer_norm(x):
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def transformer_loss(params, x, target, key, dropout):
    batch, length, width = x.shape
    for i, layer in enumerate(params):
        keys = jax.random.split(jax.random.fold_in(key, i), 4)
        qkv = (layer_norm(x) @ layer["qkv"]).reshape(batch, length, 3, width // 64, 64)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        weights = jax.nn.softmax(jnp.einsum("bqhc,bkhc->bhqk", q, k) / 8)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", dropout(weights, keys[0]), v).reshape(x.shape)
        x = x + dropout(mixed @ layer["out"], keys[1])
        hidden = dropout(jax.nn.gelu(layer_norm(x) @ layer["up"]), keys[2])
        x = x + dropout(hidden @ layer["down"], keys[3])
    return jnp.mean((x - target) ** 2)


def transformer(width, layers, length, batch):
    x, target = jax.random.normal(jax.random.key(1), (2, batch, length, width))
    return transformer_parameters(width, layers), transformer_loss, (x, target)


# A model: what to call for its parameters, its loss(params, *data, key, dropout), and the data.
MODELS = {
    "transformer-256": (transformer, {"width": 256, "layers": 4, "length": 128, "batch": 16}),
    "transformer-128": (transformer, {"width": 128, "layers": 2, "length": 128, "batch": 64}),
    "transformer-64": (transformer, {"width": 64, "layers": 1, "length": 32, "batch": 8}),
}
FULL, QUICK = ("transformer-256", "transformer-128"), ("transformer-64",)


# ---- The measurement -------------------------------------------------------------------------------------------------


def compiled_step(name, loss, params, data, key):
    """The step, and the seconds it took to compile."""

    def step(params, data, key):
        gradients = jax.grad(loss)(params, *data, key, DROPOUTS[name])
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    with pyreg.jax.accelerate_random() if name.endswith("accelerated") else contextlib.nullcontext():
        lowered = jax.jit(step).lower(params, data, key)
        start = time.perf_counter()
        compiled = lowered.compile()
        return compiled, time.perf_counter() - start


def measure(model, args):
    build, sizes = MODELS[model]
    params, loss, data = build(**sizes)
    key = jax.random.key(0)
    steps, variants, after = {}, {}, {}
    for name in args.dropouts:
        step, seconds = compiled_step(name, loss, params, data, key)
        p = params
        for i in range(5):
            p = step(p, data, jax.random.fold_in(key, i))
        after[name] = jax.tree.leaves(p)
        steps[name] = lambda step=step: jax.block_until_ready(step(params, data, key))
        variants[name] = {
            "compile seconds": seconds,
            "temporary bytes": step.memory_analysis().temp_size_in_bytes,
        }
    for name, variant in variants.items():
        pairs = zip(after[name], after["Flax"], strict=True)
        variant["difference from Flax"] = max(float(jnp.max(jnp.abs(a - b))) for a, b in pairs)
    times = timing.compare(steps, [(name, "off") for name in steps], args)
    return {"model": model, **sizes, **times, "variants": variants}


def compared(name):
    """Should the parameters be Flax's?"""
    return name != "off" and "philox" not in name


def print_model(record):
    rows = []
    for name, variant in record["variants"].items():
        difference = variant["difference from Flax"]
        rows.append(
            [
                name,
                time_text(record["seconds"][name]["median"]),
                output.ratio_text(record["ratios"][f"{name} / off"]),
                time_text(variant["compile seconds"]),
                f"{variant['temporary bytes'] / 2**20:.0f} MiB",
                "" if not compared(name) else "Flax's bits" if difference == 0 else f"{difference:.1e} away",
            ]
        )
    sizes = ", ".join(f"{k} {v}" for k, v in MODELS[record["model"]][1].items())
    header = ["dropout", "step", "/ off", "compile", "temporary", "parameters after 5 steps"]
    output.print_table(f"{record['model']}: {sizes}", header, rows)


def markdown(result):
    """The documentation's table: time over that without dropout, and time to compile."""
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
    header = ["dropout", *(t for r in records for t in (r["model"], "compile"))]
    where = f"{machine.title(result['machine'])}; {machine.versions(result['machine'], ('jax', 'flax'))}"
    return f"Time of a step over that without dropout, on {where}.\n\n{output.markdown_table(header, rows, left=1)}"


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
    parser.add_argument(
        "--dropouts", nargs="+", choices=DROPOUTS, default=list(DROPOUTS), help="off and Flax among them"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"any of {' '.join(MODELS)}")
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
        print(f"\n{markdown({'machine': found, 'records': records})}")
