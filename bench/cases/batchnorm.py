"""Batch-norm against its peers: what is run, what is compared with what, and whether the results are right."""

import math

import numpy as np

import pyreg
from bench.cases import normal, onednn
from bench.machine import cpus

TABLE_BY = ("dtype",)
PACKAGES = ("numpy", "ml_dtypes", "torch", "jax", "flax", "onednn-cpu-gomp")
PEERS = ("PyTorch", "Flax", "oneDNN")
SUBJECTS = ("forward", "inference", "backward")
# Columns of a table: header, contender, and the contender it is divided by (None: its own time).
# Peers allocate their result, so they are compared with calls that do too; oneDNN is given its output.
COLUMNS = (
    ("out=", "{} out=", None),
    ("/ copy", "{} out=", "copy"),
    ("fresh", "{}", None),
    ("PyTorch /", "PyTorch {}", "{}"),
    ("Flax /", "Flax {}", "{}"),
    ("oneDNN /", "oneDNN {}", "{} out="),
)
MARKDOWN = {
    "copy": "copy",
    "forward, `out=`": "forward out=",
    "inference, `out=`": "inference out=",
    "backward, `out=`": "backward out=",
    "PyTorch forward": "PyTorch forward",
    "PyTorch backward": "PyTorch backward",
    "Flax forward": "Flax forward",
    "oneDNN forward": "oneDNN forward",
    "oneDNN backward": "oneDNN backward",
}
NOTES = (
    "copy is pyreg's dropout at rate 0 with out=, by as many threads. NHWC is channels_last in PyTorch. "
    "Flax is nnx.BatchNorm under jax.jit on all CPUs; its backward is a vjp without the forward pass. oneDNN is called "
    "through its C API, if it is installed."
)


def parse(text):
    """The shape, and the axis of the channels."""
    sizes, _, layout = text.partition(" ")
    return tuple(map(int, sizes.split(","))), 1 if layout == "NCHW" else -1


def elements(shape):
    return math.prod(parse(shape)[0])


def contenders(dtype, shape, threads, peers=()):
    """The calls to be timed, by name."""
    shape, axis = parse(shape)
    x, dy = (normal(shape, dtype, seed) for seed in range(2))
    scale, bias = np.ones(shape[axis], np.float32), np.zeros(shape[axis], np.float32)
    out = np.zeros_like(x)
    pyreg.set_num_threads(threads)
    _, mean, var = pyreg.batch_norm(x, scale, bias, axis=axis, out=out)
    calls = {"copy": lambda: pyreg.dropout(x, 0.0, out=out)}
    for suffix, to in ((" out=", {"axis": axis, "out": out}), ("", {"axis": axis})):
        calls["forward" + suffix] = lambda to=to: pyreg.batch_norm(x, scale, bias, **to)
        calls["inference" + suffix] = lambda to=to: pyreg.batch_norm_inference(x, mean, var, scale, bias, **to)
        calls["backward" + suffix] = lambda to=to: pyreg.batch_norm_backward(dy, x, mean, var, scale, **to)
    if "PyTorch" in peers:
        calls |= torch_calls(x, dy, axis, threads)
    if "Flax" in peers and threads == cpus():
        calls |= flax_calls(x, dy, axis)
    if "oneDNN" in peers and threads == cpus() and dtype == "float32":
        peer = onednn.OneDNN(x, dy, axis)
        calls |= {f"oneDNN {name}": getattr(peer, name) for name in SUBJECTS}
    return calls


def torch_calls(x, dy, axis, threads):
    import torch

    torch.set_num_threads(threads)
    x, dy = (
        (
            torch.from_numpy(a) if a.dtype.kind == "f" else torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        ).movedim(axis, 1)
        for a in (x, dy)
    )
    channels = x.shape[1]
    scale, bias, mean, var = torch.ones(channels), torch.zeros(channels), torch.zeros(channels), torch.ones(channels)
    _, saved_mean, saved_rstd = torch.native_batch_norm(x, scale, bias, None, None, True, 0.1, 1e-5)
    saved = saved_mean, saved_rstd, True, 1e-5, [True, True, True]
    return {
        "PyTorch forward": lambda: torch.native_batch_norm(x, scale, bias, None, None, True, 0.1, 1e-5),
        "PyTorch inference": lambda: torch.native_batch_norm(x, scale, bias, mean, var, False, 0.1, 1e-5),
        "PyTorch backward": lambda: torch.ops.aten.native_batch_norm_backward(dy, x, scale, None, None, *saved),
    }


def flax_calls(x, dy, axis):
    import jax
    from flax import nnx

    channels = x.shape[axis]
    x, dy = jax.numpy.asarray(x), jax.numpy.asarray(dy)
    norm = nnx.BatchNorm(channels, axis=axis, rngs=nnx.Rngs(0), use_running_average=False, dtype=x.dtype)
    graph, state = nnx.split(norm)

    def forward(state, x):
        layer = nnx.merge(graph, state)
        return layer(x), nnx.state(layer)

    def inference(state, x):
        return nnx.merge(graph, state)(x, use_running_average=True)

    def loss(state, x):
        return forward(state, x)[0]

    _, back = jax.vjp(loss, state, x)
    forward, inference, back = jax.jit(forward), jax.jit(inference), jax.jit(back)
    return {
        "Flax forward": lambda: jax.block_until_ready(forward(state, x)),
        "Flax inference": lambda: jax.block_until_ready(inference(state, x)),
        "Flax backward": lambda: jax.block_until_ready(back(dy)),
    }


# ---- Check -----------------------------------------------------------------------------------------------------------


def check(dtype):
    """Raises if a result is wrong.  Yields what was found right."""
    tolerance = {"float32": 1e-6, "bfloat16": 1e-2}[dtype]
    for name in ("8,14,14,256 NHWC", "8,256,14,14 NCHW", "1024,512"):
        shape, axis = parse(name)
        x, dy = (normal(shape, dtype, seed) for seed in range(2))
        others = tuple(d for d in range(len(shape)) if d != axis % len(shape))
        wide, dwide = x.astype(np.float64), dy.astype(np.float64)
        rstd = 1 / np.sqrt(wide.var(others, keepdims=True) + 1e-5)
        xhat = (wide - wide.mean(others, keepdims=True)) * rstd
        y, mean, var = pyreg.batch_norm(x, axis=axis)
        np.testing.assert_allclose(y.astype(np.float64), xhat, rtol=tolerance, atol=5 * tolerance)
        dx, _, _ = pyreg.batch_norm_backward(dy, x, mean, var, axis=axis)
        through = dwide.mean(others, keepdims=True) + xhat * (dwide * xhat).mean(others, keepdims=True)
        np.testing.assert_allclose(dx.astype(np.float64), rstd * (dwide - through), rtol=tolerance, atol=5 * tolerance)
        if onednn.find() and dtype == "float32":
            peer = onednn.OneDNN(x, dy, axis)
            peer.forward()
            np.testing.assert_allclose(peer.y - 1, xhat, rtol=1e-4, atol=1e-4)  # its shift is 1
    yield "forward and backward equal the float64 formulas"
