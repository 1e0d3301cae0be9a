"""pyreg.torch's dropout in the modes of torch: autograd, torch.func, compilers, checkpoints, pickles, threads."""

import contextlib
import copy
import io
import pickle

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.functional as F  # noqa: E402
from common import in_threads, python  # noqa: E402
from torch import nn  # noqa: E402
from torchcommon import assert_bits, describe, drawn, dropped, mask, outcome, same_bits  # noqa: E402

import pyreg.torch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # forward mode scripts functions
dropout = pyreg.torch.dropout
BOTH = {"torch": F.dropout, "pyreg": dropout}


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def noise(shape, p=0.5, key=None, dims=(), dtype=torch.float32):
    return mask(shape, p, drawn(0)[0] if key is None else key, dims).to(dtype) / (1 - p)


def seeded(f, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


def fixed(x):
    return seeded(dropout, x, 0.5)


def fixed_channels(x):
    return seeded(pyreg.torch.dropout2d, x, 0.5)


def fixed_in_place(x):
    return seeded(dropout, x * 1, 0.5, inplace=True)


@pytest.fixture
def dynamo():
    """torch.compile as if for the first time."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


# ---- Derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", [fixed, fixed_channels, fixed_in_place])
def test_derivatives(f):
    x = normal(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: f(x).sin(), x, check_fwd_over_rev=True, check_batched_grad=True)


def test_second_derivatives_are_exact():
    x = normal(50).requires_grad_()
    (first,) = torch.autograd.grad(fixed(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    n = noise((50,))
    torch.testing.assert_close(first, 3 * x**2 * n**3)
    torch.testing.assert_close(second, 6 * x * n**3)


def test_forward_mode():
    fwd = torch.autograd.forward_ad
    x, t = normal(40), normal(40, seed=1)
    for f in (fixed, fixed_in_place):
        with fwd.dual_level():
            plain = f(x)
            assert fwd.unpack_dual(plain).tangent is None
            y, tangent = fwd.unpack_dual(f(fwd.make_dual(x, t)))
        assert_bits(y, dropped(x, 0.5, mask((40,), 0.5, drawn(0)[0])))
        assert_bits(plain, y)
        assert_bits(tangent, dropped(t, 0.5, mask((40,), 0.5, drawn(0)[0])))


def test_batches_of_gradients():
    x = normal(6).requires_grad_()
    (rows,) = torch.autograd.grad(fixed(x), x, torch.eye(6), is_grads_batched=True)
    assert torch.equal(rows, noise((6,)).diag())
    for vectorize in (False, True):
        jacobian = torch.autograd.functional.jacobian(fixed, x, vectorize=vectorize)
        assert torch.equal(jacobian, noise((6,)).diag())

    def forward_mode(f):  # which draws where torch does not allow it
        jacobian = torch.autograd.functional.jacobian
        return outcome(lambda: jacobian(lambda x: f(x, 0.5), x, vectorize=True, strategy="forward-mode"))

    assert forward_mode(dropout) == forward_mode(F.dropout)


def test_an_expanded_gradient():
    x = normal(4, 5).requires_grad_()
    y = fixed(x)
    (want,) = torch.autograd.grad(y, x, torch.ones(()).expand(4, 5), retain_graph=True)
    assert_bits(want, noise((4, 5)))
    (twice,) = torch.autograd.grad(y, x, torch.ones(4, 5))
    assert_bits(twice, want)


def test_modes_without_gradients():
    x = normal(40).requires_grad_()
    want = fixed(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            y, stock = fixed(x), F.dropout(x, 0.5)
        assert_bits(y, want)
        assert (y.requires_grad, y.is_inference()) == (stock.requires_grad, stock.is_inference())
    with torch.inference_mode():
        inside = torch.ones(40)
    assert_bits(fixed(inside), noise((40,)))  # an inference tensor outside of the mode
    assert want.requires_grad
    assert not fixed(x.detach()).requires_grad


@pytest.mark.filterwarnings("ignore:Anomaly")
def test_anomaly_mode():
    x = normal(40).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        fixed(x).sum().backward()
        assert_bits(x.grad, noise((40,)))
        with pytest.raises(RuntimeError, match="returned nan"):
            fixed(x).backward(torch.full((40,), float("nan")))


def test_hooks_of_tensors_and_layers():
    layer = pyreg.torch.Dropout(0.5)
    x, seen = normal(40).requires_grad_(), []
    layer.register_forward_pre_hook(lambda m, args: seen.append("before"))
    layer.register_forward_hook(lambda m, args, y: seen.append("after"))
    layer.register_full_backward_hook(lambda m, dx, dy: seen.append((dx[0].clone(), dy[0].clone())))
    torch.manual_seed(0)
    y = layer(x)
    y.retain_grad()
    y.register_hook(lambda dy: dy * 2)
    y.sum().backward()
    assert seen[:2] == ["before", "after"]
    assert_bits(x.grad, noise((40,)) * 2)
    assert_bits(seen[2][0], noise((40,)) * 2)
    assert (y.grad == 2).all()


def saved_bytes(f):
    count = 0

    def pack(tensor):
        nonlocal count
        count += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f()
        y.sum().backward()
    return count


def test_no_mask_is_saved():
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: F.dropout(x, 0.5)) >= 4000
    assert saved_bytes(lambda: dropout(x, 0.5)) <= 8
    assert saved_bytes(lambda: dropout(x * 1, 0.5, inplace=True)) <= 16
    x = torch.ones(2, 5, 10, 10, requires_grad=True)
    assert saved_bytes(lambda: pyreg.torch.dropout2d(x, 0.5)) <= 8


def test_saved_tensors_may_be_stored_elsewhere():
    x = torch.ones(1000, requires_grad=True)

    def store(tensor):
        file = io.BytesIO()
        torch.save(tensor, file)
        return file.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(store, lambda data: torch.load(io.BytesIO(data))):
        y = fixed(x)
    y.sum().backward()
    assert_bits(x.grad, noise((1000,)))


# ---- torch.func ------------------------------------------------------------------------------------------------------


def rows_of(f, randomness, x, in_dims=0, **kwargs):
    return seeded(torch.func.vmap(f, in_dims=in_dims, randomness=randomness, **kwargs), x)


@pytest.mark.parametrize("inplace", [False, True])
def test_randomness_of_vmap(inplace):
    def one(f):
        return lambda row: f(row * 1, 0.5, True, inplace)

    x = torch.ones(5, 30)
    assert outcome(lambda: rows_of(one(dropout), "error", x)) == outcome(lambda: rows_of(one(F.dropout), "error", x))
    same = rows_of(one(dropout), "same", x)
    assert_bits(same, noise((30,)).expand(5, 30).contiguous())
    torch.manual_seed(0)
    keys = torch.randint(2**63 - 1, (5,)).tolist()
    different = rows_of(one(dropout), "different", x)
    assert_bits(different, torch.stack([noise((30,), key=key) for key in keys]))
    for randomness, unique in (("same", 1), ("different", 5)):
        for f in BOTH.values():
            assert len(rows_of(one(f), randomness, x).unique(dim=0)) == unique


def test_vmap_of_other_dims():
    x = normal(4, 5, 6)
    for dim in range(3):
        y = rows_of(lambda a: dropout(a, 0.5), "same", x, in_dims=dim, out_dims=dim)
        rest = [n for d, n in enumerate(x.shape) if d != dim]
        kept = mask(rest, 0.5, drawn(0)[0]).unsqueeze(dim).expand(x.shape)
        assert_bits(y, dropped(x, 0.5, kept))


def test_vmap_of_channels():
    x = normal(3, 2, 4, 5, 6)
    y = rows_of(lambda a: pyreg.torch.dropout2d(a, 0.5), "same", x)
    kept = mask(x.shape[1:], 0.5, drawn(0)[0], (2, 3)).expand(x.shape)
    assert_bits(y, dropped(x, 0.5, kept))
    y = rows_of(lambda a: pyreg.torch.dropout2d(a, 0.5), "different", x)
    kept = (y != 0).flatten(3)
    assert (kept.all(3) == kept.any(3)).all()
    assert len(kept[..., 0].flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_of_something_else(randomness):
    """The input has no batch, its key may have one."""
    x = torch.ones(30)
    unique = {}
    for name, f in BOTH.items():
        y = rows_of(lambda a, f=f: f(x, 0.5) + a, randomness, torch.zeros(5))
        assert y.shape == (5, 30)
        unique[name] = len(y.unique(dim=0))
    assert unique["pyreg"] == unique["torch"] == (5 if randomness == "different" else 1)


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_nested_vmap(outer, inner):
    x = torch.ones(3, 4, 40)
    unique = {}
    for name, f in BOTH.items():
        nested = torch.func.vmap(lambda row, f=f: f(row, 0.5), randomness=inner)
        y = rows_of(nested, outer, x)
        unique[name] = [len(y.flatten(0, 1).unique(dim=0)), len(y[0].unique(dim=0)), len(y[:, 0].unique(dim=0))]
        assert set(y.flatten().tolist()) == {0.0, 2.0}
    assert unique["pyreg"] == unique["torch"]


def test_transforms():
    func, x, t = torch.func, normal(20), normal(20, seed=1)
    n = noise((20,))
    torch.testing.assert_close(func.grad(lambda x: fixed(x).pow(2).sum())(x), 2 * x * n**2)
    y, tangent = func.jvp(fixed, (x,), (t,))
    assert_bits(tangent, dropped(t, 0.5, n != 0))
    assert_bits(y, fixed(x))
    assert_bits(func.vjp(fixed, x)[1](t)[0], tangent)
    assert torch.equal(func.jacrev(fixed)(x), n.diag())
    assert torch.equal(func.jacfwd(fixed, randomness="same")(x), n.diag())
    hessian = func.jacfwd(func.jacrev(lambda x: fixed(x).pow(3).sum()), randomness="same")(x)
    torch.testing.assert_close(hessian, (6 * x * n**3).diag())
    hessian = func.jacrev(func.jacrev(lambda x: fixed(x).pow(3).sum()))(x)
    torch.testing.assert_close(hessian, (6 * x * n**3).diag())
    per_row = func.vmap(func.grad(lambda row: fixed(row).pow(2).sum()), randomness="same")(torch.stack([x, t]))
    torch.testing.assert_close(per_row, 2 * torch.stack([x, t]) * n**2)


def test_functionalize():
    x = normal(20)
    for f in (fixed, fixed_in_place):
        assert_bits(torch.func.functionalize(f)(x), f(x))


def test_gradients_for_each_sample():
    torch.manual_seed(1)
    model = pyreg.torch.convert(nn.Sequential(nn.Linear(4, 30), nn.Dropout(0.5), nn.Linear(30, 1)))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = normal(6, 4)

    def loss(parameters, row):
        return torch.func.functional_call(model, parameters, (row,)).pow(2).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="same")
    got = seeded(each, parameters, x)
    for i, row in enumerate(x):
        model.zero_grad()
        seeded(model, row).pow(2).sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(got[name][i], p.grad)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")
    zero = seeded(each, parameters, x.new_ones(6, 4))["0.bias"] == 0
    assert len(zero.unique(dim=0)) == 6


# ---- Compilers -------------------------------------------------------------------------------------------------------


COMPILED = {
    "dropout": lambda x: dropout(x, 0.3),
    "a part of more": lambda x: (dropout(x.sin(), 0.3) * 2).cos() + dropout(x, 0.6),
    "channels": lambda x: pyreg.torch.dropout2d(x, 0.3),
    "in place": lambda x: dropout(x * 2, 0.3, True, True),
    "another view": lambda x: dropout(x.transpose(1, 2), 0.3),
    "evaluation": lambda x: dropout(x, 0.3, False) + 1,
    "rate 0": lambda x: dropout(x, 0.0) * 2,
}


def value_and_gradient(f, x, seed=0):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    torch.manual_seed(seed)
    y = f(x)
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad, torch.get_rng_state()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_code_has_the_bits_of_eager_code(name, dynamic, dynamo):
    f = COMPILED[name]
    compiled = dynamo(f, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in [(2, 3, 4, 5), (4, 3, 6, 5)]:
        for seed in range(2):
            x = normal(*shape)
            for got, want in zip(value_and_gradient(compiled, x, seed), value_and_gradient(f, x, seed), strict=True):
                assert_bits(got, want)
            with torch.no_grad():
                assert_bits(seeded(compiled, x, seed=seed), seeded(f, x, seed=seed))


@pytest.mark.filterwarnings("ignore")
def test_compiled_masks_are_those_of_the_drawn_keys(dynamo):
    compiled = dynamo(lambda x: (dropout(x, 0.5), dropout(x, 0.5)), backend="aot_eager", fullgraph=True)
    x = torch.ones(100)
    for y, key in zip(seeded(compiled, x), drawn(0, 2), strict=True):
        assert_bits(y, noise((100,), key=key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_compiled_dtypes(dtype, dynamo):
    x = normal(5, 6).to(dtype)
    compiled = dynamo(dropout, backend="aot_eager", fullgraph=True)
    for got, want in zip(value_and_gradient(compiled, x), value_and_gradient(dropout, x), strict=True):
        assert_bits(got, want)


def model_of_all():
    torch.manual_seed(3)
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.3),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64, 2),
    )
    return nn.Sequential(*layers)


@pytest.mark.filterwarnings("ignore")
def test_a_converted_model_is_compiled_whole(dynamo):
    eager, inside = pyreg.torch.convert(model_of_all()), pyreg.torch.convert(model_of_all())
    compiled = dynamo(inside, backend="aot_eager", fullgraph=True)
    x = normal(2, 3, 6, 6)
    for seed in range(2):
        results = [value_and_gradient(f, x, seed) for f in (compiled, eager)]
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
        assert torch.equal(results[0][2], results[1][2])
    for (name, got), want in zip(inside.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, msg=name)
    torch.testing.assert_close(compiled.eval()(x), eager.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_compiled_attention(dynamo):
    q, k, v = (normal(2, 2, 5, 8, seed=seed) for seed in range(3))

    def attend(q):
        return pyreg.torch.scaled_dot_product_attention(q, k, v, dropout_p=0.3, is_causal=True)

    compiled = dynamo(attend, backend="aot_eager", fullgraph=True)
    for got, want in zip(value_and_gradient(compiled, q), value_and_gradient(attend, q), strict=True):
        torch.testing.assert_close(got, want)


TRANSFORMED = {
    "grad": lambda f: torch.func.grad(lambda x: f(x, 0.5).sum()),
    "grad of a square": lambda f: torch.func.grad(lambda x: f(x, 0.5).pow(2).sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(lambda x: f(x, 0.5), (x,), (x + 1,))[1],
    "vjp": lambda f: lambda x: torch.func.vjp(lambda x: f(x, 0.5), x)[1](x)[0],
    "vmap, same": lambda f: torch.func.vmap(lambda row: f(row, 0.5), randomness="same"),
    "vmap, different": lambda f: torch.func.vmap(lambda row: f(row, 0.5), randomness="different"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMED)
def test_compiled_transforms(name, dynamo):
    """They have torch's own dropout."""
    x = normal(3, 20) + 5  # no zeros
    stock = seeded(dynamo(TRANSFORMED[name](F.dropout), backend="aot_eager", fullgraph=True), x)
    assert 0 < (stock == 0).sum() < 60
    torch._dynamo.reset()
    got = seeded(dynamo(TRANSFORMED[name](dropout), backend="aot_eager", fullgraph=True), x)
    torch.testing.assert_close(got, stock)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_inside_compiled_code(dynamo):
    def f(x):
        return torch.utils.checkpoint.checkpoint(lambda x: dropout(x.sin(), 0.5).sin(), x, use_reentrant=False)

    x = normal(50)
    compiled = dynamo(f, backend="aot_eager", fullgraph=True)
    for got, want in zip(value_and_gradient(compiled, x)[:2], value_and_gradient(f, x)[:2], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore")
def test_a_generator_in_compiled_code(dynamo):
    def f(x, generator):
        return dropout(x.sin(), 0.5, generator=generator) * 2

    x = normal(50)
    compiled = dynamo(f, backend="aot_eager")
    got, want = (g(x, torch.Generator().manual_seed(4)) for g in (compiled, f))
    assert_bits(got, want)


@pytest.mark.slow
def test_inductor_has_the_bits_of_eager_code(tmp_path):
    code = """
import torch, pyreg.torch
def f(x):
    return pyreg.torch.dropout(x * 2, 0.3) + 1
def run(f, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(0)
    y = f(x)
    y.pow(2).sum().backward()
    return y.detach(), x.grad
compiled = torch.compile(f, fullgraph=True, dynamic=True)
for shape in [(30, 40), (50, 8)]:
    x = torch.randn(shape)
    for got, want in zip(run(compiled, x), run(f, x)):
        assert torch.equal(got, want), (got - want).abs().max()
print("equal")
"""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    assert python(code, timeout=300, warnings="ignore", **cache).endswith("equal")


@pytest.mark.filterwarnings("ignore")
def test_an_exported_model():
    model, x = pyreg.torch.convert(model_of_all()), normal(2, 3, 6, 6)
    program = torch.export.export(copy.deepcopy(model), (x,))
    assert "pyreg.dropout" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    want = seeded(model, x)
    for p in (program, program.run_decompositions(), torch.export.load(file)):
        torch.testing.assert_close(seeded(p.module(), x), want)
    program = torch.export.export(model.eval(), (x,))
    assert "dropout" not in str([node.target for node in program.run_decompositions().graph.nodes])
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x):
        return dropout(x, 0.5), pyreg.torch.dropout2d(x, 0.3)

    graph = make_fx(f, tracing_mode=mode)(torch.ones(2, 3, 4, 5))
    assert "pyreg.dropout" in graph.code
    x = normal(2, 3, 4, 5)
    for got, want in zip(seeded(graph, x), seeded(f, x), strict=True):
        assert_bits(got, want)
    assert not same_bits(seeded(graph, x, seed=1)[0], seeded(graph, x, seed=2)[0])  # the key is not a constant


@pytest.mark.parametrize("name", ["grad", "jvp", "vmap, same"])
def test_make_fx_of_transforms(name):
    from torch.fx.experimental.proxy_tensor import make_fx

    f, x = TRANSFORMED[name](dropout), normal(3, 20) + 5
    graph = make_fx(f)(torch.ones(3, 20))
    for seed in range(2):
        torch.testing.assert_close(seeded(graph, x, seed=seed), seeded(f, x, seed=seed))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
        for f, stock in ((dropout, F.dropout), (pyreg.torch.dropout2d, F.dropout2d)):
            y, want = f(x, 0.5), stock(x, 0.5)
            assert type(y) is FakeTensor
            assert (y.shape, y.stride(), y.dtype, y.requires_grad) == (want.shape, want.stride(), want.dtype, True)
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert dx.shape == x.shape
        inside = x.detach().clone()
        assert dropout(inside, 0.5, inplace=True) is inside
    assert type(dropout(inside, 0.5)) is FakeTensor  # also outside of its mode


def test_a_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x = normal(50).requires_grad_()
    with Log():
        y = fixed(x)
        y.sum().backward()
    assert names.count("pyreg.dropout.default") == 2
    assert_bits(y, fixed(x))
    assert_bits(x.grad, noise((50,)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shared", [[], [2, 3]])
def test_the_operator_is_sound(shared):
    key = torch.tensor(12345)
    for x in (normal(2, 3, 4, 5), normal(2, 3, 4, 5).transpose(0, 3), normal(2, 3, 4, 5).requires_grad_()):
        torch.library.opcheck(torch.ops.pyreg.dropout.default, (x, key, 0.3, shared))
        want = dropped(x, 0.3, mask(x.shape, 0.3, 12345, tuple(shared)))
        assert_bits(torch.ops.pyreg.dropout(x, key, 0.3, shared), want)


# ---- torch.jit and torch.fx ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["trace", "script"])
def test_torchscript_has_the_dropout_of_torch(how, training):
    x, results = normal(2, 3, 6, 6), []
    for model in (model_of_all(), pyreg.torch.convert(model_of_all())):
        model.train(training)
        scripted = torch.jit.script(model) if how == "script" else torch.jit.trace(model, x, check_trace=False)
        file = io.BytesIO()
        torch.jit.save(scripted, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        results.append([seeded(f, x, seed=seed) for seed in range(3) for f in (scripted, loaded)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(results[0][0], results[0][2]) is not training


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [pyreg.torch.Dropout1d(0.5), pyreg.torch.Dropout2d(0.5), pyreg.torch.Dropout3d(0.5)])
def test_scripts_of_channels(layer):
    x = torch.ones(2, 3, *[2] * int(type(layer).__name__[-2]))
    stock = getattr(nn, type(layer).__name__)(0.5)
    assert_bits(seeded(torch.jit.script(layer), x), seeded(stock, x))


def test_symbolic_traces_keep_layers():
    model = pyreg.torch.convert(model_of_all())
    graph = torch.fx.symbolic_trace(model)
    modules = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert modules == [str(i) for i in range(len(model))]
    assert not [node for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    x = normal(2, 3, 6, 6)
    assert_bits(seeded(graph, x), seeded(model, x))
    graph.eval()
    model.eval()
    assert_bits(graph(x), model(x))
    reverted = torch.fx.symbolic_trace(pyreg.torch.revert(model_of_all()))
    assert [n.op for n in reverted.graph.nodes] == [n.op for n in graph.graph.nodes]


# ---- Checkpoints, autocast, pickles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant, preserve):
    """The gradient is that of the mask of the recomputation, which is the first mask if torch restores its state."""
    for f in BOTH.values():
        masks = []

        def part(x, f=f, masks=masks):
            y = f(x * 1, 0.5)
            masks.append(y.detach() != 0)
            return y.pow(2)

        x = normal(60).requires_grad_()
        torch.manual_seed(0)
        y = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant, preserve_rng_state=preserve)
        y.sum().backward()
        assert len(masks) == 2
        assert torch.equal(*masks) is preserve
        if f is dropout:
            for kept, key in zip(masks, drawn(0, 1) * 2 if preserve else drawn(0, 2), strict=True):
                assert torch.equal(kept, mask((60,), 0.5, key))
        assert torch.equal(y != 0, masks[0])
        torch.testing.assert_close(x.grad, 8 * x.detach() * masks[1])


def test_checkpoints_of_a_converted_model():
    x = normal(2, 3, 6, 6)
    results = []
    for reentrant in (None, False, True):
        model = pyreg.torch.convert(model_of_all())
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        if reentrant is None:
            y = model(leaf)
        else:
            y = torch.utils.checkpoint.checkpoint_sequential(model, 2, leaf, use_reentrant=reentrant)
        y.sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, want)


def test_autocast():
    linear, x = nn.Linear(5, 30), normal(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
        z = fixed(y)
        assert z.dtype is F.dropout(y, 0.5).dtype is torch.bfloat16
        assert fixed(x).dtype is F.dropout(x, 0.5).dtype is torch.float32
        z.float().sum().backward()
    assert_bits(z, dropped(y, 0.5, mask((4, 30), 0.5, drawn(0)[0])))
    kept = noise((4, 30))
    torch.testing.assert_close(linear.bias.grad, kept.sum(0), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = []
        for model in (model_of_all(), pyreg.torch.convert(model_of_all())):
            norm = model[:2](normal(2, 3, 6, 6))
            results.append(norm)
    assert results[0].dtype is results[1].dtype
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "save": lambda model: saved_and_loaded(model),
}


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_converted_models(how):
    x = normal(2, 3, 6, 6)
    model = pyreg.torch.convert(model_of_all())
    seeded(model, x)
    other = COPIES[how](model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert list(other.state_dict()) == list(model.state_dict())
    assert_bits(seeded(other, x), seeded(model, x))
    assert len(torch.fx.symbolic_trace(other).graph.nodes) == len(model) + 2
    pyreg.torch.revert(other)
    assert [type(m) for m in other.modules()] == [type(m) for m in model_of_all().modules()]
    assert b"pyreg" not in pickle.dumps(other)


@pytest.mark.parametrize("name", ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "BatchNorm1d", "BatchNorm2d"])
def test_copies_of_layers(name):
    layer = getattr(pyreg.torch, name)(0.3 if "Drop" in name else 4)
    for how in COPIES.values():
        other = how(layer)
        assert type(other) is type(layer)
        assert repr(other) == repr(layer)


# ---- Settings of torch -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", [deterministic, default_device, default_dtype, lambda: torch.device("meta")])
def test_settings_change_nothing(mode):
    x, cube = normal(60), normal(2, 3, 4, 5)
    q, norm = normal(2, 5, 8), pyreg.torch.BatchNorm2d(3)

    def run():
        leaf = x.clone().requires_grad_()
        y = fixed(leaf)
        y.sum().backward()
        attention = seeded(pyreg.torch.scaled_dot_product_attention, q, q, q, dropout_p=0.4, is_causal=True)
        return [y.detach(), leaf.grad, fixed_channels(cube), fixed_in_place(x), norm(cube).detach(), attention]

    wants = run()
    with mode():
        gots = run()
    for got, want in zip(gots, wants, strict=True):
        assert got.device.type == "cpu"
        assert_bits(got, want)


def test_states_of_the_generator():
    x = torch.ones(200)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    want = dropout(x, 0.5)
    assert_bits(want, noise((200,), key=drawn(4)[0]))
    other = dropout(x, 0.5)
    assert not same_bits(other, want)
    torch.set_rng_state(state)
    assert_bits(dropout(x, 0.5), want)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        assert_bits(dropout(x, 0.5), want)
        dropout(x, 0.5)
    assert_bits(dropout(x, 0.5), other)
    torch.default_generator.manual_seed(4)
    assert_bits(dropout(x, 0.5), want)
    torch.default_generator.manual_seed(4)
    assert_bits(dropout(x, 0.5, generator=torch.default_generator), want)


def test_many_python_threads():
    def work(i):
        generator = torch.Generator()
        x = normal(40, 50, seed=i).requires_grad_()
        for seed in range(20):
            y = dropout(x, 0.3, generator=generator.manual_seed(seed))
            kept = mask((40, 50), 0.3, drawn_of[seed])
            assert_bits(y, dropped(x, 0.3, kept))
            (dx,) = torch.autograd.grad(y.sum(), x)
            assert_bits(dx, noise((40, 50), 0.3, drawn_of[seed]))

    drawn_of = [drawn(seed)[0] for seed in range(20)]
    in_threads(work, 8)


def test_gradients_in_another_thread():
    x = normal(200).requires_grad_()
    y = fixed(x)
    in_threads(lambda i: y.sum().backward(retain_graph=True), 4)
    assert_bits(x.grad, noise((200,)) * 4)


def test_modes_of_another_thread_do_not_matter():
    """vmap and dual levels of one thread, plain calls in others."""

    def work(i):
        for _ in range(30):
            if i % 2:
                y = torch.func.vmap(lambda row: dropout(row, 0.5), randomness="different")(torch.ones(3, 20))
            else:
                y = dropout(torch.ones(3, 20), 0.5)
            assert set(y.flatten().tolist()) <= {0.0, 2.0}

    in_threads(work, 4)


def test_descriptions_of_results_are_strict():
    """What other tests compare by does see a difference."""
    assert describe(torch.zeros(2)) != describe(-torch.zeros(2))
    assert describe(torch.zeros(2)) != describe(torch.zeros(2, dtype=torch.float64))
    assert describe(torch.ones(2, 2)) != describe(torch.ones(2, 2).T)
