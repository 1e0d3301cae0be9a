"""How right batch statistics are when the mean is far from zero: pyreg, PyTorch and Flax beside each other.

    python -m bench accuracy [--quick] [--elements 1048576] [--channels 2] [--threads 1] [--markdown]

The data are normal, with standard deviation 1 and the mean that is in the first column.  For each contender there are
the relative error of the variance, and the error of y in units in the last place of the largest element.  Both are
those of the worst channel, and are taken against float64.
"""

import numpy as np

import pyreg
from bench import cases, machine, output

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
    if cases.installed("PyTorch"):
        import torch

        torch.set_num_threads(threads)

        def theirs(x):
            seen = torch.from_numpy(x).movedim(axis, 1)
            y, _, rstd = torch.native_batch_norm(seen, None, None, None, None, True, 0.1, 1e-5)
            return y.movedim(1, axis).numpy(), 1 / rstd.double().numpy() ** 2 - 1e-5

        found["PyTorch"] = theirs
    if cases.installed("Flax"):
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
    """y and the variance in float64.  The mean is taken twice, the second time of the differences from the first."""
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


def markdown(result):
    """The table of the documentation: both layouts, every second mean."""
    chosen = [r for r in result["records"] if r["mean"] in MEANS[::2]]
    rows = [[r["layout"], f"{r['mean']:g}", *("; ".join(text(e)) for e in r["errors"].values())] for r in chosen]
    table = output.markdown_table(["", "mean / std", *chosen[0]["errors"]], rows, left=1)
    versions = machine.versions(result["machine"], PACKAGES)
    return f"float32, {result['channels']} channels of {result['elements']:,} elements; {versions}.\n\n{table}"


def add_arguments(parser):
    output.add_arguments(parser)
    parser.add_argument("--elements", type=output.integer, help="of each channel; a multiple of 16")
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)


def run(args):
    found = output.start()
    elements = args.elements or (1 << 16 if args.quick else 1 << 20)
    records = []
    for layout, (axis, shape) in LAYOUTS.items():
        calls = contenders(axis, args.threads)
        rows = []
        for mean in output.progress(MEANS, f"accuracy, {layout}"):
            errors = measure(mean, axis, shape(elements, args.channels), calls)
            rows.append([f"{mean:g}", *("  ".join(text(e)) for e in errors.values())])
            records.append({"layout": layout, "mean": mean, "errors": errors})
        title = f"float32, {elements:,} elements per channel, {layout}: relative error of var, error of y in ulp"
        output.print_table(title, ["mean / std", *calls], rows)
    more = {"elements": elements, "channels": args.channels, "threads": args.threads}
    output.finish(args, found, records, lambda path: plot(records, found, path), **more)
    if args.markdown:
        print(f"\n{markdown({'machine': found, 'records': records, **more})}")


def plot(records, found, path):
    """The error of the variance over the mean."""
    fig, axes = output.figure(1, len(LAYOUTS), f"float32 batch statistics; {machine.versions(found, PACKAGES)}")
    for ax, layout in zip(axes[0], LAYOUTS, strict=True):
        chosen = [r for r in records if r["layout"] == layout]
        for name in chosen[0]["errors"]:
            ax.plot(
                [r["mean"] for r in chosen], [r["errors"][name]["var"] for r in chosen], "o-", label=name, markersize=4
            )
        ax.set_xscale("symlog", linthresh=1)
        ax.set(title=layout, xlabel="mean / standard deviation", ylabel="relative error of the variance", yscale="log")
    output.save(fig, path)
