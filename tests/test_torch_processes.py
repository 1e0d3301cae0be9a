"""pyreg.torch in processes: imports, threads, forks, workers, gradients that several processes share."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import mmap  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

from common import python  # noqa: E402
from torchcommon import assert_bits, drawn, dropped, mask  # noqa: E402

import pyreg.torch  # noqa: E402
from pyreg import _core  # noqa: E402
from pyreg.torch._threads import openmp_libraries  # noqa: E402

LARGE = 4_000_000  # enough for several threads


# ---- Imports ---------------------------------------------------------------------------------------------------------


def test_pyreg_does_not_import_torch():
    code = "import sys, pyreg, pyreg._core; assert hasattr(pyreg, 'dropout'); print('torch' in sys.modules)"
    assert python(code) == "False"


def test_importing_changes_nothing_of_torch():
    code = """
import sys, torch
torch.set_num_threads(3)
torch.manual_seed(1)
state, dtype, grad = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
functions = dict(vars(torch.nn.functional)), dict(vars(torch.nn))
import pyreg.torch
assert torch.get_num_threads() == 3
assert torch.equal(torch.get_rng_state(), state)
assert torch.get_default_dtype() is dtype and torch.is_grad_enabled() is grad
assert not torch.is_inference_mode_enabled()
for before, now in zip(functions, (torch.nn.functional, torch.nn)):
    assert all(vars(now)[name] is value for name, value in before.items())
assert not [name for name in ("torch._dynamo", "torch._inductor", "transformers") if name in sys.modules]
print("same")
"""
    assert python(code, warnings="ignore") == "same"


@pytest.mark.parametrize("order", ["torch, pyreg.torch", "pyreg.torch, torch", "pyreg, torch, pyreg.torch"])
def test_the_order_of_imports_does_not_matter(order):
    code = f"""
import {order}
print(torch.initial_seed() == torch.default_generator.initial_seed(), torch.get_num_threads(), pyreg.get_num_threads())
torch.manual_seed(7)
print(torch.rand(3).tolist())
torch.manual_seed(0)
print(pyreg.torch.dropout(torch.ones(100), 0.5).tolist())
"""
    first, numbers, dropout = python(code, warnings="ignore").splitlines()
    assert first == f"True {torch.get_num_threads()} {pyreg.get_num_threads()}"
    assert numbers == str(torch.rand(3, generator=torch.Generator().manual_seed(7)).tolist())
    assert dropout == str(dropped(torch.ones(100), 0.5, mask((100,), 0.5, drawn(0)[0])).tolist())


# ---- Threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["torch, pyreg.torch", "pyreg.torch, torch"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_number_of_threads_is_that_of_torch(order, count):
    """Counted by the tasks of the process: one that computes alone starts none."""
    code = f"""
import {order}, os
torch.set_num_threads({count})
def tasks(): return len(os.listdir("/proc/self/task"))
x = torch.empty({LARGE}).requires_grad_()
before = tasks()
pyreg.torch.dropout(x, 0.5)
print(tasks() - before)
pyreg.torch.batch_norm(x.detach().view(-1, 40), None, None, training=True)
print(tasks() - before)
"""
    started = [int(n) for n in python(code, warnings="ignore").split()]
    assert max(started) <= count - 1


@pytest.fixture
def limits(monkeypatch):
    """What the kernel is allowed in the way of threads, by calls."""
    seen, kernel = [], _core.dropout_at

    def count(*args):
        seen.append(args[-2])
        return kernel(*args)

    monkeypatch.setattr(_core, "dropout_at", count)
    return seen


def test_calls_allow_the_threads_of_torch(limits):
    before = torch.get_num_threads()
    x = torch.ones(200_000)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            pyreg.torch.dropout(x, 0.5)
            pyreg.torch.dropout(x.clone(), 0.5, inplace=True)
            pyreg.torch.dropout2d(x.view(2, 10, 100, 100), 0.5)
            leaf = x.clone().requires_grad_()
            pyreg.torch.dropout(leaf, 0.5).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert limits == [1] * 5 + [2] * 5 + [5] * 5


def test_the_number_of_pyreg_holds_too(threads):
    """Neither side changes the other's number."""
    before = torch.get_num_threads()
    threads(1)
    x = torch.ones(LARGE // 4)
    torch.manual_seed(0)
    y = pyreg.torch.dropout(x, 0.5)
    pyreg.torch.batch_norm(x.view(-1, 10), None, None, training=True)
    assert torch.get_num_threads() == before
    assert pyreg.get_num_threads() == 1
    assert_bits(y, dropped(x, 0.5, mask(x.shape, 0.5, drawn(0)[0])))


# ---- Forks and workers -----------------------------------------------------------------------------------------------


def test_a_fork_after_use():
    """torch's own parallel loops would not return in the child: it is given small tensors, and pyreg large ones."""
    code = f"""
import os, signal, torch, pyreg.torch
x = torch.ones({LARGE})
torch.manual_seed(0)
pyreg.torch.dropout(x, 0.5)
state = torch.get_rng_state()
sums = []
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(60)
    y = pyreg.torch.dropout(x, 0.5)
    os.write(writer, bytes([*y.numpy()[:100].astype("uint8")]))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
inside = list(os.read(reader, 100))
assert inside == pyreg.torch.dropout(x, 0.5)[:100].int().tolist()
print("same")
"""
    assert python(code, warnings="ignore", timeout=120) == "same"


WORKERS = """
import sys, torch, pyreg.torch

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        x = torch.ones(300)
        return pyreg.torch.dropout(x, 0.5), pyreg.torch.dropout2d(x.view(3, 4, 5, 5), 0.5)

def batches(how):
    torch.manual_seed(3)
    torch.set_num_threads(1)
    loader = torch.utils.data.DataLoader(
        Data(), batch_size=2, num_workers=2, multiprocessing_context=how, generator=torch.Generator().manual_seed(5)
    )
    return [[t.clone() for t in batch] for batch in loader]

if __name__ == "__main__":
    pyreg.torch.dropout(torch.ones(1_000_000), 0.5)
    first, again = batches(sys.argv[1]), batches(sys.argv[1])
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a, b))
    rows = torch.cat([b[0] for b in first])
    assert set(rows.flatten().tolist()) == {0.0, 2.0}
    assert len(rows.unique(dim=0)) == 8
    print("same")
"""


def program(tmp_path, code, *args, timeout=120):
    """Runs a file: processes that are spawned import it."""
    file = tmp_path / "program.py"
    file.write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", file, *args], capture_output=True, text=True, timeout=timeout, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_a_data_loader(how, tmp_path):
    assert program(tmp_path, WORKERS, how) == "same"


DDP = """
import os, sys, torch, pyreg.torch
import torch.distributed as dist
from torch import nn

def work(rank, address, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 2))
    model = nn.parallel.DistributedDataParallel(pyreg.torch.convert(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + rank)
    masks = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).pow(2).sum().backward()
        optimizer.step()
    masks.append(pyreg.torch.dropout(torch.ones(40), 0.5))
    torch.save([[p.detach() for p in model.parameters()], masks], f"{results}{rank}")
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    folder = os.getcwd()
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/alone", rank=0, world_size=1)
        dist.destroy_process_group()
    except RuntimeError as error:
        print("no gloo:", error)
        sys.exit()
    torch.multiprocessing.spawn(work, (f"file://{folder}/both", f"{folder}/result"), nprocs=2)
    (a, mask_a), (b, mask_b) = (torch.load(f"{folder}/result{rank}") for rank in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert all(p.isfinite().all() for p in a)
    assert not torch.equal(mask_a[0], mask_b[0])
    print("same")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no torch.distributed")
def test_gradients_of_several_processes(tmp_path):
    printed = program(tmp_path, DDP)
    if printed.startswith("no gloo"):
        pytest.skip(printed)
    assert printed == "same"


def test_a_saved_model_of_another_process(tmp_path):
    """state_dict is torch's: it is loaded where pyreg is not; a whole model after revert, too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
    pyreg.torch.convert(model)(torch.ones(5, 3))
    torch.save(model.state_dict(), tmp_path / "state")
    torch.save(pyreg.torch.revert(model), tmp_path / "model")
    code = f"""
import sys, torch
sys.modules["pyreg"] = None
state = torch.load({os.fspath(tmp_path / "state")!r})
model = torch.load({os.fspath(tmp_path / "model")!r}, weights_only=False)
model.load_state_dict(state)
assert int(model[1].num_batches_tracked) == 1
print(type(model[2]).__module__)
"""
    assert python(code, warnings="ignore") == "torch.nn.modules.dropout"


@pytest.mark.slow  # it compiles by inductor
def test_accelerate_does_not_outlive_its_process(tmp_path):
    """A cache of compiled code that was filled inside accelerate is as good as torch's own."""
    code = """
import sys, torch, contextlib
import torch.nn.functional as F
if sys.argv[1] == "inside":
    import pyreg.torch
    pyreg.torch.accelerate(batch_norm=True)
def f(x):
    return F.dropout(x.sin(), 0.3) * 2
x = torch.arange(40.0)
torch.manual_seed(0)
print(torch.compile(f, fullgraph=True)(x).tolist())
"""
    file = tmp_path / "program.py"
    file.write_text(code)
    cache = {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": os.fspath(tmp_path / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    printed = []
    for how in ("inside", "outside"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", file, how],
            capture_output=True,
            text=True,
            timeout=240,
            env=cache,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    assert printed[0] == printed[1]


def test_a_handler_that_draws_leaves_the_key_of_the_interrupted_call():
    code = """
import signal, torch, pyreg.torch
other, x = torch.Generator(), torch.ones(64)
signal.signal(signal.SIGALRM, lambda *_: pyreg.torch.dropout(x, 0.5, generator=other))
want = pyreg.torch.dropout(x, 0.5, generator=torch.Generator().manual_seed(0))
signal.setitimer(signal.ITIMER_REAL, 1e-3, 1e-4)
wrong = sum(
    not torch.equal(pyreg.torch.dropout(x, 0.5, generator=torch.Generator().manual_seed(0)), want) for _ in range(20000)
)
signal.setitimer(signal.ITIMER_REAL, 0)
print(wrong)
"""
    assert python(code, warnings="ignore", timeout=120) == "0"


def test_a_handler_that_forks_amid_a_call():
    code = """
import os, signal, torch, pyreg.torch
x, children, parent = torch.ones(1 << 24), [], os.getpid()
def fork(*_):
    if os.getpid() == parent and len(children) < 4:
        children.append(os.fork())
        if not children[-1]:
            signal.alarm(30)
signal.signal(signal.SIGVTALRM, fork)
for _ in range(60):
    signal.setitimer(signal.ITIMER_VIRTUAL, 3e-3)
    pyreg.torch.dropout(x, 0.5, inplace=True)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if os.getpid() != parent:
        os._exit(0)
assert children
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
print("ended")
"""
    assert python(code, warnings="ignore", timeout=120) == "ended"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux counts threads there")
def test_torch_threads_help():
    code = """
import os
import torch, pyreg.torch

torch.set_num_threads(3)
x = torch.ones(1000, 5000)
(x + x).sum()
before = len(os.listdir("/proc/self/task"))
for _ in range(5):
    pyreg.torch.Dropout(0.5)(x)
    pyreg.torch.BatchNorm1d(5000)(x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    assert int(python(code)) <= 0  # torch itself may end some


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc/self/maps")
def test_a_mapped_file_may_have_a_name_that_is_not_utf8(tmp_path):
    file = os.fsencode(tmp_path) + b"/\xff"
    with open(file, "wb") as f:
        f.write(b"x")
    with open(file, "rb") as f, mmap.mmap(f.fileno(), 1, prot=mmap.PROT_READ):
        assert all(os.path.isabs(library) for library in openmp_libraries())
