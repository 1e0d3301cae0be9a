"""The private names of JAX that pyreg uses, each with what is lost where it is gone."""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from jax.extend.core import Primitive
from jax.interpreters import mlir

try:  # else a program does not tell its devices to the lowering of a primitive, and shards are gathered
    from jax._src.dispatch import prim_requires_devices_during_lowering as _need_devices
except ImportError:
    CAN_PARTITION = False
else:
    CAN_PARTITION = True

try:  # else programs for several devices are not found in the persistent compilation cache
    from jax._src.custom_partitioning import _custom_partitioning_lowering_rule, _sharding_callbacks
except ImportError:
    _sharding_callbacks = None  # type: ignore[assignment]

try:  # else checkify does not see NaN in results of these primitives
    from jax._src import checkify as _checkify
except ImportError:
    _checkify = None  # type: ignore[assignment]

try:  # else jet does not know these primitives
    from jax.experimental.jet import jet_rules
except ImportError:
    jet_rules = {}


def mark_as_primitive(function: Callable[..., Any]) -> Callable[..., Any]:
    """Tells jax_debug_nans that nothing smaller is in the function."""
    function._apply_primitive = True  # type: ignore[attr-defined]
    return function


def cpu_lowerings() -> dict[Primitive, Any]:
    """The lowerings of primitives for the CPU, to be changed; raises AttributeError where JAX has them elsewhere."""
    rules: dict[Primitive, Any] = mlir._platform_specific_lowerings["cpu"]
    return rules


def register(primitive: Primitive, jet_rule: Callable[..., Any]) -> None:
    """What JAX wants to know of a primitive besides its public rules."""
    if CAN_PARTITION:
        _need_devices.add(primitive)
    if hasattr(_checkify, "error_checks") and hasattr(_checkify, "nan_error_check"):
        _checkify.error_checks[primitive] = functools.partial(_checkify.nan_error_check, primitive)
    jet_rules[primitive] = jet_rule


def lower_partitioned(
    function: Callable[..., Any], closed_jaxpr: Any, ctx: mlir.LoweringRuleContext, args: Any, meaning: str
) -> Any:
    """Lowers a call of `jax.experimental.custom_partitioning`, which is all of a jaxpr.

    JAX names the Python functions that partition by their address, and leaves what they compute out of the program.
    The persistent compilation cache then finds nothing, or, with `jax_remove_custom_partitioning_ptr_from_cache_key`,
    what another function computes.  Here the name is a digest of `meaning`, which has to say all that the result
    depends on.
    """
    if _sharding_callbacks is None or len(closed_jaxpr.eqns) != 1:
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)
    results = _custom_partitioning_lowering_rule(ctx, *args, **closed_jaxpr.eqns[0].params)
    call = results[0].owner
    if "backend_config" not in call.attributes:  # on one device
        return results
    address = call.attributes["backend_config"].value.encode()
    info = _sharding_callbacks.get(address)
    if info is None:
        return results
    devices = [d.id for d in getattr(ctx.module_context.axis_context, "device_assignment", None) or ()]
    meaning += f" {info.mesh.shape} {devices} {ctx.module_context.platforms}"
    name = "pyreg-" + hashlib.sha256(meaning.encode()).hexdigest()
    info = _sharding_callbacks.setdefault(name.encode(), info)
    ctx.module_context.add_keepalive(info)  # it may be another program's, of the same meaning
    with ctx.module_context.context:
        text = mlir.ir.StringAttr.get(name)
        call.attributes["backend_config"] = text
        call.attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get({"pyreg": text})  # stays in the cache's key
    return results
