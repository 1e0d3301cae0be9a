"""pyreg.jax.batch_norm on several devices, which are four parts of the CPU."""

import functools
import itertools
import warnings

import numpy as np
import pytest
import reference
from common import normal
from jaxcommon import (
    FEW_PLACEMENTS,
    NamedSharding,
    auto_mesh,
    explicit_mesh,
    jax,
    meshes,
    placements,
    put,
    run_cases,
    ulps,
)
from jaxcommon import PartitionSpec as P
from test_batchnorm import F32, F64, masked_somewhere
from test_jax_batchnorm import assert_close, batch_norm, formula, unequal_parts, weights, whole, x64

jnp, lax = jax.numpy, jax.lax
SHAPE, AXIS = (4, 8, 12), 1
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def operands(dtype=F32):
    x, residual = (normal(SHAPE, dtype, seed) * dtype.type(2) + dtype.type(1) for seed in range(2))
    scale, bias = normal((2, SHAPE[AXIS]), dtype)
    return tuple(map(jnp.asarray, (x, scale, bias, residual, masked_somewhere(SHAPE, AXIS))))


def place(args, mesh, spec):
    """x and what is like it cut alike, values a channel as its channels."""
    return [put(a, mesh, *(spec if a.ndim == len(spec) else spec[AXIS : AXIS + 1])) for a in args]


def op(f, kind):
    def plain(x, scale, bias, residual, mask):
        return f(x, scale, bias, axis=AXIS)

    def everything(x, scale, bias, residual, mask):
        return f(x, scale, bias, residual=residual, mask=mask, axis=AXIS, activation="relu")

    return {"plain": plain, "all": everything}[kind]


def gradient(f):
    """All results and all cotangents."""

    def run(*args):
        results, back = jax.vjp(lambda *smooth: f(*smooth, *args[4:]), *args[:4])
        return results, back(tuple(r * r for r in results))

    return run


def run(f, args, reduces=None):
    """What f gives, without gathering anything and with that many sums over devices."""
    compiled = jax.jit(f).lower(*args).compile()
    text = compiled.as_text()
    for moves in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert moves not in text, moves
    sums = text.count(" all-reduce(") + text.count(" all-reduce-start(")
    assert reduces is None or sums == reduces, (sums, reduces)
    return compiled(*args)


# ---- Partitioned by XLA ----------------------------------------------------------------------------------------------


def layouts(kind, mesh, specs):
    args, f = operands(), op(batch_norm, kind)
    want = gradient(f)(*args)
    for spec in specs:
        cut = any(spec[d] for d in range(3) if d != AXIS)
        placed = place(args, mesh, spec)
        if kind == "plain":
            assert_close(run(f, placed, 2 * cut), want[0], 2e-5)
        got = run(gradient(f), placed, 3 * cut)
        assert_close(got, want, 2e-5)
        for a in (got[0][0], got[1][0]):
            assert a.sharding.is_equivalent_to(placed[0].sharding, 3), (spec, a.sharding)


@case
def layouts_plain():
    for mesh in meshes():
        layouts("plain", mesh, FEW_PLACEMENTS)


@case
def layouts_all():
    layouts("all", auto_mesh(), placements())


@case
def layouts_all_explicit():
    args, f, mesh = operands(), op(batch_norm, "all"), explicit_mesh()
    want = gradient(f)(*args)
    for spec in FEW_PLACEMENTS:
        assert_close(run(gradient(f), place(args, mesh, spec)), want, 2e-5)


@case
def every_layout():
    for mesh in meshes():
        layouts("plain", mesh, placements())


@case
def parameters_on_every_device():
    """As a program has them at first: what XLA does with values a channel is its own choice, the numbers are not."""
    x, *rest = operands()
    f = gradient(op(batch_norm, "all"))
    want, mesh = f(x, *rest), auto_mesh()
    for spec in (("a", "b"), (None, ("a", "b")), ("b",)):
        assert_close(jax.jit(f)(put(x, mesh, *spec), *(put(a, mesh) for a in rest)), want, 2e-5)


@case
def dtypes():
    for dtype, tolerance in ((np.float16, 4e-3), (jnp.bfloat16, 3e-2), (F64, 1e-12)):
        with jax.enable_x64(dtype == F64):  # of this thread, and XLA has others
            x, scale, bias, *rest = operands(np.dtype(dtype))
            f = gradient(op(batch_norm, "all"))
            args = x, *(a.astype(jnp.promote_types(dtype, F32)) for a in (scale, bias)), *rest
            assert_close(run(f, place(args, auto_mesh(), ("a", "b", None)), 3), f(*args), tolerance)


def far_from_zero(ratio, parts, masked):
    """Normal channels with that ratio of mean to deviation; a mask leaves one element of the first of the parts."""
    rng = np.random.default_rng(parts)
    x = (ratio * rng.uniform(1, 2, 6) + rng.standard_normal((parts * 40, 6))).astype(F32)
    mask = np.ones((len(x), 1), bool)
    if masked:
        mask[1:40], mask[60] = False, False
    return x, mask


def assert_right(results, x, mask, what):
    """Within the accuracy of one device."""
    y, mean, var = (np.asarray(a, F64) for a in results)
    want_mean, want_var, _ = reference.batch_statistics(x, 1, mask)
    want = reference.normalise(x, want_mean, want_var, axis=1)
    assert np.abs(var / want_var - 1).max() < 4e-7, what
    assert (np.abs(mean - want_mean) <= np.spacing((np.abs(want_mean) + np.sqrt(want_var)).astype(F32))).all(), what
    assert ulps(y[mask[:, 0]], want[mask[:, 0]]) < 4, what


@case
def any_ratio_of_mean_to_deviation():
    """Pooled by XLA, and by the name of an axis of shard_map, pmap and vmap."""
    for ratio, parts, masked in itertools.product((0, 1e3, 1e5, 1e7), (2, 4, 8), (False, True)):
        x, mask = far_from_zero(ratio, parts, masked)
        given = mask if masked else None
        mesh = jax.make_mesh((parts,), ("a",), devices=jax.devices()[:parts], axis_types=(jax.sharding.AxisType.Auto,))
        what = ratio, parts, masked
        assert_right(run(lambda x, given=given: batch_norm(x, mask=given), [put(x, mesh, "a")], 2), x, mask, what)

        def named(x, mask):
            return batch_norm(x, mask=mask if masked else None, axis_name="a")  # noqa: B023

        out = P("a"), P(), P()
        got = jax.jit(jax.shard_map(named, mesh=mesh, in_specs=P("a"), out_specs=out))(x, mask)
        assert_right(got, x, mask, what)
        folded = [a.reshape(parts, 40, -1) for a in (x, mask)]
        for each in (jax.pmap(named, axis_name="a", devices=jax.devices()[:parts]), jax.vmap(named, axis_name="a")):
            y, mean, var = each(*folded)
            assert_right((y.reshape(x.shape), mean[0], var[0]), x, mask, what)


@case
def gradients_far_from_zero():
    """dx and dscale by reverse mode; by forward mode dy . J dy, which is dx . dy, also on one device."""
    x, _ = far_from_zero(1e5, 4, False)
    dy, scale = normal(x.shape, F32, 1), np.ones(6, F32)
    want_dx, want_dscale, _, _ = reference.batch_norm_backward(dy, x, axis=1)
    shards = [put(x, auto_mesh(), "a"), put(scale, auto_mesh())]

    def f(x, scale):
        return batch_norm(x, scale)[0]

    dx, dscale = jax.jit(lambda x, scale: jax.vjp(f, x, scale)[1](jnp.asarray(dy)))(*shards)
    assert np.abs(dx - want_dx).max() < 1e-5 * np.abs(want_dx).max()
    assert np.abs(dscale - want_dscale).max() < 1e-5 * np.abs(want_dscale).max()
    for args in (shards, [jnp.asarray(x), jnp.asarray(scale)]):
        tangent = jax.jit(lambda x, scale: jax.jvp(lambda x: f(x, scale), (x,), (jnp.asarray(dy),))[1])(*args)
        assert np.abs((np.asarray(tangent, F64) * dy).sum() - (want_dx * dy).sum()) < 1e-4 * np.abs(want_dx * dy).sum()


@case
def constant_channels():
    """Every part has the same mean: y is exactly the bias."""
    for value in (3.25, 1e-30, 1234.567, 16777217.0):
        x, bias = np.full((24, 3), value, F32), np.float32([0, 1, -2.5])
        y, mean, var = jax.jit(lambda x, bias: batch_norm(x, None, bias))(put(x, auto_mesh(), ("a", "b")), bias)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
        np.testing.assert_array_equal(mean, x[0])
        assert not np.asarray(var).any()


@case
def near_the_largest_number():
    for value in (1e37, 3e38, np.finfo(F32).max):
        x = np.full((64, 2), value, F32)
        _, mean, var = jax.jit(batch_norm)(put(x, auto_mesh(), ("a", "b")))
        np.testing.assert_array_equal(mean, x[0])
        assert not np.asarray(var).any()


@case
def specials():
    """NaN and Inf stay in their channel, and the mean is that of one device."""
    x = normal((16, 4), F32)
    x[3, 0], x[12, 1], x[2, 2], x[13, 2] = np.nan, np.inf, np.inf, -np.inf
    want = batch_norm(jnp.asarray(x))
    got = jax.jit(batch_norm)(put(x, auto_mesh(), ("a", "b")))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@case
def second_derivatives_of_cut_channels():
    """Under meshes whose shardings are part of a type, channels and elements cut."""
    x = jax.random.normal(jax.random.key(1), (8, 6))

    def product(f):
        gradient = jax.grad(lambda x: (f(x)[0] ** 3 + f(x)[1] * f(x)[2]).sum())
        return jax.jit(lambda x: jax.jvp(gradient, (x,), (jnp.cos(x),))[1])

    def by_scale(f):
        """The same of scale and bias, which are on every device."""
        gradients = jax.grad(lambda scale, bias, x: (f(x, scale, bias)[0] ** 3).sum(), (0, 1))
        return jax.jit(lambda x, *args: jax.jvp(lambda *args: gradients(*args, x), args, args))

    want, scale = product(formula)(x), jnp.linspace(0.5, 2, 6)
    for mesh in meshes():
        for spec in ((None, "b"), ("a", "b"), ("a",)):
            with jax.set_mesh(mesh):
                got = product(batch_norm)(put(x, mesh, *spec))
                statistic = jax.jit(batch_norm)(put(x, mesh, *spec))[1]
                scales = by_scale(batch_norm)(put(x, mesh, *spec), put(scale, mesh), put(scale, mesh))
            assert_close(got, want, 1e-4)
            assert_close(scales, by_scale(formula)(x, scale, scale), 1e-4)
            assert statistic.sharding.is_equivalent_to(NamedSharding(mesh, P(*spec[1:2])), 1), spec


@case
def uneven_parts():
    """Within a program XLA also cuts what cannot be cut evenly."""
    x, mesh = jnp.asarray(normal((5, 7, 3), F32)), auto_mesh()

    def f(x, cut=lambda x: x):
        def of(x):
            return cut(batch_norm(cut(x + 1), axis=1, activation="relu")[0])

        return of(x), jax.grad(lambda x: (of(x) ** 3).sum())(x)

    for spec in (P("a", "b"), P(("a", "b")), P(None, ("b", "a"))):
        cut = functools.partial(lax.with_sharding_constraint, shardings=NamedSharding(mesh, spec))
        assert_close(jax.jit(functools.partial(f, cut=cut))(x), f(x), 2e-5)


@case
def vmap():
    """Problems, or the elements or the channels of each, are cut."""
    x, scale = jnp.asarray(normal((4, 8, 12), F32)), jnp.asarray(normal((4, 12), F32))

    def f(x, scale):
        results, back = jax.vjp(jax.vmap(batch_norm), x, scale)
        return results, back(tuple(r * r for r in results))

    want, turns = f(x, scale), itertools.cycle(meshes())
    for spec, reduces in (
        (("a",), 0),
        ((("a", "b"),), 0),
        (("a", None, "b"), 0),
        (("b", "a"), 3),
        ((None, "a", "b"), 3),
        ((None, ("a", "b")), 3),
    ):
        spec, mesh = (*spec, None, None)[:3], next(turns)
        assert_close(run(f, [put(x, mesh, *spec), put(scale, mesh, spec[0], spec[2])], reduces), want, 2e-5)
    want = jax.vmap(batch_norm, 2, 1)(x)
    assert_close(run(jax.vmap(batch_norm, 2, 1), [put(x, auto_mesh(), "a", None, "b")], 2), want, 2e-5)


@case
def second_derivatives():
    """Of JAX operations, with what XLA makes of them."""
    args = operands()
    f = jax.grad(
        lambda x, *rest: sum((a**2).sum() for a in jax.tree.leaves(gradient(op(batch_norm, "all"))(x, *rest)[1]))
    )
    for spec in (("a", "b", None), ("b", None, "a")):
        assert_close(jax.jit(f)(*place(args, auto_mesh(), spec)), f(*args), 1e-4)


@case
def training():
    """A scan of steps: losses and running statistics are those of one device."""
    x, w = jnp.asarray(normal((3, 8, 6), F32)), jnp.asarray(normal((6, 4), F32, 1))

    def loss(w, x):
        y, mean, var = batch_norm(x @ w, activation="relu")
        return (y**2 * weights(y)).sum(), (mean, var)

    def steps(w, x):
        def step(w, x):
            (value, statistics), dw = jax.value_and_grad(loss, has_aux=True)(w, x)
            return w - 0.01 * dw, (value, statistics)

        return lax.scan(step, w, x)

    mesh = auto_mesh()
    assert_close(jax.jit(steps)(put(w, mesh, None, "b"), put(x, mesh, None, "a")), steps(w, x), 1e-4)


# ---- Partitioned by hand ---------------------------------------------------------------------------------------------


def in_parts(axis_name, **options):
    def f(x, scale, bias, residual, mask):
        return batch_norm(
            x, scale, bias, residual=residual, mask=mask, axis=AXIS, activation="relu", axis_name=axis_name, **options
        )

    return f


@case
def shard_map():
    """With axis_name as batch-norm of the whole, parameters shared or cut; masks count other elements in each part."""
    with x64():
        args, turns = operands(F64), itertools.cycle(meshes())
        want = gradient(op(formula, "all"))(*args)
        for spec, name in (
            (("a", None, "b"), ("a", "b")),
            (("a", "b", None), "a"),
            ((None, None, ("b", "a")), ("a", "b")),
            ((None, "a", "b"), "b"),
        ):
            full, channels = P(*spec), P(*spec[AXIS : AXIS + 1])
            specs, mesh = (full, channels, channels, full, full), next(turns)
            f = jax.shard_map(in_parts(name), mesh=mesh, in_specs=specs, out_specs=(full, channels, channels))
            assert_close(jax.jit(gradient(f))(*place(args, mesh, spec)), want, 1e-10)


@case
def shard_map_without_axis_name():
    """Each part is a problem of its own, the gradient of shared parameters their sum."""
    with x64():
        args = operands(F64)
        parts, shared = P(("a", "b")), P()
        specs = parts, shared, shared, parts, parts

        def alone(x, scale, bias, residual, mask):
            y, mean, var = in_parts(None)(x, scale, bias, residual, mask)
            return y, mean[None], var[None]

        f = jax.shard_map(alone, mesh=auto_mesh(), in_specs=specs, out_specs=(parts,) * 3)
        split = [a[:, None] if a.ndim == 3 else a for a in args]
        by_vmap = jax.vmap(functools.partial(op(formula, "all")), (0, None, None, 0, 0))
        (y, *statistics), (dx, dscale, dbias, dresidual) = gradient(by_vmap)(*split)
        want = (y[:, 0], *statistics), (dx[:, 0], dscale, dbias, dresidual[:, 0])
        assert_close(jax.jit(gradient(f))(*args), want, 1e-10)


@case
def shard_map_of_some_axes():
    """By hand along a, by XLA along b."""
    with x64():
        args, mesh = operands(F64), auto_mesh()
        want = gradient(op(formula, "all"))(*args)
        specs = P("a"), P(), P(), P("a"), P("a")
        f = jax.shard_map(in_parts("a"), mesh=mesh, in_specs=specs, out_specs=(P("a"), P(), P()), axis_names={"a"})
        for spec in (("a", None, "b"), ("a", "b", None)):
            assert_close(jax.jit(gradient(f))(*place(args, mesh, spec)), want, 1e-10)


def pmap(f, axes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return jax.pmap(f, axis_name="i", in_axes=axes)


@case
def pmap_of_unequal_parts():
    if not hasattr(jax, "pmap"):
        return
    with x64():
        args = unequal_parts()
        want = gradient(whole(formula))(*args)
        f = pmap(in_parts("i"), (0, None, None, 0, 0))
        assert_close(gradient(f)(*args), want, 1e-10)


@case
def groups():
    """The parts of a group are pooled, here two by two."""
    if not hasattr(jax, "pmap"):
        return
    with x64():
        x, scale, bias, residual, mask = unequal_parts()
        f = pmap(in_parts("i", axis_index_groups=[[0, 3], [1, 2]]), (0, None, None, 0, 0))
        y, mean, var = f(x, scale, bias, residual, mask)
        got = jax.grad(lambda x: (f(x, scale, bias, residual, mask)[0] ** 3).sum())(x)
        for group in (np.array([0, 3]), np.array([1, 2])):
            of_group = functools.partial(formula, residual=residual[group], mask=mask[group], axis=2, activation="relu")
            (want, want_mean, want_var), back = jax.vjp(lambda x: of_group(x, scale, bias), x[group])  # noqa: B023
            assert_close(y[group], want)
            for k in group:
                assert_close((mean[k], var[k]), (want_mean, want_var))
            nothing = jnp.zeros_like(want_mean)
            assert_close(got[group], back((3 * want**2, nothing, nothing))[0], 1e-10)


# ---- In processes ----------------------------------------------------------------------------------------------------


EVERY, ON_EIGHT = "every_layout", "any_ratio_of_mean_to_deviation"


@pytest.mark.parametrize("part", range(4))
def test_devices(part):
    """Several in each process: it takes seconds to start."""
    run_cases("test_jax_batchnorm_devices", [name for name in CASES if name not in (EVERY, ON_EIGHT)][part::4])


@pytest.mark.slow
def test_every_layout():
    run_cases("test_jax_batchnorm_devices", [EVERY])


def test_on_eight_devices():
    run_cases("test_jax_batchnorm_devices", [ON_EIGHT], devices=8)
