"""What the primitives of pyreg.jax share: evaluation outside jit, and lowering by backend and sharding."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from pyreg._arguments import check_dtype
from pyreg._version import __version__
from pyreg.jax import _backend, _compat

Function = Callable[..., Sequence[Any]]  # operands -> results, parameters by keyword


class Partition(NamedTuple):
    """How an op is cut into shards: the dims of its operands and results by name, and what each device then computes.

    Dims of one name are cut alike, as the first operand is; names that it lacks are not cut.
    """

    names: Callable[..., tuple[list[list[str]], list[list[str]]]]  # (*avals, **params) -> of operands, of results
    compute: Callable[..., Sequence[Any]]  # (axes, avals, *shards, **params); axes: mesh axes that cut a name
    even: bool = False  # cut only what divides: where it does not, shards end with padding


def define(
    name: str,
    abstract: Callable[..., Any],
    reference: Function,
    native: Function | None = None,
    callback: Function | None = None,
    partition: Partition | None = None,
    has_kernel: Callable[..., bool] = lambda **_: True,
    repeats: Callable[[int], bool] = lambda operand: True,
    jet: Callable[..., Any] | None = None,
    outside_jit: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] = lambda *args, **params: (args, params),
) -> Primitive:
    """A primitive with several results; without a kernel it is the reference everywhere.  Batch dims come first:
    all dims but the last of the second operand.

    abstract : (avals, params) -> result avals.
    reference : in JAX operations; for every platform.
    native : by FFI; for CPUs.  Its parameter `reuse` says that a result may take the place of the first operand.
    callback : for one problem, without batch dims: with NumPy arrays, returns NumPy arrays.
    partition : of `native`.
    has_kernel : params -> whether it is `native` and `callback` for them, too; else the reference is all there is.
    repeats : number of an operand -> whether it is repeated along a batch dim that it lacks; else it gets one of 1.
    jet : rule for Taylor series; by default that of the reference.
    outside_jit : operands, params -> those of the same call that a program is compiled for, and kept.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)

    @functools.lru_cache(maxsize=1024)
    def compiled(**params: Any) -> Any:
        def bind(*args: Any) -> Any:
            return primitive.bind(*args, **params)

        bind.__qualname__ = name
        return jax.jit(_compat.mark_as_primitive(bind))

    def evaluate(*args: Any, **params: Any) -> Any:
        args, params = outside_jit(*args, **params)
        with jax.disable_jit(False):
            return compiled(**params)(*args)

    primitive.def_impl(evaluate)

    def batch(args: Any, dims: Any, **params: Any) -> Any:
        size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
        args = [
            jnp.broadcast_to(a, (size if repeats(i) else 1, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
            for i, (a, d) in enumerate(zip(args, dims, strict=True))
        ]
        results = primitive.bind(*args, **params)
        return results, [0] * len(results)

    batching.primitive_batchers[primitive] = batch

    def by_callback(*args: Any, **params: Any) -> Any:
        avals = abstract(*map(jax.typeof, args), **params)

        def each_problem(*arrays: Any) -> list[Any]:
            assert callback is not None
            batch_dims = arrays[1].ndim - 1
            batch = arrays[0].shape[:batch_dims]
            arrays = tuple(np.broadcast_to(a, batch + a.shape[batch_dims:]) for a in arrays)
            results = [np.empty(a.shape, a.dtype) for a in avals]
            for at in np.ndindex(batch):
                for result, part in zip(results, callback(*(a[*at, ...] for a in arrays), **params), strict=True):
                    result[at] = part
            return results

        return jax.pure_callback(each_problem, avals, *args)

    def on_cpu(params: dict[str, Any], in_place: bool) -> tuple[Function, str]:
        backend = _backend.backend() if native and has_kernel(**params) else "jax"
        functions: dict[str, Any] = {"ffi": native, "jax": reference, "callback": by_callback}
        function: Function = functools.partial(functions[backend], **params)
        return (functools.partial(function, reuse=in_place) if backend == "ffi" else function), backend

    def lower(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        platforms = tuple(ctx.platforms or ctx.module_context.platforms)
        by_reference: Function = functools.partial(reference, **params)
        if "cpu" not in platforms:
            return mlir.lower_fun(by_reference, multiple_results=True)(ctx, *args)
        # In place saves up to 20 %; but of a program's operand XLA makes a copy first, and takes 1.7 times as long.
        in_place = len(platforms) == 1 and not isinstance(args[0].owner, mlir.ir.Block)
        function, backend = on_cpu(params, in_place)
        if len(platforms) > 1:
            return mlir.lower_fun(
                lambda *args: lax.platform_dependent(
                    *args, cpu=lambda *args: list(function(*args)), default=lambda *args: list(by_reference(*args))
                ),
                multiple_results=True,
            )(ctx, *args)
        if backend == "ffi" and partition and _on_several_devices(ctx):
            function = _partitioned(function, partition, params)
            meaning = f"{name} {__version__} {params} {ctx.avals_in} x64={flag('jax_enable_x64')}"
            return _compat.lower_partitioned(function, jax.make_jaxpr(function)(*ctx.avals_in), ctx, args, meaning)
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

    # One rule for all platforms, because JAX cannot lower a rule for one of several that is not cacheable; and not
    # cacheable, because a cache hides what operands are.
    mlir.register_lowering(primitive, lower, cacheable=False)
    _compat.register(primitive, jet or functools.partial(_jet_by, reference))
    return primitive


def _jet_by(reference: Function, primals: Any, series: Any, **params: Any) -> Any:
    """Taylor series of the formula in JAX operations; `series` has those of each operand."""
    from jax.experimental.jet import jet

    smooth = [jnp.issubdtype(p.dtype, jnp.floating) for p in primals]

    def function(*args: Any) -> Any:
        left = iter(args)
        return list(reference(*(next(left) if s else p for s, p in zip(smooth, primals, strict=True)), **params))

    operands, terms = tuple(itertools.compress(primals, smooth)), tuple(itertools.compress(series, smooth))
    return jet(function, operands, terms, factorial_scaled=False)  # a rule has coefficients, not derivatives


def flag(name: str) -> bool:
    """An option of JAX, as it is in this thread."""
    return bool(getattr(jax.config, name))


# ---- Operands --------------------------------------------------------------------------------------------------------


def check_array(x: Any) -> jax.Array:
    array: jax.Array = jnp.asarray(x)
    check_dtype(array)
    return array


def _varying(aval: Any) -> frozenset[str]:
    """Mesh axes of shard_map over which a value varies.  Without a default: gradients would be wrong in silence."""
    axes: frozenset[str] = aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # vma: JAX 0.9
    return axes


def vary_alike(*operands: Any) -> list[Any]:
    """Under shard_map: operands that vary over the same mesh axes, so that the gradient is summed where one did not."""
    axes = [_varying(jax.typeof(a)) for a in operands]
    every = frozenset[str]().union(*axes)
    return [
        lax.pcast(a, tuple(sorted(every - have)), to="varying") if every - have else a
        for a, have in zip(operands, axes, strict=True)
    ]


# ---- Shards ----------------------------------------------------------------------------------------------------------


def _on_several_devices(ctx: mlir.LoweringRuleContext) -> bool:
    """Whether XLA will partition the program.  Not inside shard_map and pmap, and not for export, which has no room for
    the Python function that partitions."""
    context: Any = ctx.module_context.axis_context
    exported = ctx.module_context.lowering_parameters.for_export
    return _compat.CAN_PARTITION and not exported and hasattr(context, "device_assignment") and context.num_devices > 1


def _partitioned(native: Function, partition: Partition, params: dict[str, Any]) -> Function:
    """``native``, with the rule for shards."""
    x64 = flag("jax_enable_x64")  # of this thread: XLA calls the rule from another

    def axes_of(operand: Any, names: list[str]) -> dict[str, Any]:
        spec = tuple(operand.sharding.spec)
        sizes = operand.sharding.mesh.shape
        axes = {}
        for name, n, a in zip(names, operand.shape, spec, strict=False):
            shards = math.prod(sizes[axis] for axis in (a if isinstance(a, tuple) else (a,))) if a is not None else 1
            if a is not None and not (partition.even and n % shards):
                axes[name] = a
        return axes

    def shardings(mesh: Any, arg_shapes: Any) -> tuple[dict[str, Any], tuple[NamedSharding, ...], list[NamedSharding]]:
        operands, results = partition.names(*arg_shapes, **params)
        axes = axes_of(arg_shapes[0], operands[0])
        of = [NamedSharding(mesh, PartitionSpec(*(axes.get(n) for n in names))) for names in operands + results]
        return axes, tuple(of[: len(operands)]), of[len(operands) :]

    def partition_(mesh: Any, arg_shapes: Any, _: Any) -> Any:
        axes, operands, results = shardings(mesh, arg_shapes)
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arg_shapes]

        def lower(*shards: Any) -> Sequence[Any]:
            with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.enable_x64(x64):
                return partition.compute(axes, avals, *shards, **params)

        return mesh, lower, results, operands

    def infer(mesh: Any, arg_shapes: Any, _: Any) -> list[NamedSharding]:
        return shardings(mesh, arg_shapes)[2]

    def rule(mesh: Any, operands: Any, results: Any) -> tuple[str, dict[str, Any]]:
        names = partition.names(*map(_shape, operands), **params)
        text = [", ".join(" ".join(dims) for dims in side) for side in names]
        first = set(names[0][0])
        whole = dict.fromkeys(n for side in names for dims in side for n in dims if n not in first)  # in their order
        return " -> ".join(text), {"need_replication_factors": tuple(whole)}

    function = custom_partitioning(lambda *args: list(native(*args)))
    function.def_partition(partition_, infer_sharding_from_operands=infer, sharding_rule=rule)
    return function


def _shape(value_type: Any) -> Any:
    return jax.ShapeDtypeStruct(tuple(value_type.shape), jnp.float32)
