"""``torch.nn.functional``'s functions, with pyreg's kernels; where there is nothing for them to do, torch's own."""

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from pyreg.torch import _compat
from pyreg.torch._drop import drop

Tensor: TypeAlias = torch.Tensor


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Set elements to zero at random and scale the others by ``1 / (1 - p)``: ``torch.nn.functional.dropout``.

    Parameters
    ----------
    input : Tensor
        Of any shape.  Dense tensors of float32, float64, float16 or bfloat16 in the memory of the CPU go to pyreg's
        kernel, all others to torch's function.
    p : float
        Probability of dropping an element.
    training : bool
        If false, return ``input``.
    inplace : bool
        Write the result into ``input``.
    generator : torch.Generator, optional
        Where the key of the mask is drawn; by default torch's generator, which ``torch.manual_seed`` seeds.

    Returns
    -------
    Tensor
        Shape, dtype and strides as torch's function gives them.  Kept elements have torch's values bit for bit, and
        dropped ones are +0, also where torch's multiplication gives NaN or -0.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1], or ``generator`` is given and torch's function would have to draw.

    Notes
    -----
    One call draws one key, ``torch.randint(2**63 - 1, ())``, and nothing else.  The mask is that of
    :func:`pyreg.dropout_mask` for the key: it does not depend on the number of threads, the memory layout or whether
    the program is compiled, and no mask is kept for the backward pass.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> x = torch.ones(8)
    >>> y = pyreg.torch.dropout(x, 0.5, generator=torch.Generator().manual_seed(0))
    >>> key = torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(0)).item()
    >>> bool((y.numpy() == pyreg.dropout(x.numpy(), 0.5, key=key)).all())
    True
    """
    if training is True and (y := drop(input, p, (), inplace, generator)) is not None:
        return y
    if generator is not None and training and isinstance(input, torch.Tensor) and input.numel() and 0 < p < 1:
        raise ValueError("generator is given, but the input is for torch's own dropout, which takes none")
    return F.dropout(input, p, training, inplace)


def _dropout_of_channels(
    stock: Callable[..., Tensor], spatial: int, input: Tensor, p: float, training: bool, inplace: bool
) -> Tensor:
    if training is True and isinstance(input, torch.Tensor) and input.dim() == spatial + 2:
        y = drop(input, p, tuple(range(2, spatial + 2)), inplace)
        if y is not None:
            return y
    return stock(input, p, training, inplace)


def dropout1d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels: ``torch.nn.functional.dropout1d``.

    Parameters
    ----------
    input : Tensor, shape (N, C, L)
        An input of another number of dims goes to torch's function.
    p, training, inplace
        As in :func:`dropout`.

    Returns
    -------
    Tensor
        As :func:`dropout`, with the mask of ``pyreg.dropout_mask(input.shape, p, key=key, broadcast_dims=2)``.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.dropout1d(torch.ones(2, 3, 4), 0.5)
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """
    return _dropout_of_channels(F.dropout1d, 1, input, p, training, inplace)


def dropout2d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels: ``torch.nn.functional.dropout2d``.

    Parameters
    ----------
    input : Tensor, shape (N, C, H, W)
        An input of another number of dims goes to torch's function.
    p, training, inplace
        As in :func:`dropout`.

    Returns
    -------
    Tensor
        As :func:`dropout`, with the mask of ``pyreg.dropout_mask(input.shape, p, key=key, broadcast_dims=(2, 3))``.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.dropout2d(torch.ones(2, 3, 4, 4), 0.5)
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """
    return _dropout_of_channels(F.dropout2d, 2, input, p, training, inplace)


def dropout3d(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """Drop whole channels: ``torch.nn.functional.dropout3d``.

    Parameters
    ----------
    input : Tensor, shape (N, C, D, H, W)
        An input of another number of dims goes to torch's function.
    p, training, inplace
        As in :func:`dropout`.

    Returns
    -------
    Tensor
        As :func:`dropout`, with the mask of ``pyreg.dropout_mask(input.shape, p, key=key, broadcast_dims=(2, 3, 4))``.

    Raises
    ------
    ValueError
        If ``p`` is outside [0, 1].

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> y = pyreg.torch.dropout3d(torch.ones(2, 3, 4, 4, 4), 0.5)
    >>> y.flatten(2).std(2, correction=0).max()
    tensor(0.)
    """
    return _dropout_of_channels(F.dropout3d, 3, input, p, training, inplace)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with pyreg's dropout of the weights: ``torch.nn.functional.scaled_dot_product_attention``.

    Parameters
    ----------
    query, key, value : Tensor, shapes (..., L, E), (..., S, E) and (..., S, V)
        Queries, keys and values.
    attn_mask : Tensor, optional
        Broadcasts to (..., L, S): bool, true where a key is attended to, or numbers that are added to the scores.
    dropout_p : float
        Probability of dropping a weight.  With 0 torch's function answers, whose fused kernels take no dropout.
    is_causal : bool
        Query i attends to keys 0 .. i.
    scale : float, optional
        Of the scores; by default ``1 / sqrt(E)``.
    enable_gqa : bool
        Whether each head of key and value serves several of query.

    Returns
    -------
    Tensor, shape (..., L, V)
        ``dropout(softmax(query @ key.T * scale + mask)) @ value``, as torch's own "math" path computes it.  Inputs of 2
        dims, and those whose batches are broadcast to each other, go to torch's function, dropout and all.

    Raises
    ------
    RuntimeError, ValueError
        As torch's function.

    Examples
    --------
    >>> import torch, pyreg.torch
    >>> q = k = v = torch.ones(2, 4, 8)
    >>> pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.1).shape
    torch.Size([2, 4, 8])
    """
    drops = isinstance(dropout_p, float) and 0 < dropout_p < 1 and (scale is None or type(scale) in (float, int))
    drops = drops and type(is_causal) is bool and type(enable_gqa) is bool
    if not (drops and _attends(query, key, value, attn_mask, is_causal, enable_gqa)):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    if enable_gqa:
        shared = query.size(-3) // key.size(-3)
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    factor = query.size(-1) ** -0.5 if scale is None else scale
    root = abs(factor) ** 0.5  # on both sides, so that the products stay small
    scores = (query * (root if factor > 0 else -root)) @ (key * root).transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        if attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), float("-inf"))
        else:
            scores = scores + attn_mask
        weights = _compat.safe_softmax(scores, -1)  # 0 for a query that attends to nothing
    return (dropout(weights, dropout_p) @ value).to(dtype)


def _attends(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    """Whether the formula is meant as it stands; what it broadcasts or refuses otherwise is torch's to say."""
    if not all(isinstance(a, torch.Tensor) for a in (query, key, value, query if mask is None else mask)):
        return False
    if query.is_nested:
        return False  # it has no shape
    dims = query.dim()
    for a in (query, key, value):
        if a.dim() != dims or dims < 3 or a.dtype != query.dtype or a.layout is not torch.strided or not a.is_cpu:
            return False
        if a.is_nested or 0 in a.shape:
            return False
    batch = query.shape[:-2]
    if enable_gqa:
        heads, shared = query.size(-3), key.size(-3)
        if dims < 4 or shared == 0 or heads % shared or key.shape[:-2] != value.shape[:-2]:
            return False
        fits = key.shape[:-3] == batch[:-1]
    else:
        fits = key.shape[:-2] == batch == value.shape[:-2]
    if not fits or key.size(-1) != query.size(-1) or key.size(-2) != value.size(-2):
        return False
    if mask is None:
        return True
    if is_causal or mask.dim() > dims or mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return False
    wanted = (*batch, query.size(-2), key.size(-2))
    return all(m in (1, n) for m, n in zip(mask.shape[::-1], wanted[::-1], strict=False))
