"""Attention for models of the package transformers: their ``AttentionInterface``."""

from typing import Any, TypeAlias

import torch

from pyreg.torch._functional import scaled_dot_product_attention

Tensor: TypeAlias = torch.Tensor


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with pyreg's dropout, with the parameters that transformers gives to an attention function.

    Parameters
    ----------
    module : torch.nn.Module
        The attention layer; its ``num_key_value_groups`` and ``is_causal`` count.
    query, key, value : Tensor, shape (N, heads, length, E)
        Queries, keys and values.
    attention_mask : Tensor or None
        As for ``sdpa``.
    dropout : float
        Probability of dropping a weight.  With 0, and with ``options``, transformers' own ``sdpa`` answers.
    scaling : float, optional
        Of the scores.
    is_causal : bool, optional
        By default what the layer says.
    **options
        What else transformers knows.

    Returns
    -------
    Tensor, shape (N, length, heads, E)
        The attention's output.
    None
        There are no weights to be returned.

    Raises
    ------
    ImportError
        If transformers is not installed.
    RuntimeError, ValueError
        As :func:`scaled_dot_product_attention`.

    Examples
    --------
    :func:`register_attention` has one.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if dropout == 0 or any(options.get(name) is not None for name in ("position_bias", "softcap")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, is_causal, **options)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    y = scaled_dot_product_attention(
        query,
        key,
        value,
        attention_mask,
        dropout,
        bool(is_causal and attention_mask is None and query.size(2) > 1),
        scale=scaling,
        enable_gqa=getattr(module, "num_key_value_groups", 1) > 1,
    )
    return y.transpose(1, 2).contiguous(), None


def register_attention(name: str = "pyreg") -> None:
    """Let models of transformers be asked for pyreg's attention: ``attn_implementation="pyreg"``.

    Parameters
    ----------
    name : str
        By which models ask for it.

    Raises
    ------
    ImportError
        If transformers is not installed, or has no ``AttentionInterface``.

    Examples
    --------
    >>> import pyreg.torch
    >>> pyreg.torch.register_attention()  # doctest: +SKIP
    >>> model = AutoModel.from_config(config, attn_implementation="pyreg")  # doctest: +SKIP
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)  # else models make no mask at all
