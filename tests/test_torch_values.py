"""pyreg.torch's dropout against torch's: values, masks, layouts, errors."""

import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.functional as F  # noqa: E402
from torchcommon import DTYPES, assert_bits, bits, describe, drawn, dropped, mask, outcome  # noqa: E402

import pyreg  # noqa: E402
import pyreg.torch  # noqa: E402

RATES = [k / 50 for k in range(1, 41)] + [1e-7, 0.999, 1 - 2**-20]  # the last scale is no float16
CHANNELS = {1: (3, 5, 7), 2: (3, 5, 4, 6), 3: (3, 5, 2, 3, 4)}
OF_CHANNELS = {d: getattr(pyreg.torch, f"dropout{d}d") for d in CHANNELS}
STOCK_OF_CHANNELS = {d: getattr(F, f"dropout{d}d") for d in CHANNELS}


@pytest.fixture
def torch_threads():
    """A function that sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- Values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_values_are_those_of_torch(dtype):
    x = normal(40, 25, dtype=dtype)
    for p in RATES:
        torch.manual_seed(1)
        assert_bits(pyreg.torch.dropout(x, p), dropped(x, p, mask(x.shape, p, drawn(1)[0])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_torch(dtype):
    x, dy = normal(40, 25, dtype=dtype), normal(40, 25, dtype=dtype, seed=1)
    for p in RATES[::5]:
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = pyreg.torch.dropout(leaf, p)
        y.backward(dy)
        kept = mask(x.shape, p, drawn(1)[0])
        assert_bits(y, dropped(x, p, kept))
        assert_bits(leaf.grad, dropped(dy, p, kept))


@pytest.mark.parametrize("p", [0.5, 1 / 3, 0.2, 0.6, 0.9])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_all_numbers_of_half_types(dtype, p):
    """0.5 and 1/3 have scales of few bits, 2 and 1.5: products are often halfway between two numbers."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    torch.manual_seed(2)
    assert_bits(pyreg.torch.dropout(x, p), dropped(x, p, mask(x.shape, p, drawn(2)[0])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropped_elements_are_positive_zero(dtype):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0, -0.0, 2.0], dtype=dtype)
    x = special.repeat(50)
    torch.manual_seed(3)
    y = pyreg.torch.dropout(x, 0.5)
    kept = mask(x.shape, 0.5, drawn(3)[0])
    assert 100 < kept.sum() < 200
    assert not bits(y)[~kept].any()
    assert_bits(y[kept], (x * 2)[kept])


def test_a_dropped_gradient_is_zero_even_if_nan():
    x = torch.ones(100, requires_grad=True)
    torch.manual_seed(3)
    pyreg.torch.dropout(x, 0.5).backward(torch.full((100,), float("nan")))
    assert torch.equal(x.grad.isnan(), mask((100,), 0.5, drawn(3)[0]))
    assert not bits(x.grad)[~x.grad.isnan()].any()


def test_denormals_are_scaled():
    x = torch.full((64,), 1e-40)
    torch.manual_seed(0)
    assert_bits(pyreg.torch.dropout(x, 0.5), dropped(x, 0.5, mask(x.shape, 0.5, drawn(0)[0])))


# ---- Masks -----------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "permuted": lambda x: x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "steps": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "rows of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "some of a batch": lambda x: torch.cat([x, x])[: len(x)],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded inside": lambda x: x[..., :1].expand_as(x),
    "flipped": lambda x: x.flip(-1).flip(-1),
    "off by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "overlapping": lambda x: x.flatten().as_strided(x.shape, (7, 5, 3, 1)),
    "negative": lambda x: torch.complex(x, -x).conj().imag,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_is_that_of_the_drawn_key(layout, dtype, torch_threads):
    if layout == "negative" and dtype not in DTYPES[:2]:
        pytest.skip("no complex type has such parts")
    x = LAYOUTS[layout](normal(3, 4, 5, 6, dtype=dtype))
    for seed in range(3):
        for count in (1, 2):
            torch_threads(count)
            torch.manual_seed(seed)
            y = pyreg.torch.dropout(x, 0.3)
            assert_bits(y, dropped(x, 0.3, mask(x.shape, 0.3, drawn(seed)[0])))
            assert y.stride() == F.dropout(x, 0.3).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_in_all_layouts(layout):
    make = LAYOUTS[layout]
    base, dy = normal(3, 4, 5, 6).requires_grad_(), make(normal(3, 4, 5, 6, seed=1))
    torch.manual_seed(0)
    y = pyreg.torch.dropout(base, 0.3)
    y.backward(dy)
    assert_bits(base.grad, dropped(dy, 0.3, mask(base.shape, 0.3, drawn(0)[0])))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "rows of a wider tensor"])
def test_many_elements_by_several_threads(layout, torch_threads):
    x = LAYOUTS[layout](torch.arange(2_097_152.0).reshape(2, 16, 256, 256))
    want = dropped(x, 0.3, mask(x.shape, 0.3, drawn(0)[0]))
    for count in (1, 2):
        torch_threads(count)
        torch.manual_seed(0)
        assert torch.equal(pyreg.torch.dropout(x, 0.3), want)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (17,), (2,) * 9])
def test_shapes(shape):
    x = torch.ones(shape)
    for seed in range(20):
        torch.manual_seed(seed)
        y = pyreg.torch.dropout(x, 0.5)
        assert y.shape == x.shape
        assert_bits(y, dropped(x, 0.5, mask(x.shape, 0.5, drawn(seed)[0])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("spatial", CHANNELS)
def test_masks_of_channels(spatial, inplace, dtype):
    shape = CHANNELS[spatial]
    last = {2: [torch.channels_last], 3: [torch.channels_last_3d]}.get(spatial, [])
    for form in [torch.contiguous_format, *last]:
        x = normal(*shape, dtype=dtype).contiguous(memory_format=form)
        base = x.clone().requires_grad_()
        stock = STOCK_OF_CHANNELS[spatial](x, 0.4)
        torch.manual_seed(5)
        y = OF_CHANNELS[spatial](base * 1, 0.4, True, inplace)
        y.backward(torch.ones_like(x))
        kept = mask(shape, 0.4, drawn(5)[0], tuple(range(2, spatial + 2)))
        assert (kept.flatten(2).all(2) == kept.flatten(2).any(2)).all()
        assert_bits(y, dropped(x, 0.4, kept))
        assert_bits(base.grad, dropped(torch.ones_like(x), 0.4, kept))
        assert y.stride() == stock.stride()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spatial", CHANNELS)
def test_channels_of_other_dims(spatial):
    for dims in range(7):
        if dims == spatial + 2:
            continue
        x = normal(*(2,) * dims)
        for training in (True, False):
            for inplace in (True, False):

                def run(f, x=x, arguments=(training, inplace)):
                    return f(x.clone(), 0.5, *arguments)

                want, got = (
                    outcome(lambda f=f, run=run: run(f)) for f in (STOCK_OF_CHANNELS[spatial], OF_CHANNELS[spatial])
                )
                assert got == want


def test_the_warning_of_three_dims_stays():
    for f in (F.dropout2d, pyreg.torch.dropout2d):
        with pytest.warns(UserWarning, match="dropout2d: Received a 3D input"):
            f(torch.ones(2, 3, 4), 0.5)


def test_one_draw_for_each_call():
    x = torch.ones(1000)
    torch.manual_seed(7)
    results = [pyreg.torch.dropout(x, 0.5) for _ in range(3)]
    after = torch.randint(2**63 - 1, ()).item()
    *keys, last = drawn(7, 4)
    assert after == last
    for y, key in zip(results, keys, strict=True):
        assert_bits(y, dropped(x, 0.5, mask(x.shape, 0.5, key)))


def test_the_backward_pass_draws_nothing():
    x = torch.ones(1000, requires_grad=True)
    y = pyreg.torch.dropout(x, 0.5)
    before = torch.get_rng_state()
    y.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_generator_of_ones_own(inplace):
    x = normal(50)
    before = torch.get_rng_state()
    y = pyreg.torch.dropout(x.clone(), 0.5, inplace=inplace, generator=torch.Generator().manual_seed(9))
    assert torch.equal(torch.get_rng_state(), before)
    assert_bits(y, dropped(x, 0.5, mask(x.shape, 0.5, drawn(9)[0])))
    generator = torch.Generator().manual_seed(9)
    results = [pyreg.torch.dropout(x, 0.5, generator=generator) for _ in range(2)]
    for y, key in zip(results, drawn(9, 2), strict=True):
        assert_bits(y, dropped(x, 0.5, mask(x.shape, 0.5, key)))


def test_a_generator_that_nothing_is_drawn_from():
    x = normal(50)
    generator = torch.Generator().manual_seed(9)
    state = generator.get_state()
    assert pyreg.torch.dropout(x, 0.5, False, generator=generator) is x
    assert pyreg.torch.dropout(x, 0, generator=generator) is x
    assert not pyreg.torch.dropout(x, 1.0, generator=generator).any()
    assert torch.equal(generator.get_state(), state)
    with pytest.raises(ValueError, match="generator is given"):
        pyreg.torch.dropout(x.to(torch.complex64), 0.5, generator=generator)


# ---- What torch answers ----------------------------------------------------------------------------------------------


class OfFunctions(torch.Tensor):
    """A subclass that sees functions."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return super().__torch_function__(function, types, args, kwargs or {})


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


class OfOperators(torch.Tensor):
    """A subclass that sees operators."""

    @staticmethod
    def __new__(cls, x):
        self = torch.Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype, device=x.device)
        self.inside = x
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        unwrap = torch.utils._pytree.tree_map_only(cls, lambda a: a.inside, (args, kwargs or {}))
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, function(*unwrap[0], **unwrap[1]))


def quantized():
    return torch.quantize_per_tensor(normal(4, 6), 0.1, 0, torch.qint8)


INPUTS = {
    "complex": lambda: normal(4, 6).to(torch.complex64),
    "int": lambda: torch.arange(24).reshape(4, 6),
    "uint8": lambda: torch.ones(4, 6, dtype=torch.uint8),
    "bool": lambda: torch.ones(4, 6, dtype=torch.bool),
    "float8": lambda: torch.ones(4, 6).to(torch.float8_e4m3fn),
    "coo": lambda: normal(4, 6).to_sparse(),
    "csr": lambda: normal(4, 6).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([normal(2, 3), normal(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([normal(2, 3), normal(4, 3)], layout=torch.jagged),
    "meta": lambda: torch.empty(4, 6, device="meta"),
    "quantized": quantized,
    "mkldnn": lambda: normal(4, 6).to_mkldnn(),
    "sees functions": lambda: normal(4, 6).as_subclass(OfFunctions),
    "plain subclass": lambda: normal(4, 6).as_subclass(Plain),
    "array": lambda: np.ones((4, 6), np.float32),
    "list": lambda: [1.0, 2.0],
    "number": lambda: 1.0,
    "none": lambda: None,
    "empty": lambda: torch.empty(0, 3),
    "empty that wants gradients": lambda: torch.empty(0, 3, requires_grad=True),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs_are_for_torch(name):
    rates = (0.5, 0.0) if name in ("coo", "csr") else (0.5, 0.0, 1.0)  # 1.0 leaves memory as it was, in torch's
    for p in rates:
        for training in (True, False):
            for inplace in (False, True):

                def run(f, arguments=(p, training, inplace)):
                    x = INPUTS[name]()
                    y = f(x, *arguments)
                    return y, y is x, x

                want, got = (outcome(lambda f=f: run(f)) for f in (F.dropout, pyreg.torch.dropout))
                assert got == want


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["complex", "int", "coo", "meta", "quantized", "sees functions", "array", "none"])
def test_other_inputs_of_channels_are_for_torch(name):
    def run(f):
        x = INPUTS[name]()
        return f(x[:, :, None, None] if name in ("complex", "int", "sees functions") else x, 0.5)

    want, got = (outcome(lambda f=f: run(f)) for f in (F.dropout2d, pyreg.torch.dropout2d))
    assert got == want


def test_a_subclass_that_sees_operators_is_for_torch():
    results = []
    for f in (F.dropout, pyreg.torch.dropout):
        torch.manual_seed(0)
        results.append(f(OfOperators(normal(4, 6)), 0.5))
        assert type(results[-1]) is OfOperators
    assert_bits(results[1].inside, results[0].inside)


@pytest.mark.parametrize("make", [lambda x: x.to(torch.int64), lambda x: x.to(torch.bool)], ids=["int", "bool"])
def test_gradients_of_integers_are_refused_in_the_words_of_torch(make):
    def run(f):
        return f(make(torch.ones(3)).requires_grad_(), 0.5)

    assert outcome(lambda: run(pyreg.torch.dropout)) == outcome(lambda: run(F.dropout))


@pytest.mark.parametrize(
    "p",
    [*(0, 1, 2, -1, True, False), *(0.0, -0.0, 1.0, -0.1, 1.5), *(float("nan"), float("inf")), *("0.5", None, 1 + 0j)],
    ids=repr,
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
def test_what_is_no_rate_inside_0_and_1(name, training, p):
    shape = CHANNELS[int(name[-2])] if name[-1] == "d" else (3, 4)
    for inplace in (False, True):

        def run(f, inplace=inplace):
            x = torch.full(shape, -2.0)
            y = f(x, p, training, inplace)
            return y is x, y + 0.0, x + 0.0  # torch's zeros are negative here

        want, got = (outcome(lambda family=family: run(getattr(family, name))) for family in (F, pyreg.torch))
        assert got == want


@pytest.mark.parametrize("p", [0, 1, 0.0, 1.0])
def test_gradients_at_rates_0_and_1(p):
    results = []
    for f in (F.dropout, pyreg.torch.dropout):
        x = torch.ones(5, requires_grad=True)
        f(x, p).sum().backward()
        results.append(x.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["dropout", "dropout1d", "dropout2d", "dropout3d"])
def test_evaluation_returns_the_input_itself(name, inplace):
    x = torch.ones(CHANNELS[int(name[-2])] if name[-1] == "d" else (3, 4))
    before = torch.get_rng_state()
    assert getattr(pyreg.torch, name)(x, 0.5, False, inplace) is x
    layer = getattr(pyreg.torch, name.capitalize())(0.5, inplace).eval()
    assert layer(x) is x
    assert (x == 1).all()
    assert torch.equal(torch.get_rng_state(), before)


# ---- In place --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels last", "steps", "rows of a wider tensor"])
def test_in_place(layout, dtype):
    x = LAYOUTS[layout](normal(3, 4, 5, 6, dtype=dtype))
    want = dropped(x, 0.3, mask(x.shape, 0.3, drawn(0)[0]))
    torch.manual_seed(0)
    assert pyreg.torch.dropout(x, 0.3, inplace=True) is x
    assert_bits(x, want)


def test_in_place_writes_nothing_beside_a_view():
    base = torch.ones(6, 8)
    pyreg.torch.dropout(base[1:5, 2:6], 0.5, inplace=True)
    inside = torch.zeros(6, 8, dtype=torch.bool)
    inside[1:5, 2:6] = True
    assert (base[~inside] == 1).all()
    assert set(base[inside].tolist()) == {0.0, 2.0}


def multiply(leaf):
    return leaf * 3


VIEWS = {
    "result": multiply,
    "view of a result": lambda leaf: multiply(leaf)[1:],
    "transposed result": lambda leaf: multiply(leaf).T,
    "reshaped result": lambda leaf: multiply(leaf).view(-1),
}


@pytest.mark.parametrize("name", VIEWS)
def test_gradients_in_place(name):
    leaf = normal(4, 6).requires_grad_()
    x = VIEWS[name](leaf)
    kept = mask(x.shape, 0.5, drawn(0)[0])
    (want,) = torch.autograd.grad((VIEWS[name](leaf) * kept.float().div(0.5)).pow(2).sum(), leaf)
    torch.manual_seed(0)
    y = pyreg.torch.dropout(x, 0.5, inplace=True)
    assert y is x
    y.pow(2).sum().backward()
    assert torch.equal(leaf.grad, want)


def test_the_base_of_a_view_has_the_gradient():
    leaf = torch.ones(4, 6, requires_grad=True)
    base = leaf * 3
    torch.manual_seed(0)
    pyreg.torch.dropout(base[1:3], 0.5, inplace=True)
    base.sum().backward()
    want = torch.full((4, 6), 3.0)
    want[1:3] *= mask((2, 6), 0.5, drawn(0)[0]).float() * 2
    assert torch.equal(leaf.grad, want)


def leaf():
    return torch.ones(4, 6, requires_grad=True)


def viewed_without_gradients():
    x = leaf() * 1
    with torch.no_grad():
        return x.view(6, 4)


REFUSED = {
    "leaf": leaf,
    "parameter": lambda: torch.nn.Parameter(torch.ones(4, 6)),
    "view of a leaf": lambda: leaf()[:2],
    "step of a leaf": lambda: leaf()[:, ::2],
    "expanded": lambda: torch.ones(4, 1).expand(4, 6),
    "expanded result": lambda: (torch.ones(4, 1, requires_grad=True) * 1).expand(4, 6),
    "one of several views": lambda: (leaf() * 1).unbind()[0],
    "one of several chunks": lambda: (leaf() * 1).chunk(2)[1],
    "view made without gradients": viewed_without_gradients,
}


@pytest.mark.parametrize("spatial", [0, 1])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_written_is_refused_and_left_as_it_is(name, spatial):
    def run(f):
        x = REFUSED[name]()
        if spatial:
            x = x[None, ..., None][:, :, :, 0] if x.dim() == 2 else x[None, None]
        with torch.no_grad():
            before = x.clone()
        torch.manual_seed(0)
        with pytest.raises(Exception) as caught:  # noqa: PT011
            f(x, 0.5, True, True)
        return type(caught.value), str(caught.value), torch.equal(x.detach(), before)

    stock, ours = (STOCK_OF_CHANNELS[1], OF_CHANNELS[1]) if spatial else (F.dropout, pyreg.torch.dropout)
    kind, words, _ = run(stock)
    got = run(ours)
    assert got == (kind, words, True)


def test_in_place_of_an_inference_tensor_is_refused_outside():
    with torch.inference_mode():
        x = torch.ones(4, 6)
        assert pyreg.torch.dropout(x, 0.5, inplace=True) is x
    kind, words = outcome(lambda: F.dropout(x, 0.5, inplace=True))
    assert kind is RuntimeError
    assert outcome(lambda: pyreg.torch.dropout(x, 0.5, inplace=True)) == (kind, words)


def test_a_leaf_is_written_without_gradients():
    x = leaf()
    with torch.no_grad():
        assert pyreg.torch.dropout(x, 0.5, inplace=True) is x
    assert x.is_leaf
    assert x.requires_grad
    assert set(x.tolist()[0]) <= {0.0, 2.0}


@pytest.mark.parametrize(
    "make",
    [lambda: torch.ones(4, 6), lambda: torch.ones(6, 4).T, lambda: leaf() * 1, lambda: (leaf() * 1)[1:]],
    ids=["plain", "transposed", "with gradients", "view"],
)
def test_autograd_notices_what_was_written_in_place(make):
    for f in (F.dropout, pyreg.torch.dropout):
        x, scale = make(), torch.ones((), requires_grad=True)
        saved = scale * x
        before = x._version
        f(x, 0.5, True, True)
        assert x._version > before
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saved.sum().backward()


def test_detached_data_in_place():
    x = leaf() * 1
    inside = x.detach()
    pyreg.torch.dropout(inside, 0.5, inplace=True)
    assert not inside.requires_grad
    assert set(x.detach().flatten().tolist()) == {0.0, 2.0}


# ---- PyTorch's own samples -------------------------------------------------------------------------------------------


NAMES = {
    "nn.functional.dropout": (F.dropout, pyreg.torch.dropout),
    "nn.functional.dropout2d": (F.dropout2d, pyreg.torch.dropout2d),
    "nn.functional.dropout3d": (F.dropout3d, pyreg.torch.dropout3d),
    "nn.functional.alpha_dropout": (F.alpha_dropout, None),
    "nn.functional.feature_alpha_dropout": (F.feature_alpha_dropout, None),
    "nn.functional.batch_norm": (F.batch_norm, pyreg.torch.batch_norm),
    "native_batch_norm": (torch.native_batch_norm, None),
    "_native_batch_norm_legit": (torch._native_batch_norm_legit, None),
    "nn.functional.scaled_dot_product_attention": (
        F.scaled_dot_product_attention,
        pyreg.torch.scaled_dot_product_attention,
    ),
}


def copied(value):
    """Tensors as new leaves, with the same strides."""
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value).copy_(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    return tuple(copied(v) for v in value) if isinstance(value, tuple) else value


def called(f, sample):
    """Results and gradients of a call, and what it left in its arguments; or its error."""
    args, kwargs = copied((sample.input, *sample.args)), copied(sample.kwargs)
    torch.manual_seed(0)
    try:
        y = f(*args, **kwargs)
        first = y[0] if isinstance(y, tuple) else y
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        wanted = [a for a in tensors if a.requires_grad]
        gradients = ()
        if first.requires_grad and first.numel():
            gradients = torch.autograd.grad(first, wanted, torch.ones_like(first), allow_unused=True)
        return [*(y if isinstance(y, tuple) else [y]), *gradients, *(a for a in tensors if not a.requires_grad)]
    except Exception as error:
        return type(error), str(error)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(v) for key, v in value.items()}
    return tuple(double(v) for v in value) if isinstance(value, tuple) else value


class Sample:
    def __init__(self, sample, convert=lambda value: value):
        self.input, self.args, self.kwargs = (convert(v) for v in (sample.input, sample.args, sample.kwargs))


def attention_of_mask(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's attention, by the mask of the drawn key."""
    batch = query.shape[:-2] if enable_gqa else torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    shape = (*batch, query.shape[-2], key.shape[-2])
    kept = mask(shape, dropout_p, torch.randint(2**63 - 1, ()).item())
    attention = torch.ops.aten._scaled_dot_product_attention_math.default
    arguments = query, key, value, attn_mask, dropout_p, is_causal, kept
    return attention(*arguments, scale=scale, enable_gqa=enable_gqa)[0]


def samples(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.testing._internal.common_methods_invocations import op_db
        except ImportError as error:
            pytest.skip(f"torch's samples cannot be imported: {error}")
        for op in op_db:
            if op.name == name and dtype in op.dtypes:
                yield from op.sample_inputs("cpu", dtype, requires_grad=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_torch(name, dtype):
    stock, ours = NAMES[name]
    count = 0
    for sample in samples(name, dtype):
        count += 1
        want = called(stock, sample)
        if ours is None:
            with pyreg.torch.accelerate(dropout=True, batch_norm=True):
                got = called(stock, sample)
        else:
            got = called(ours, sample)
        if isinstance(want, tuple):
            assert got == want
            continue
        assert [describe(a)[:-1] for a in got] == [describe(a)[:-1] for a in want]  # all but the bits
        if "alpha" in name:
            assert describe(got) == describe(want)
        elif "dropout" in name:
            assert_dropout_of_sample(name, sample, got, want)
        else:
            reference, attention = stock, "attention" in name
            p = sample.kwargs.get("dropout_p", 0.0)
            if attention and (p in (0.0, 1.0) or sample.input.dim() != sample.args[0].dim()):
                assert describe(got) == describe(want)
                continue
            if attention:
                reference = attention_of_mask
                want = called(reference, sample)
            exact = called(reference, Sample(sample, double))
            for mine, theirs, true in zip(got, want, exact, strict=True):
                if true is None or not true.numel():
                    assert mine is None or not mine.numel()
                    continue
                assert mine.isfinite().all()
                unit = torch.finfo(mine.dtype).eps * max(true.abs().max().item(), 1)
                error, theirs = ((a.double() - true).abs().max().item() for a in (mine, theirs))
                assert error <= max(
                    2 * theirs, (16 if dtype is torch.float64 else 4) * unit
                )  # float64 is its own reference
    if not count:
        pytest.skip("torch has no samples of this type")


def assert_dropout_of_sample(name, sample, got, want):
    p, training = sample.kwargs.get("p", 0.5), sample.kwargs.get("training", True)
    dims = int(name[-2]) + 2 if name[-1] == "d" else None
    x = sample.input.detach()
    if not (training and 0 < p < 1 and x.numel() and dims in (None, x.dim())):
        assert describe(got) == describe(want)
        return
    kept = mask(x.shape, p, drawn(0)[0], tuple(range(2, x.dim())) if dims else ())
    assert_bits(got[0], dropped(x, p, kept))
    assert_bits(got[1], dropped(torch.ones_like(x), p, kept))


def test_more_dims_than_numpy_has_are_refused():
    x = torch.ones([1] * 66 + [2, 3]).transpose(-1, -2)
    for op in (lambda: pyreg.torch.dropout(x, 0.5), lambda: pyreg.torch.batch_norm(x, None, None, training=True)):
        with pytest.raises(ValueError, match="68 dims; wanted at most 64"):
            op()
