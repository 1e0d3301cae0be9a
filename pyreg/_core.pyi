from typing import Any

from numpy import ndarray

F32: int
F64: int
F16: int
BF16: int
PHILOX: int
THREEFRY: int
THREEFRY_X64: int
MAX_DIMS: int

def set_bfloat16(dtype: Any) -> None: ...
def dtype_code(x: object) -> int: ...
def empty_like(x: ndarray) -> ndarray: ...
def dropout(
    dtype: int,
    x: ndarray,
    y: ndarray,
    generator: int,
    key: int,
    rate: float,
    offset: int,
    scaled: bool,
    mask_strides: tuple[int, ...] | None,
    scale: float | None = None,
) -> None: ...
def dropout_at(
    dtype: int,
    x: int,
    y: int,
    shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    y_strides: tuple[int, ...],
    key: int,
    rate: float,
    scale: float,
    mask_strides: tuple[int, ...] | None,
    max_threads: int,
    team: bool,
) -> None: ...
def array_at(dtype: int, address: int, shape: tuple[int, ...], strides: tuple[int, ...], owner: object) -> ndarray: ...
def dropout_scale(dtype: int, rate: float) -> float: ...
def dropout_mask(n: int, out: ndarray, packed: bool, generator: int, key: int, rate: float, offset: int) -> None: ...
def apart(x: ndarray) -> bool: ...
def can_write(
    out: object, x: ndarray, inputs: tuple[ndarray | None, ...], values: tuple[ndarray | None, ...]
) -> bool: ...
def deliver(y: ndarray, out: ndarray | None) -> ndarray: ...
def is_like(array: Any, x: ndarray) -> bool: ...
def is_statistic(array: Any, dtype: int, channels: int) -> bool: ...
def batch_norm(
    dtype: int,
    x: Any,
    axis: int,
    epsilon: float,
    relu: bool,
    scale: Any,
    bias: Any,
    mask: Any,
    residual: Any,
    y: Any,
    mean_low: Any = None,
    max_threads: int = 0,
    team: bool = False,
) -> tuple[ndarray, ndarray]: ...
def batch_norm_inference(
    dtype: int,
    x: Any,
    axis: int,
    epsilon: float,
    relu: bool,
    scale: Any,
    bias: Any,
    residual: Any,
    mean: Any,
    var: Any,
    y: Any,
) -> None: ...
def batch_norm_backward(
    dtype: int,
    dy: Any,
    x: Any,
    axis: int,
    epsilon: float,
    relu: bool,
    scale: Any,
    mask: Any,
    y: Any,
    mean: Any,
    var: Any,
    dx: Any,
    dresidual: Any,
    dmean: Any = None,
    dvar: Any = None,
    max_threads: int = 0,
    team: bool = False,
) -> tuple[ndarray, ndarray]: ...
def fail_allocation(n: int) -> None: ...
def set_gears(parallel_from: float = -1, cache_bytes: int = 0) -> None: ...
def random_block(generator: int, key: tuple[int, ...], counter: tuple[int, ...]) -> tuple[int, ...]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def ask_threads(n: int) -> list[int]: ...
def end_threads(number: list[int]) -> None: ...
def unpinned() -> None: ...
def isa_available() -> list[str]: ...
def use_isa(name: str) -> None: ...
def config() -> dict[str, Any]: ...
def ffi_handlers() -> dict[str, Any]: ...
def this_is_the_main_thread() -> None: ...
def ffi_api() -> tuple[int, int]: ...
def follow_openmp(file: str) -> bool: ...
def ffi_use_xla_pool(use: bool) -> None: ...
