"""How right batch statistics are when the mean is far from zero: pyreg, PyTorch and Flax beside each other.

    python bench/accuracy.py [--elements 4194304] [--channels 4] [--threads 1] [--markdown]

Data are normal with standard deviation 1 and the mean in the first column.  For each contender: the relative error of
the variance, and the error of y in units in the last place of the largest element, both the worst of the channels and
against float64.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from timing import console, environment, show_environment, write_json

import pyreg

MEANS = (0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7)
PACKAGES = ("numpy", "torch", "jax", "flax")
LAYOUTS = {"channels last": (-1, lambda n, c: (n, c)), "channels first": (1, lambda n, c: (16, c, n // 16))}


def contenders(axis, threads):
    """Functions of x that return y and the biased variance."""
    pyreg.set_num_threads(threads)

    def ours(x):
        y, _, var = pyreg.batch_norm(x, axis=axis)
        return y, var

    found = {"pyreg": ours}
    if find_spec("torch"):
        import torch

        torch.set_num_threads(threads)

        def theirs(x):
            seen = torch.from_numpy(x).movedim(axis, 1)
            y, _, rstd = torch.native_batch_norm(seen, None, None, None, None, True, 0.1, 1e-5)
            return y.movedim(1, axis).numpy(), 1 / rstd.double().numpy() ** 2 - 1e-5

        found["PyTorch"] = theirs
    if find_spec("flax"):
        import jax
        from flax import nnx

        def flax(x, **options):
            layer = nnx.BatchNorm(
                x.shape[axis], axis=axis, momentum=0.0, use_running_average=False, rngs=nnx.Rngs(0), **options
            )
            y = layer(jax.numpy.asarray(x))
            return np.asarray(y), np.asarray(layer.var.get_value(), np.float64)

        found["Flax"] = flax
        found["Flax, use_fast_variance=False"] = lambda x: flax(x, use_fast_variance=False)
    return found


def reference(x, axis):
    """In float64; the mean is taken twice, the second time of the differences from the first."""
    others = tuple(d for d in range(x.ndim) if d != axis % x.ndim)
    d = x.astype(np.float64)
    for _ in range(2):
        d -= d.mean(others, keepdims=True)
    var = (d * d).mean(others, keepdims=True)
    return d / np.sqrt(var + 1e-5), var.reshape(-1)


def measure(mean, axis, shape, calls):
    x = (np.random.default_rng(0).standard_normal(shape) + mean).astype(np.float32)
    want, want_var = reference(x, axis)
    ulp = np.spacing(np.float32(np.abs(want).max()))
    errors = {}
    for name, call in calls.items():
        y, var = call(x)
        errors[name] = {
            "var": float(np.abs(var / want_var - 1).max()),
            "ulp": float(np.abs(y - want).max() / ulp),
        }
    return errors


def text(error):
    return f"{error['var']:.1e}", f"{error['ulp']:.3g}"


def print_markdown(records, args, env):
    """The README's table: both layouts, every second mean."""
    rows = [r for r in records if r["mean"] in MEANS[::2]]
    versions = ", ".join(f"{name} {env[name]}" for name in PACKAGES if env[name] != "not installed")
    print(f"\nfloat32, {args.channels} channels of {args.elements:,} elements, threads {args.threads}; {versions}.\n")
    print("| | mean / std |", " | ".join(rows[0]["errors"]), "|")
    print("|---|---:|" + "---:|" * len(rows[0]["errors"]))
    for row in rows:
        errors = " | ".join(f"{var}; {ulp}" for var, ulp in map(text, row["errors"].values()))
        print(f"| {row['layout']} | {row['mean']:g} | {errors} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22, help="of each channel; a multiple of 16")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="also print the README's table")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the JSON file")
    args = parser.parse_args()

    env = environment(PACKAGES)
    show_environment(env)
    records = []
    for layout, (axis, shape) in LAYOUTS.items():
        calls = contenders(axis, args.threads)
        title = f"float32, {args.elements:,} elements a channel, {layout}: relative error of var, error of y in ulp"
        table = Table("mean / std", *calls, title=title, box=box.SIMPLE_HEAD)
        for mean in MEANS:
            errors = measure(mean, axis, shape(args.elements, args.channels), calls)
            table.add_row(f"{mean:g}", *("  ".join(text(e)) for e in errors.values()))
            records.append({"layout": layout, "mean": mean, "errors": errors})
        console.print(table)
    write_json(args.out / "accuracy.json", environment=env, elements=args.elements, records=records)
    if args.markdown:
        print_markdown(records, args, env)


if __name__ == "__main__":
    main()
