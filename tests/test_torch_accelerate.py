"""pyreg.torch.accelerate: what it reaches, what it leaves alone, and that nothing of it stays."""

import threading

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch.nn.functional as F  # noqa: E402
from common import in_threads  # noqa: E402
from torch import nn  # noqa: E402
from torchcommon import DTYPES, assert_bits, describe, drawn, dropped, mask, outcome, same_bits  # noqa: E402

import pyreg.torch  # noqa: E402
from pyreg import _core  # noqa: E402
from pyreg.torch import accelerate  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(torch.library, "get_kernel"), reason="torch gives no kernels away")


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(f, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


@pytest.fixture
def calls(monkeypatch):
    """A list of the shapes that the kernel of dropout has been called for."""
    seen, kernel = [], _core.dropout_at

    def count(code, x, y, shape, *rest):
        seen.append(tuple(shape))
        return kernel(code, x, y, shape, *rest)

    monkeypatch.setattr(_core, "dropout_at", count)
    return seen


@pytest.fixture
def norms(monkeypatch):
    """A list of the batch-norm kernels that have been called."""
    seen = []
    for name in ("batch_norm", "batch_norm_backward"):
        kernel = getattr(_core, name)

        def count(*args, kernel=kernel, name=name, **kwargs):
            seen.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(_core, name, count)
    return seen


@pytest.fixture(autouse=True)
def nothing_stays():
    """torch has its own bits after each test."""
    x = torch.ones(50)
    yield
    assert_bits(seeded(F.dropout, x, 0.5), STOCK)


STOCK = seeded(F.dropout, torch.ones(50), 0.5)


# ---- What it reaches -------------------------------------------------------------------------------------------------


def recurrent(kind):
    torch.manual_seed(1)
    layer, x = kind(3, 4, num_layers=3, dropout=0.3), normal(5, 2, 3)
    return lambda: layer(x)[0]


def attention(need_weights):
    torch.manual_seed(1)
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True), normal(2, 5, 8)
    return lambda: layer(x, x, x, need_weights=need_weights)[0]


def encoder():
    torch.manual_seed(1)
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True), normal(2, 5, 8)
    return lambda: layer(x)


def decoder():
    torch.manual_seed(1)
    layer, x = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.3, batch_first=True), normal(2, 5, 8)
    return lambda: layer(x, x)


def layer(name, *shape):
    return lambda: (lambda m, x: lambda: m(x))(getattr(nn, name)(0.3), normal(*shape))


REACHED = {
    "F.dropout": (lambda: lambda: F.dropout(normal(4, 5), 0.3), 1),
    "torch.dropout": (lambda: lambda: torch.dropout(normal(4, 5), 0.3, True), 1),
    "F.dropout in place": (lambda: lambda: F.dropout(normal(4, 5), 0.3, inplace=True), 1),
    "F.dropout1d": (lambda: lambda: F.dropout1d(normal(4, 5, 3), 0.3), 1),
    "F.dropout2d": (lambda: lambda: F.dropout2d(normal(4, 5, 3, 3), 0.3), 1),
    "F.dropout3d": (lambda: lambda: F.dropout3d(normal(4, 5, 3, 3, 3), 0.3), 1),
    "F.dropout2d in place": (lambda: lambda: F.dropout2d(normal(4, 5, 3, 3), 0.3, inplace=True), 1),
    "Dropout": (layer("Dropout", 4, 5), 1),
    "Dropout1d": (layer("Dropout1d", 4, 5, 3), 1),
    "Dropout2d": (layer("Dropout2d", 4, 5, 3, 3), 1),
    "Dropout3d": (layer("Dropout3d", 4, 5, 3, 3, 3), 1),
    "attention": (lambda: lambda: F.scaled_dot_product_attention(*[normal(2, 5, 8)] * 3, dropout_p=0.3), 1),
    "MultiheadAttention": (lambda: attention(False), 1),
    "MultiheadAttention with weights": (lambda: attention(True), 1),
    "TransformerEncoderLayer": (encoder, 4),
    "TransformerDecoderLayer": (decoder, 6),
    "LSTM": (lambda: recurrent(nn.LSTM), 2),
    "GRU": (lambda: recurrent(nn.GRU), 2),
    "RNN": (lambda: recurrent(nn.RNN), 2),
}
NOT_REACHED = {
    "alpha": lambda: F.alpha_dropout(normal(4, 5), 0.3),
    "feature alpha": lambda: F.feature_alpha_dropout(normal(4, 5, 3), 0.3),
    "native": lambda: torch.native_dropout(normal(4, 5), 0.3, True)[0],
    "bernoulli": lambda: torch.empty(4, 5).bernoulli_(0.3),
    "channels of 2 dims": lambda: torch.feature_dropout(normal(4, 5), 0.3, True),
    "complex": lambda: F.dropout(normal(4, 5).to(torch.complex64), 0.3),
    "int": lambda: F.dropout(torch.ones(4, dtype=torch.int64), 0.3),
    "meta": lambda: F.dropout(torch.empty(4, 5, device="meta"), 0.3),
    "sparse": lambda: F.dropout(normal(4, 5).to_sparse(), 0.3),
    "rate below 0": lambda: F.dropout(normal(4), -0.1),
    "rate above 1": lambda: torch.dropout(normal(4), 1.1, True),
    "rate not a number": lambda: torch.dropout(normal(4), float("nan"), True),
    "rate 0": lambda: F.dropout(normal(4), 0.0),
    "rate 1": lambda: F.dropout(normal(4), 1.0),
    "empty": lambda: F.dropout(torch.empty(0, 3), 0.3),
    "evaluation": lambda: F.dropout(normal(4), 0.3, False),
    "array": lambda: F.dropout(normal(4).numpy(), 0.3),
    "none": lambda: F.dropout(None, 0.3),
    "leaf in place": lambda: F.dropout(normal(4).requires_grad_(), 0.3, True, True),
    "expanded in place": lambda: F.dropout(torch.ones(1).expand(4), 0.3, True, True),
    "channels of a leaf in place": lambda: F.dropout2d(normal(2, 3, 4, 4).requires_grad_(), 0.3, True, True),
}


@pytest.mark.parametrize("name", REACHED)
def test_what_is_reached(name, calls):
    make, count = REACHED[name]
    run = make()
    before = seeded(run)
    assert not calls
    with accelerate():
        inside = seeded(run)
        assert len(calls) == count
        assert same_bits(seeded(run), inside)
    assert inside.shape == before.shape
    assert inside.stride() == before.stride()
    assert not same_bits(inside, before)
    assert_bits(seeded(run), before)
    assert len(calls) == 2 * count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_REACHED)
def test_what_is_left_to_torch(name, calls):
    run = NOT_REACHED[name]
    want = outcome(run)
    with accelerate():
        got = outcome(run)
    if "in place" not in name:  # where the kernel may have run before torch refuses
        assert not calls
    assert got == want


def test_evaluation_returns_the_input_itself(calls):
    with accelerate():
        for f, shape in ((F.dropout, (4,)), (F.dropout1d, (2, 3, 4)), (F.dropout2d, (2, 3, 4, 4))):
            x = torch.ones(shape, requires_grad=True)
            assert f(x, 0.5, False) is x
        assert nn.Dropout(0.5).eval()(x) is x
        stock_empty = torch.empty(0)
        assert F.dropout(stock_empty, 0.5) is stock_empty
    assert not calls


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks_are_those_of_pyreg(dtype):
    x = normal(2, 3, 4, 5, dtype=dtype)
    for f, ours, dims in (
        (F.dropout, pyreg.torch.dropout, ()),
        (F.dropout2d, pyreg.torch.dropout2d, (2, 3)),
    ):
        for a in (x, x.transpose(2, 3), x.contiguous(memory_format=torch.channels_last), x[..., ::2]):
            want = seeded(ours, a, 0.3)
            with accelerate():
                got = seeded(f, a, 0.3)
                again = seeded(f, a.clone(), 0.3, True, True)
            assert_bits(got, want)
            assert_bits(again, want)
            assert got.stride() == want.stride()
            assert_bits(got, dropped(a, 0.3, mask(a.shape, 0.3, drawn(0)[0], dims)))


def test_gradients():
    x, dy = normal(40), normal(40, seed=1)
    kept = mask((40,), 0.3, drawn(0)[0])
    with accelerate():
        leaf = x.clone().requires_grad_()
        seeded(F.dropout, leaf, 0.3).backward(dy)
        assert_bits(leaf.grad, dropped(dy, 0.3, kept))
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        assert seeded(F.dropout, y, 0.3, inplace=True) is y
    y.backward(dy)  # also after the end
    assert_bits(leaf.grad, dropped(dy, 0.3, kept))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_derivatives():
    x = normal(2, 3, 2, 2, dtype=torch.float64).requires_grad_()
    with accelerate():
        for f in (lambda x: seeded(F.dropout, x, 0.5), lambda x: seeded(F.dropout2d, x, 0.5)):
            assert torch.autograd.gradcheck(f, x, check_batched_grad=True)
            assert torch.autograd.gradgradcheck(lambda x, f=f: f(x).sin(), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch itself calls it
def test_forward_mode():
    """By whichever mask: value and tangent have the same."""
    fwd, x = torch.autograd.forward_ad, normal(40) + 5
    with accelerate(), fwd.dual_level():
        for inplace in (False, True):
            dual = F.dropout(fwd.make_dual(x.clone(), x.clone()), 0.5, True, inplace)
            y, tangent = fwd.unpack_dual(dual)
            assert_bits(tangent, y)
            assert 0 < (y == 0).sum() < 40


def test_nothing_is_written_where_torch_refuses():
    x = torch.ones(50, requires_grad=True)
    with accelerate():
        for make in (lambda: x, lambda: x[:20], lambda: (x * 1).chunk(2)[0]):
            a = make()
            with pytest.raises(RuntimeError, match=r"in-?place"):
                F.dropout(a, 0.5, True, True)
            assert (a == 1).all()


def test_modes_of_torch():
    x = normal(50).requires_grad_()
    want = seeded(pyreg.torch.dropout, x, 0.5)
    with accelerate():
        for mode in (torch.no_grad(), torch.inference_mode(), torch.enable_grad(), torch.device("meta")):
            with mode:
                assert_bits(seeded(F.dropout, x, 0.5), want)
        with torch.inference_mode():
            inside = torch.ones(50)
            assert_bits(seeded(F.dropout, inside, 0.5), seeded(pyreg.torch.dropout, inside, 0.5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = seeded(F.dropout, x, 0.5)
            assert y.dtype is torch.float32
            assert_bits(y, want)
        for reentrant in (True, False):
            x.grad = None
            torch.manual_seed(0)
            y = torch.utils.checkpoint.checkpoint(lambda x: F.dropout(x, 0.5).pow(2), x, use_reentrant=reentrant)
            y.sum().backward()
            kept = mask((50,), 0.5, drawn(0)[0])
            torch.testing.assert_close(x.grad, 8 * x.detach() * kept)


def test_no_mask_is_saved():
    x, size = torch.ones(1000, requires_grad=True), []
    with accelerate(), torch.autograd.graph.saved_tensors_hooks(lambda t: size.append(t.nbytes) or t, lambda t: t):
        y = F.dropout(x, 0.5)
        y.sum().backward()
    assert sum(size) <= 8


# ---- Its beginning and end -------------------------------------------------------------------------------------------


def is_on(calls):
    before = len(calls)
    F.dropout(torch.ones(4), 0.5)
    return len(calls) > before


def test_handles(calls):
    handle = accelerate()
    assert isinstance(handle, pyreg.torch.Accelerated)
    assert is_on(calls)
    handle.undo()
    assert not is_on(calls)
    handle.undo()
    assert not is_on(calls)
    with accelerate() as handle:
        assert is_on(calls)
        handle.undo()
        assert not is_on(calls)
    assert not is_on(calls)
    with pytest.raises(ZeroDivisionError), accelerate():
        _ = 1 / 0
    assert not is_on(calls)


def test_handles_nest_and_overlap(calls):
    with accelerate():
        with accelerate():
            assert is_on(calls)
        assert is_on(calls)
    assert not is_on(calls)
    a, b = accelerate(), accelerate()
    a.undo()
    a.undo()
    assert is_on(calls)
    c = accelerate()
    b.undo()
    assert is_on(calls)
    c.undo()
    assert not is_on(calls)


def test_kinds_are_apart(calls, norms):
    x = normal(4, 5)

    def what():
        before = len(norms)
        F.batch_norm(x, None, None, training=True)
        return is_on(calls), len(norms) > before

    assert what() == (False, False)
    with accelerate():
        assert what() == (True, False)
        with accelerate(dropout=False, batch_norm=True):
            assert what() == (True, True)
        assert what() == (True, False)
    with accelerate(dropout=False, batch_norm=True):
        assert what() == (False, True)
    with accelerate(dropout=False, batch_norm=False):
        assert what() == (False, False)
    assert what() == (False, False)


@pytest.mark.parametrize("bad", [2, None, "yes", 0.5])
def test_flags_are_bools(bad, calls):
    for name in ("dropout", "batch_norm"):
        with pytest.raises(TypeError, match=name):
            accelerate(**{name: bad}).undo()
    assert not is_on(calls)


def test_torch_without_kernels_to_give(monkeypatch, calls):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.warns(RuntimeWarning, match="nothing is replaced"):
        handle = accelerate()
    assert not is_on(calls)
    handle.undo()


def test_undo_restores_the_bits_of_torch():
    x, model = normal(4, 5, 6, 6), nn.BatchNorm2d(5)

    def run():
        leaf = x.clone().requires_grad_()
        model.reset_running_stats()
        y = seeded(lambda: F.dropout2d(model(F.dropout(leaf, 0.3)), 0.2))
        y.sin().sum().backward()
        return [y.detach(), leaf.grad, model.running_mean.clone(), model.running_var.clone()]

    before = run()
    for _ in range(3):
        with accelerate(batch_norm=True):
            inside = run()
        assert describe(run()) == describe(before)
        assert not same_bits(inside[0], before[0])


def test_it_holds_in_other_threads(calls):
    with accelerate():
        in_threads(lambda i: F.dropout(torch.ones(4), 0.5), 4)
        assert len(calls) == 4
    in_threads(lambda i: F.dropout(torch.ones(4), 0.5), 4)
    assert len(calls) == 4


def test_threads_begin_and_end_it_at_once(calls):
    stop = threading.Event()

    def work(i):
        if i == 0:
            for _ in range(100):
                y = F.dropout(torch.ones(30), 0.5)
                assert set(y.tolist()) <= {0.0, 2.0}
            return
        for _ in range(10):
            with accelerate():
                assert is_on(calls)

    in_threads(work, 4)
    stop.set()
    assert not is_on(calls)


# ---- Batch-norm ------------------------------------------------------------------------------------------------------


BATCH_NORMS = {
    "rows": lambda: (nn.BatchNorm1d(5), normal(8, 5)),
    "images": lambda: (nn.BatchNorm2d(5), normal(4, 5, 3, 2)),
    "channels last": lambda: (nn.BatchNorm2d(5), normal(4, 5, 3, 2).contiguous(memory_format=torch.channels_last)),
    "volumes": lambda: (nn.BatchNorm3d(5), normal(2, 5, 2, 3, 2)),
    "no affine": lambda: (nn.BatchNorm2d(5, affine=False), normal(4, 5, 3, 2)),
    "no statistics": lambda: (nn.BatchNorm2d(5, track_running_stats=False), normal(4, 5, 3, 2)),
    "cumulative": lambda: (nn.BatchNorm2d(5, momentum=None), normal(4, 5, 3, 2)),
    "expanded": lambda: (nn.BatchNorm2d(5), normal(4, 5, 3, 1).expand(4, 5, 3, 2)),
    "double": lambda: (nn.BatchNorm2d(5).double(), normal(4, 5, 3, 2, dtype=torch.float64)),
    "bfloat16": lambda: (nn.BatchNorm2d(5).bfloat16(), normal(4, 5, 3, 2, dtype=torch.bfloat16)),
    "half input": lambda: (nn.BatchNorm2d(5), normal(4, 5, 3, 2, dtype=torch.float16)),
    "instance norm": lambda: (nn.InstanceNorm2d(5, affine=True, track_running_stats=True), normal(4, 5, 3, 2)),
}


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_is_that_of_torch(name, norms):
    def run(accelerated):
        torch.manual_seed(0)
        model, x = BATCH_NORMS[name]()
        with accelerate(dropout=False, batch_norm=True) if accelerated else torch.enable_grad():
            results = []
            for _ in range(2):
                x = x.detach().requires_grad_()
                model.zero_grad()
                y = model(x)
                y.backward(normal(*y.shape, dtype=y.dtype, seed=7))
                results += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
            return results, dict(model.state_dict()), model.eval()(x.detach())

    (want, state, at_end), (got, got_state, got_at_end) = run(False), run(True)
    assert norms[:4] == ["batch_norm", "batch_norm_backward"] * 2
    assert len(norms) == (5 if name == "no statistics" else 4)
    half = want[0].dtype in DTYPES[2:]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip([*got, *got_state.values(), got_at_end], [*want, *state.values(), at_end], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.stride() == b.stride()


def test_double_backward_of_batch_norm():
    x = normal(3, 2, 2, dtype=torch.float64).requires_grad_()
    weight, bias = (normal(2, dtype=torch.float64, seed=i).requires_grad_() for i in (1, 2))
    with accelerate(batch_norm=True):
        assert torch.autograd.gradcheck(
            lambda *a: F.batch_norm(a[0], None, None, *a[1:], training=True), (x, weight, bias)
        )
        assert torch.autograd.gradgradcheck(
            lambda *a: F.batch_norm(a[0], None, None, *a[1:], training=True), (x, weight, bias)
        )


def test_a_forward_pass_inside_and_a_backward_pass_outside():
    """And the other way round: what is saved between them means the same."""
    x, dy = normal(4, 5, 3, dtype=torch.float64), normal(4, 5, 3, dtype=torch.float64, seed=1)
    results = []
    for forward, backward in [(False, False), (True, False), (False, True), (True, True)]:
        leaf = x.clone().requires_grad_()
        with accelerate(dropout=False, batch_norm=forward):
            y = F.batch_norm(leaf, None, None, training=True)
        with accelerate(dropout=False, batch_norm=backward):
            y.backward(dy)
        results.append(leaf.grad)
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])


def test_a_small_variance():
    """Where epsilon is most of what is saved."""
    x = (normal(64, 5, dtype=torch.float64) * 1e-3 + 1).float()
    dy, results = normal(64, 5, seed=1), []
    for a, accelerated in ((x, True), (x, False), (x.double(), False)):
        leaf = a.clone().requires_grad_()
        with accelerate(dropout=False, batch_norm=accelerated):
            F.batch_norm(leaf, None, None, training=True, eps=1e-3).backward(dy.to(a.dtype))
        results.append(leaf.grad.double())
    got, stock, want = results
    assert (got - want).abs().max() <= max(2 * (stock - want).abs().max(), 1e-5)


def test_a_constant_channel():
    results = []
    for accelerated in (True, False):
        x = torch.full((6, 2), 3.0, requires_grad=True)
        with accelerate(dropout=False, batch_norm=accelerated):
            y = F.batch_norm(x, None, None, training=True)
            y.backward(normal(6, 2))
        results.append([y.detach(), x.grad])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


NORM_CALLS = {
    "wrong statistics": lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True),
    "wrong weight": lambda x: F.batch_norm(x, None, None, torch.ones(4), training=True),
    "mixed types": lambda x: F.batch_norm(x.double(), torch.zeros(5), torch.ones(5), training=True),
    "one element": lambda x: F.batch_norm(x[:1], None, None, training=True),
    "evaluation": lambda x: F.batch_norm(x, torch.zeros(5), torch.ones(5)),
    "evaluation without statistics": lambda x: F.batch_norm(x, None, None),
    "no elements": lambda x: F.batch_norm(x[:0], torch.zeros(5), torch.ones(5), training=True),
    "int": lambda x: F.batch_norm(x.long(), None, None, training=True),
    "complex": lambda x: F.batch_norm(x.to(torch.complex64), None, None, training=True),
    "meta": lambda x: F.batch_norm(x.to("meta"), None, None, training=True),
    "1 dim": lambda x: torch.native_batch_norm(x[0], None, None, None, None, True, 0.1, 1e-5),
    "one element per channel": lambda x: torch.native_batch_norm(x[:1], None, None, None, None, True, 0.1, 1e-5),
    "one statistic": lambda x: torch.native_batch_norm(x, None, None, torch.zeros(5), None, True, 0.1, 1e-5),
    "negative eps": lambda x: F.batch_norm(x, None, None, training=True, eps=-1.0),
    "layer norm": lambda x: F.layer_norm(x, (5,)),
    "group norm": lambda x: F.group_norm(x[..., None], 1),
}


@pytest.mark.parametrize("name", NORM_CALLS)
def test_batch_norm_that_is_left_to_torch(name, norms):
    want = outcome(lambda: NORM_CALLS[name](normal(4, 5)))
    with accelerate(batch_norm=True):
        got = outcome(lambda: NORM_CALLS[name](normal(4, 5)))
    assert not norms
    assert str(got) == str(want)  # of NaNs, too


# ---- torch.func, compilers -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch itself calls it
def test_transforms_have_the_bits_of_torch(calls):
    x = normal(5, 6)

    def run():
        func = torch.func
        return [
            seeded(func.vmap(lambda row: F.dropout(row, 0.5), randomness="different"), x),
            seeded(func.vmap(lambda row: F.dropout(row, 0.5), randomness="same"), x),
            seeded(func.grad(lambda x: F.dropout(x, 0.5).pow(2).sum()), x),
            seeded(func.jvp, lambda x: F.dropout(x, 0.5), (x,), (x,))[1],
            seeded(func.jacrev(lambda x: F.dropout(x, 0.5)), x[0]),
            seeded(func.vmap(lambda a: F.dropout2d(a, 0.5), randomness="different"), normal(3, 2, 4, 2, 2)),
        ]

    want = run()
    with accelerate():
        got = run()
        assert outcome(lambda: torch.func.vmap(lambda row: F.dropout(row, 0.5))(x))[0] is RuntimeError
    assert not calls
    assert describe(got) == describe(want)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch itself calls it
def test_transforms_of_batch_norm():
    x, func = normal(5, 6, dtype=torch.float64), torch.func

    def run():
        grad = func.grad(lambda x: F.batch_norm(x, None, None, training=True).pow(3).sum())
        batch = torch.stack([x, x * 2, x + 1])
        inner = func.vmap(lambda x: F.batch_norm(x, None, None, training=True))(batch)
        return [grad(x), inner, func.vmap(grad)(batch), func.hessian(lambda a: grad(a)[0].sum())(x)]

    want = run()
    with accelerate(batch_norm=True):
        got = run()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_batch_norm", [False, True])
def test_compiled_code_is_that_of_torch(with_batch_norm, calls):
    def f(x):
        y = F.dropout2d(F.dropout(x.sin(), 0.3), 0.3)
        return F.batch_norm(y, None, None, training=True) * 2 if with_batch_norm else y * 2

    def run(fresh):
        if fresh:
            torch._dynamo.reset()
        compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
        leaf = normal(2, 3, 4, 4).requires_grad_()
        y = seeded(compiled, leaf)
        y.pow(2).sum().backward()
        return [y.detach(), leaf.grad]

    def assert_alike(got, want):
        for a, b in zip(got, want, strict=True):
            # This backend calls torch's operator for batch-norm, as eager code does.
            torch.testing.assert_close(a, b) if with_batch_norm else assert_bits(a, b)

    want = run(True)
    with accelerate(batch_norm=True):
        assert_alike(run(True), want)  # compiled inside
        assert_alike(run(False), want)
    assert_alike(run(False), want)  # compiled inside, run outside
    want = run(True)
    with accelerate(batch_norm=True):
        assert_alike(run(False), want)  # compiled outside, run inside
    torch._dynamo.reset()
    assert not calls


@pytest.mark.filterwarnings("ignore")
def test_graph_breaks_stay_right(calls):
    def f(x):
        y = F.dropout(x, 0.3)
        torch._dynamo.graph_break()
        return F.dropout(y, 0.3)

    torch._dynamo.reset()
    want = seeded(torch.compile(f, backend="aot_eager"), torch.ones(50))
    torch._dynamo.reset()
    with accelerate():
        got = seeded(torch.compile(f, backend="aot_eager"), torch.ones(50))
    torch._dynamo.reset()
    assert_bits(got, want)
    assert not calls


@pytest.mark.filterwarnings("ignore")
def test_exported_and_traced_code_is_that_of_torch(calls):
    from torch.fx.experimental.proxy_tensor import make_fx

    model, x = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5)), normal(4, 5)

    def programs():
        exported = torch.export.export(model, (x,)).module()
        return [exported, make_fx(lambda x: F.dropout(x, 0.5))(x)]

    def traced():
        return torch.jit.trace(model, x, check_trace=False)

    want = [seeded(p, x) for p in (*programs(), traced())]
    with accelerate():
        inside = programs()
        assert not calls
        inside.append(traced())  # calls the operator, and keeps it
    calls.clear()
    for p, result in zip(inside, want, strict=True):
        assert "pyreg" not in str(getattr(p, "code", ""))
        assert_bits(seeded(p, x), result)
    assert not calls


def test_dispatch_modes_see_the_operators_of_torch(calls):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    for make in (lambda: accelerate(dropout=False), accelerate):
        names = []
        with make(), Log():
            seeded(F.dropout, torch.ones(5), 0.5)
        seen.append(names)
    assert seen[0] == seen[1]
    assert not calls


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with accelerate(batch_norm=True), FakeTensorMode():
        x = torch.ones(4, 5, requires_grad=True)
        assert type(F.dropout(x, 0.5)) is FakeTensor
        assert type(F.batch_norm(x, None, None, training=True)) is FakeTensor


def test_converted_models_inside(calls, norms):
    """Each layer is computed once, by the same masks."""
    model = pyreg.torch.convert(nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.5)))
    x = normal(4, 5)
    want = seeded(model, x)
    with accelerate(batch_norm=True):
        assert_bits(seeded(model, x), want)
    assert len(calls) == len(norms) == 2


@pytest.mark.parametrize("name", ["dropout", "feature_dropout"])
def test_a_rate_is_checked_in_evaluation(name):
    call, x = getattr(torch, name), torch.ones(3, 4, 5)
    with accelerate():
        assert call(x, 0.5, False) is x or torch.equal(call(x, 0.5, False), x)
        for p in (2.0, -1.0, float("nan")):
            with pytest.raises(RuntimeError, match="between 0 and 1"):
                call(x, p, False)
