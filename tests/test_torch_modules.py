"""pyreg.torch's layers, batch-norm and attention against torch's, and models that are converted and reverted."""

import copy
import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torchcommon import DTYPES, assert_bits, describe, drawn, mask, outcome  # noqa: E402

import pyreg.torch  # noqa: E402

LAYERS = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]
SHAPES = {"BatchNorm1d": [(8, 5), (4, 5, 6)], "BatchNorm2d": [(4, 5, 3, 2)], "BatchNorm3d": [(4, 5, 2, 3, 2)]}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def model_of_all():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Dropout2d(0.3), nn.ReLU()),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5, momentum=None),
    )


def error(got, want):
    return (got.detach().double() - want.detach().double()).abs().max().item()


def no_worse(got, stock, want, ulps=4):
    """got, of lower precision, is about as near to want as torch's is."""
    assert got.shape == stock.shape
    assert got.dtype == stock.dtype
    unit = torch.finfo(got.dtype).eps * max(want.detach().abs().max().item(), 1)
    assert error(got, want) <= max(2 * error(stock, want), ulps * unit)


# ---- convert and revert ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_converted_and_reverted(name):
    theirs, ours = getattr(nn, name), getattr(pyreg.torch, name)
    assert issubclass(ours, theirs)
    assert ours.__name__ == name
    layer = theirs(3) if "Batch" in name else theirs(0.3, inplace=True)
    seen = repr(layer), list(layer.state_dict()), dict(layer.named_parameters()), set(vars(layer))
    assert pyreg.torch.convert(layer) is layer
    assert type(layer) is ours
    assert (repr(layer), list(layer.state_dict())) == seen[:2]
    assert all(a is b for a, b in zip(layer.parameters(), seen[2].values(), strict=True))
    assert pyreg.torch.convert(layer) is layer
    assert type(layer) is ours
    assert pyreg.torch.revert(layer) is layer
    assert type(layer) is theirs
    assert set(vars(layer)) == seen[3]
    assert pyreg.torch.revert(layer) is layer
    assert type(layer) is theirs


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_are_those_of_torch(name):
    for args, kwargs in [
        ((), {}),
        ((0.3,), {}),
        ((3,), {}),
        ((3, 1e-3), {}),
        ((1.5,), {}),
        ((-1,), {}),
        ((), {"p": 0.2}),
    ]:

        def make(family, args=args, kwargs=kwargs):
            layer = getattr(family, name)(*args, **kwargs)
            return repr(layer), list(layer.state_dict().values())

        assert outcome(lambda make=make: make(pyreg.torch)) == outcome(lambda make=make: make(nn))


@pytest.mark.parametrize("change", [pyreg.torch.convert, pyreg.torch.revert])
@pytest.mark.parametrize(
    "model", [None, 3, "model", torch.ones(3), nn.Dropout, [nn.Dropout()]], ids=lambda m: type(m).__name__
)
def test_what_is_no_module(change, model):
    with pytest.raises(TypeError, match="model is of type"):
        change(model)


class Half(nn.Dropout):
    def forward(self, x):
        return x / 2


class MyNorm(nn.BatchNorm1d):
    pass


def test_subclasses_are_left_alone():
    others = (
        Half(),
        MyNorm(3),
        nn.AlphaDropout(),
        nn.FeatureAlphaDropout(),
        nn.LazyBatchNorm1d(),
        nn.SyncBatchNorm(3),
        nn.LSTM(3, 3),
    )
    model = nn.ModuleList(others)
    before = [type(m) for m in model.modules()]
    pyreg.torch.convert(model)
    assert [type(m) for m in model.modules()] == before
    norm = nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3))
    assert not type(pyreg.torch.convert(norm)).__module__.startswith("pyreg")


class Tagged(pyreg.torch.Dropout):
    pass


def test_subclasses_of_ours_are_left_alone():
    layer = Tagged(0.5)
    assert type(pyreg.torch.revert(layer)) is Tagged
    assert set(layer(torch.ones(100)).tolist()) == {0.0, 2.0}


def test_shared_layers_stay_shared():
    layer = nn.Dropout(0.5)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer, layer)})
    pyreg.torch.convert(model)
    assert model["a"] is model["b"][0] is model["b"][1] is layer
    assert type(layer) is pyreg.torch.Dropout
    pyreg.torch.revert(model["b"])
    assert type(model["a"]) is nn.Dropout


def test_hooks_and_flags_stay():
    layer, calls = nn.Dropout(0.5), []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.eval()
    layer.note = "mine"
    pyreg.torch.convert(layer)
    x = torch.ones(3)
    assert layer(x) is x
    assert (calls, layer.note, layer.training) == (["forward"], "mine", False)
    pyreg.torch.revert(layer)(x)
    assert calls == ["forward"] * 2


def test_states_are_those_of_torch():
    model, converted = model_of_all(), pyreg.torch.convert(model_of_all())
    assert describe(list(model.state_dict().values())) == describe(list(converted.state_dict().values()))
    assert list(model.state_dict()) == list(converted.state_dict())
    converted.load_state_dict(model.state_dict())
    pyreg.torch.revert(converted).load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"])
def test_dropout_layers_call_the_functions(name):
    x = torch.ones(2, 3, *[2] * int(name[-2])) if name[-1] == "d" else torch.ones(2, 30)
    function = getattr(pyreg.torch, name.lower())
    for inplace in (False, True):
        layer = pyreg.torch.convert(getattr(nn, name)(0.4, inplace))
        a, b = x.clone(), x.clone()
        torch.manual_seed(5)
        y = layer(a)
        torch.manual_seed(5)
        assert_bits(y, function(b, 0.4))
        assert (y is a) is inplace


def train(model, steps):
    for step in steps:
        model.zero_grad()
        model(normal(4, 3, 6, 6, dtype=torch.float64, seed=step)).pow(2).sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


def without_dropout(model):
    for layer in model.modules():
        if hasattr(layer, "p"):
            layer.p = 0.0
    return model.double()


def test_training_with_and_without_conversion():
    """Three models that learn the same, by turns with torch's layers and ours."""
    models = [without_dropout(model_of_all()) for _ in range(3)]
    changes = [[], [pyreg.torch.convert, pyreg.torch.revert], [lambda model: model, pyreg.torch.convert]]
    for model, change in zip(models, changes, strict=True):
        for half in range(2):
            if change:
                change[half](model)
            train(model, range(3 * half, 3 * half + 3))
    x = normal(4, 3, 6, 6, dtype=torch.float64, seed=9)
    for model in models[1:]:
        for (name, got), want in zip(model.state_dict().items(), models[0].state_dict().values(), strict=True):
            torch.testing.assert_close(got, want, msg=name)
        torch.testing.assert_close(model.eval()(x), models[0].eval()(x))
    assert models[1][6].num_batches_tracked == 6


def test_tools_for_batch_norm_take_converted_models():
    model, converted = model_of_all(), pyreg.torch.convert(model_of_all())
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(converted))
    assert [type(m) for m in synced.modules() if "Norm" in type(m).__name__] == [nn.SyncBatchNorm] * 2
    assert list(synced.state_dict()) == list(model.state_dict())
    x = normal(2, 3, 6, 6)
    for m in (model, converted):
        m(x)
    fused, want = (nn.utils.fusion.fuse_conv_bn_eval(m.eval()[0], m[1]) for m in (converted, model))
    torch.testing.assert_close(fused(x), want(x))
    torch.testing.assert_close(fused(x), converted[:2](x))
    averaged = torch.optim.swa_utils.AveragedModel(converted)
    torch.optim.swa_utils.update_bn([x], averaged)
    nn.utils.parametrizations.spectral_norm(converted[0])
    converted.train()(x)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.7, "eps": 0.1},
    {"momentum": None, "affine": False, "eps": 1e-3},
]


def pair(name, options, dtype=torch.float32):
    """torch's layer in float64, torch's and ours of a type, with equal parameters."""
    layers = [getattr(family, name)(5, **options) for family in (nn, nn, pyreg.torch)]
    for layer, kind in zip(layers, (torch.float64, dtype, dtype), strict=True):
        layer.to(kind)
        with torch.no_grad():
            for i, p in enumerate(layer.parameters()):
                p.copy_(normal(5, seed=10 + i, dtype=dtype))
    return layers


def step(layer, x, dy):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(dy.to(y.dtype))
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_batch_norm_is_that_of_torch(name, options):
    if "bias" in options and "bias" not in nn.BatchNorm1d.__init__.__code__.co_varnames:
        pytest.skip("this version of torch has no such option")
    for shape in SHAPES[name]:
        for last in (False, True) if len(shape) in LAST else (False,):
            exact, stock, ours = pair(name, options)
            for i in range(3):
                x, dy = normal(*shape, seed=i) * 2 + 3, normal(*shape, seed=i + 50)
                if last:
                    x, dy = (a.contiguous(memory_format=LAST[a.dim()]) for a in (x, dy))
                results = [step(layer, a, dy) for layer, a in ((ours, x), (stock, x), (exact, x.double()))]
                for got, theirs, want in zip(*results, strict=True):
                    no_worse(got, theirs, want, 8)
                for got, theirs in zip(results[0][:2], results[1][:2], strict=True):
                    assert got.stride() == theirs.stride()
                states = [dict(layer.state_dict()) for layer in (ours, stock, exact)]
                assert list(states[0]) == list(states[1])
                for key, want in states[2].items():
                    no_worse(states[0][key], states[1][key], want) if want.is_floating_point() else None
                    assert want.is_floating_point() or states[0][key] == want
            x = normal(*shape, seed=9)
            no_worse(ours.eval()(x), stock.eval()(x), exact.eval()(x.double()))


@pytest.mark.parametrize("mode", ["module", "input"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dtypes_of_batch_norm(name, dtype, mode):
    """Of all of the layer, or of the input with float32 parameters: not for float64, which torch refuses."""
    for shape in SHAPES[name]:
        exact, stock, ours = pair(name, {}, dtype if mode == "module" else torch.float32)
        x, dy = normal(*shape, dtype=dtype) + 1, normal(*shape, dtype=dtype, seed=1)
        if mode == "input" and dtype is torch.float64:
            want, got = (outcome(lambda layer=layer, x=x: layer(x)) for layer in (stock, ours))
            assert got == want
            assert want[0] is RuntimeError
            continue
        results = [step(layer, a, dy) for layer, a in ((ours, x), (stock, x), (exact, x.double()))]
        for got, theirs, want in zip(*results, strict=True):
            no_worse(got, theirs, want, 16 if dtype is torch.float64 else 4)
        for key, want in exact.state_dict().items():
            if want.is_floating_point():
                no_worse(ours.state_dict()[key], stock.state_dict()[key], want)


@pytest.mark.parametrize(
    "layout", ["transposed", "steps", "expanded", "channels last", "dy expanded", "dy channels last"]
)
def test_layouts_of_batch_norm(layout):
    shape = (4, 5, 3, 2)
    x, dy = normal(*shape), normal(*shape, seed=1)
    change = {
        "transposed": lambda a: a.transpose(2, 3).contiguous().transpose(2, 3),
        "steps": lambda a: a.repeat_interleave(2, -1)[..., ::2],
        "expanded": lambda a: a[..., :1].expand_as(a),
        "channels last": lambda a: a.contiguous(memory_format=torch.channels_last),
    }[layout.removeprefix("dy ")]
    x, dy = (x, change(dy)) if layout.startswith("dy") else (change(x), dy)
    exact, stock, ours = pair("BatchNorm2d", {})
    results = []
    for layer, a in ((ours, x), (stock, x), (exact, x.double())):
        leaf = a.detach().requires_grad_()
        layer.zero_grad()
        y = layer(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy.to(y.dtype))])
    for got, theirs, want in zip(*results, strict=True):
        no_worse(got, theirs, want, 8)
        assert got.stride() == theirs.stride()


def calls_of_batch_norm():
    x, ones, zeros = normal(4, 5, 3), torch.ones(5), torch.zeros(5)
    yield "nothing", (x, None, None), {"training": True}
    yield "evaluation without statistics", (x, None, None), {"training": False}
    yield "one statistic", (x, zeros, None), {"training": True}
    yield "evaluation", (x, zeros, ones, ones, zeros), {}
    yield "weight alone", (x, None, None, ones), {"training": True}
    yield "bias alone", (x, None, None, None, ones), {"training": True}
    yield "n is 1", (x[:1, :, 0], zeros, ones), {"training": True}
    yield "n is 1 in 3 dims", (x[:1, :, :1], zeros, ones), {"training": True}
    yield "wrong statistics", (x, torch.zeros(4), torch.ones(4)), {"training": True}
    yield "wrong weight", (x, zeros, ones, torch.ones(6), None), {"training": True}
    yield "wrong bias", (x, zeros, ones, ones, torch.ones(4)), {"training": True}
    yield "statistics of 2 dims", (x, torch.zeros(5, 1), torch.ones(5, 1)), {"training": True}
    yield "mixed types", (x.double(), zeros, ones), {"training": True}
    yield "mixed parameters", (x, zeros.double(), ones.double()), {"training": True}
    yield "half parameters", (x, zeros.half(), ones.half(), ones.half(), zeros.half()), {"training": True}
    yield "integers", (x.long(), zeros, ones), {"training": True}
    yield "complex", (x.to(torch.complex64), zeros, ones), {"training": True}
    yield "1 dim", (x[:, 0, 0], None, None), {"training": True}
    yield "no dims", (x[0, 0, 0], None, None), {"training": True}
    yield "empty batch", (x[:0], zeros, ones), {"training": True}
    yield "empty batch, evaluation", (x[:0], zeros, ones), {}
    yield "no channels", (x[:, :0], None, None), {"training": True}
    yield "none", (None, zeros, ones), {"training": True}
    yield "momentum 0", (x, zeros, ones), {"training": True, "momentum": 0.0}
    yield "momentum 1", (x, zeros, ones), {"training": True, "momentum": 1}
    yield "momentum 2", (x, zeros, ones), {"training": True, "momentum": 2.0}
    yield "momentum none", (x, zeros, ones), {"training": True, "momentum": None}
    yield "eps 0", (x, zeros, ones), {"training": True, "eps": 0}
    yield "eps 0.0", (x, zeros, ones), {"training": True, "eps": 0.0}
    yield "eps negative", (x, zeros, ones), {"training": True, "eps": -1e-5}
    yield "eps none", (x, zeros, ones), {"training": True, "eps": None}
    yield "statistics that want gradients", (x, zeros.clone().requires_grad_(), ones), {"training": True}
    yield "meta", (x.to("meta"), zeros.to("meta"), ones.to("meta")), {"training": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("args", "kwargs"), [c[1:] for c in calls_of_batch_norm()], ids=[c[0] for c in calls_of_batch_norm()]
)
def test_unusual_calls_of_batch_norm(args, kwargs):
    results = []
    for f in (F.batch_norm, pyreg.torch.batch_norm):
        own = [a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
        try:
            results.append([f(*own, **kwargs), *own[1:3]])
        except Exception as e:
            results.append((type(e), str(e)))
    want, got = results
    if isinstance(want, tuple):
        assert got == want
        return
    for mine, theirs in zip(got, want, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert mine.stride() == theirs.stride()
            assert mine.requires_grad == theirs.requires_grad
            torch.testing.assert_close(mine, theirs, equal_nan=True)
        else:
            assert mine is theirs


@pytest.mark.parametrize("name", SHAPES)
def test_errors_of_layers_are_those_of_torch(name):
    _, stock, ours = pair(name, {})
    for shape in [
        (),
        (5,),
        (4, 5),
        (4, 5, 6),
        (4, 5, 6, 2),
        (4, 5, 6, 2, 2),
        (1, 5),
        (1, 5, 1),
        (1, 5, 1, 1),
        (1, 5, 1, 1, 1),
    ]:
        x = normal(*shape)
        want, got = (outcome(lambda layer=layer, x=x: layer(x).shape) for layer in (stock, ours))
        assert got == want
        x = normal(*shape[:1], 7, *shape[2:])
        want, got = (outcome(lambda layer=layer, x=x: layer(x).shape) for layer in (stock, ours))
        assert got == want
    assert ours.num_batches_tracked == stock.num_batches_tracked  # also of calls that fail


def test_statistics_far_from_zero():
    """A mean of 1000 deviations, in each layout: torch loses digits in some."""
    for shape, last in [((64, 5), False), ((16, 5, 8, 8), False), ((16, 5, 8, 8), True)]:
        x = normal(*shape) + 1000
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        mean, var = torch.zeros(5), torch.ones(5)
        y = pyreg.torch.batch_norm(x, mean, var, training=True, momentum=1.0)
        dims = [d for d in range(x.dim()) if d != 1]
        want = x.double().var(dims)
        torch.testing.assert_close(var.double(), want, rtol=1e-6, atol=0)
        torch.testing.assert_close(mean.double(), x.double().mean(dims), rtol=1e-7, atol=0)
        torch.testing.assert_close(
            y.double(), F.batch_norm(x.double(), None, None, training=True), rtol=1e-4, atol=1e-3
        )


def test_a_training_step_between_the_passes_of_an_evaluation():
    """torch lets the running statistics, which the evaluation saves, change unnoticed."""
    results = []
    for layer in pair("BatchNorm1d", {})[1:]:
        x = normal(4, 5).requires_grad_()
        y = layer.eval()(x)
        layer.train()(normal(4, 5, seed=1))
        y.sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results)


def test_saved_parameters_are_guarded():
    """A parameter that is changed between the passes is noticed, as in torch."""
    for f in (F.batch_norm, pyreg.torch.batch_norm):
        x, weight = normal(4, 5).requires_grad_(), torch.ones(5, requires_grad=True)
        y = f(x, None, None, weight, training=True)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_derivatives_of_batch_norm(affine):
    x = normal(3, 2, 2, dtype=torch.float64).requires_grad_()
    parameters = [normal(2, dtype=torch.float64, seed=i).requires_grad_() for i in (1, 2)] if affine else []

    def f(x, *parameters):
        return pyreg.torch.batch_norm(x, None, None, *parameters, training=True)

    inputs = (x, *parameters)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, inputs)
    y = f(*inputs)
    for wanted in itertools.chain.from_iterable(itertools.combinations(inputs, n) for n in range(1, len(inputs) + 1)):
        got = torch.autograd.grad(y, wanted, torch.ones_like(y) * x.detach(), retain_graph=True)
        stock = F.batch_norm(x, None, None, *parameters, training=True)
        want = torch.autograd.grad(stock, wanted, torch.ones_like(y) * x.detach())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_frozen_parts_of_batch_norm():
    for frozen in itertools.product([False, True], repeat=3):
        results = []
        for f in (F.batch_norm, pyreg.torch.batch_norm):
            tensors = [normal(4, 5), torch.full((5,), 2.0), torch.ones(5)]
            for t, still in zip(tensors, frozen, strict=True):
                t.requires_grad_(not still)
            y = f(tensors[0], None, None, *tensors[1:], training=True)
            assert y.requires_grad is not all(frozen)
            if y.requires_grad:
                y.backward(normal(4, 5, seed=1))
            results.append([t.grad for t in tensors])
        for got, want in zip(*results, strict=True):
            assert (got is None) is (want is None)
            if got is not None:
                torch.testing.assert_close(got, want)


def test_gradient_penalties_through_a_model():
    results = []
    for change in (lambda model: model, pyreg.torch.convert):
        model = change(without_dropout(model_of_all()))
        x = normal(4, 3, 6, 6, dtype=torch.float64).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        dx.pow(2).sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_batch_norm_under_transforms_and_modes():
    x, weight = normal(4, 5, dtype=torch.float64), normal(5, dtype=torch.float64, seed=1)

    def run(f):
        def loss(x, weight):
            return f(x, None, None, weight, training=True).pow(3).sum()

        batched = torch.func.vmap(lambda x: f(x, None, None, weight, training=True))(torch.stack([x, x * 2]))
        with torch.inference_mode():
            inside = f(x, None, None, weight, training=True) + 0
        with torch.no_grad():
            without = f(x, None, None, weight, training=True)
        return [*torch.func.grad(loss, (0, 1))(x, weight), batched, inside, without]

    for got, want in zip(run(pyreg.torch.batch_norm), run(F.batch_norm), strict=True):
        torch.testing.assert_close(got, want)


# ---- Attention -------------------------------------------------------------------------------------------------------


def naive(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """By the textbook, with the mask of the drawn key."""
    if enable_gqa:
        key, value = (a.repeat_interleave(query.shape[-3] // a.shape[-3], -3) for a in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    weights = scores.softmax(-1).nan_to_num(0)
    weights = weights * mask(weights.shape, dropout_p, drawn(0)[0]) / (1 - dropout_p)
    return weights @ value


MASKS = {
    "no mask": {},
    "bool": {"attn_mask": normal(6, 7) > 0},
    "bool of heads": {"attn_mask": normal(4, 6, 7) > -0.5},
    "numbers": {"attn_mask": normal(6, 7)},
    "numbers of a batch": {"attn_mask": normal(2, 1, 6, 7)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "a row that sees nothing": {"attn_mask": torch.arange(6)[:, None] > torch.zeros(7)},
}


def qkv(dtype=torch.float32, heads=4):
    return (
        normal(2, 4, 6, 8, dtype=dtype),
        normal(2, heads, 7, 8, dtype=dtype, seed=1),
        normal(2, heads, 7, 5, dtype=dtype, seed=2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attention_with_dropout(name, dtype):
    kwargs = {key: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for key, v in MASKS[name].items()}
    wide = {key: v.double() if getattr(v, "is_floating_point", bool)() else v for key, v in kwargs.items()}
    results = []
    for f, of, more in ((pyreg.torch.scaled_dot_product_attention, dtype, kwargs), (naive, torch.float64, wide)):
        inputs = [t.to(of).requires_grad_() for t in qkv(dtype)]
        torch.manual_seed(0)
        y = f(*inputs, dropout_p=0.3, **more)
        assert y.dtype is of
        y.sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    eps = torch.finfo(dtype).eps
    for got, want in zip(*results, strict=True):
        assert error(got, want) <= 16 * eps * max(want.abs().max().item(), 1)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_with_fewer_heads_of_keys(heads):
    inputs = qkv(torch.float64, heads)
    torch.manual_seed(0)
    y = pyreg.torch.scaled_dot_product_attention(*inputs, dropout_p=0.3, enable_gqa=True)
    torch.testing.assert_close(y, naive(*inputs, dropout_p=0.3, enable_gqa=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_attention_without_dropout_is_that_of_torch(name, dtype):
    kwargs = {key: v.to(dtype) if getattr(v, "is_floating_point", bool)() else v for key, v in MASKS[name].items()}
    for p in (0.0, 0, 1.0):
        runs = [outcome(lambda f=f, p=p: f(*qkv(dtype), dropout_p=p, **kwargs)) for f in ATTENTIONS]
        assert runs[0] == runs[1]


ATTENTIONS = F.scaled_dot_product_attention, pyreg.torch.scaled_dot_product_attention


def calls_of_attention():
    q, k, v = qkv()
    see = torch.ones(6, 7, dtype=torch.bool)
    yield "mask and causal", (q, k, v, see), {"is_causal": True}
    yield "mixed types", (q, k.double(), v), {}
    yield "integers", (q.long(), k.long(), v.long()), {}
    yield "1 dim", (q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}
    yield "other width", (q, k[..., :5], v), {}
    yield "other keys", (q, k, v[..., :3, :]), {}
    yield "other batch", (q, k[:1].expand(3, 4, 7, 8), v), {}
    yield "other heads", (q, k[:, :3], v[:, :3]), {}
    yield "heads that do not divide", (q, k[:, :3], v[:, :3]), {"enable_gqa": True}
    yield "heads of 2 dims", (q[0, 0], k[0, 0], v[0, 0]), {"enable_gqa": True}
    yield "mask of another shape", (q, k, v, see[:4]), {}
    yield "mask of integers", (q, k, v, see.long()), {}
    yield "mask of another type", (q, k, v, see.double()), {}
    yield "mask that is none", (q, k, v, "mask"), {}
    yield "none", (None, k, v), {}
    yield "no keys", (q, k, None), {}
    yield "negative rate", (q, k, v, None, -0.1), {}
    yield "rate above 1", (q, k, v, None, 1.5), {}
    yield "rate of a wrong type", (q, k, v, None, "0.3"), {}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("args", "kwargs"), [c[1:] for c in calls_of_attention()], ids=[c[0] for c in calls_of_attention()]
)
def test_errors_of_attention_are_those_of_torch(args, kwargs):
    """In the words, unless shapes do not fit: these are found out by other operations."""
    args = (*args, None)[:4] + (tuple(args[4:]) or (0.3,))
    want, got = (outcome(lambda f=f: f(*args, **kwargs)) for f in ATTENTIONS)
    if isinstance(want, tuple) and "size" in want[1]:
        want, got = want[0], got[0]
    elif isinstance(want, list):
        want, got = want[:7], got[:7]  # all but the bits
    assert got == want


def test_shapes_of_attention():
    for batch in [(3,), (2, 3), (2, 1, 3)]:
        inputs = [normal(*batch, n, 8) for n in (6, 7, 7)]
        torch.manual_seed(0)
        y = pyreg.torch.scaled_dot_product_attention(*inputs, dropout_p=0.3)
        torch.testing.assert_close(y, naive(*inputs, dropout_p=0.3))
        assert y.stride() == F.scaled_dot_product_attention(*inputs, dropout_p=0.3).stride()


def test_attention_over_other_dims_is_that_of_torch():
    """Two dims, batches that broadcast, and grouped heads of three dims."""
    shapes = [
        ((6, 8), (7, 8), {}),
        ((2, 4, 6, 8), (2, 1, 7, 8), {}),
        ((4, 6, 8), (2, 4, 7, 8), {}),
        ((4, 6, 8), (2, 7, 8), {"enable_gqa": True}),
    ]
    for of_query, of_key, more in shapes:
        q, k, v = normal(*of_query), normal(*of_key, seed=1), normal(*of_key, seed=2)
        want, got = (outcome(lambda f=f, a=(q, k, v), m=more: f(*a, dropout_p=0.3, **m)) for f in ATTENTIONS)
        assert got == want


def test_large_scores_of_half_types():
    """Whose scaled product is finite, though the plain one is not."""
    q = torch.full((1, 2, 256), 40.0, dtype=torch.float16)
    k, v = q.clone(), normal(1, 2, 4, dtype=torch.float16)
    torch.manual_seed(0)
    y = pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.testing.assert_close(
        y.double(), naive(q.double(), k.double(), v.double(), dropout_p=0.3), rtol=1e-2, atol=1e-2
    )
    torch.manual_seed(0)
    y = pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.3, scale=-0.01)
    want = naive(q.double(), k.double(), v.double(), dropout_p=0.3, scale=-0.01)
    torch.testing.assert_close(y.double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_scale_that_has_no_root(scale):
    q, k, v = qkv(torch.float64)
    torch.manual_seed(0)
    y = pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.3, scale=scale)
    torch.testing.assert_close(y, naive(q, k, v, dropout_p=0.3, scale=scale))


def test_attention_changes_none_of_its_arguments():
    q, k, v = qkv()
    attn_mask = normal(6, 7)
    copies = [t.clone() for t in (q, k, v, attn_mask)]
    pyreg.torch.scaled_dot_product_attention(q, k, v, attn_mask, 0.3)
    for a, b in zip(copies, (q, k, v, attn_mask), strict=True):
        assert torch.equal(a, b)


def test_gradients_of_an_attention_mask():
    q, k, v = qkv(torch.float64)
    results = []
    for f in (pyreg.torch.scaled_dot_product_attention, naive):
        attn_mask = normal(6, 7, dtype=torch.float64).requires_grad_()
        torch.manual_seed(0)
        f(q, k, v, attn_mask, 0.3).pow(2).sum().backward()
        results.append(attn_mask.grad)
    torch.testing.assert_close(*results)


# ---- What the layers leave behind ------------------------------------------------------------------------------------


def test_storages_stay_resizable():
    """Sharded training (FSDP) frees and resizes them."""
    x, weight = normal(8, 4).requires_grad_(), torch.ones(4, requires_grad=True)
    y = pyreg.torch.batch_norm(x, None, None, weight, training=True)
    y.sum().backward()
    for tensor in (x, y, weight, x.grad, weight.grad):
        tensor.detach().untyped_storage().resize_(1000)


def test_running_statistics_of_half_types_do_not_overflow():
    x, running = (normal(64, 4) * 400).half(), torch.ones(4).half()
    want = running.clone()
    pyreg.torch.batch_norm(x, torch.zeros(4).half(), running, training=True)
    F.batch_norm(x, torch.zeros(4).half(), want, training=True)
    assert want.isfinite().all()
    torch.testing.assert_close(running, want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_attention_under_autocast(dtype):
    q, k, v = (normal(2, 3, 8, seed=seed).to(dtype) for seed in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        got = pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)
        want = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-9)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


def test_attention_of_two_devices_is_refused():
    q = torch.ones(2, 3, 4)
    for function in (F.scaled_dot_product_attention, pyreg.torch.scaled_dot_product_attention):
        with pytest.raises(RuntimeError, match="same device type"):
            function(q, q.to("meta"), q, dropout_p=0.5)
