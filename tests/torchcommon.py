"""What the tests of pyreg.torch share."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import pyreg  # noqa: E402

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def drawn(seed, count=1):
    """The first keys that dropout draws after torch.manual_seed(seed); torch's generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [torch.randint(2**63 - 1, ()).item() for _ in range(count)]


def mask(shape, p, key, broadcast_dims=()):
    return torch.from_numpy(pyreg.dropout_mask(tuple(shape), p, key=key, broadcast_dims=broadcast_dims))


def dropped(x, p, kept):
    """What torch's arithmetic makes of a mask, with zeros for what is dropped."""
    noise = kept.to(x.dtype).div_(1 - p)
    return torch.where(kept, x.detach() * noise, torch.zeros((), dtype=x.dtype))


def bits(x):
    """x as integers in C order: equal only if every bit is."""
    x = x.detach().resolve_neg().contiguous()
    if x.is_complex():
        x = torch.view_as_real(x)
    return x.view(WORDS[x.element_size()])


def assert_bits(got, want):
    """Equal shapes, dtypes and bits, where all NaNs count as one."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if got.is_floating_point():
        nan = got.isnan()
        assert torch.equal(nan, want.isnan())
        got, want = got.detach().masked_fill(nan, 0), want.detach().masked_fill(nan, 0)
    assert torch.equal(bits(got), bits(want))


def same_bits(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def describe(value):
    """All that can be seen of a result, comparable by ==."""
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    about = [type(value), value.dtype, value.layout, value.device, value.requires_grad]
    if value.is_nested:
        return [*about, [describe(v) for v in value.unbind()]]
    about.append(tuple(value.shape))
    if value.is_meta:
        return [*about, value.stride()]
    if value.is_quantized:
        value = value.int_repr()
    elif value.layout is not torch.strided:
        value = value.to_dense()
    else:
        about.append(value.stride())
    return [*about, bits(value).as_subclass(torch.Tensor).tolist()]


def outcome(call, seed=0):
    """What a call gives after torch.manual_seed: a description of its result, or the type and words of its error."""
    torch.manual_seed(seed)
    try:
        return describe(call())
    except Exception as error:
        return type(error), str(error)
