import os

# What a test asks for is what it gets: no thread limits from outside.
for name in ("OMP_NUM_THREADS", "PYREG_ISA"):
    os.environ.pop(name, None)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest
from common import ISAS
from hypothesis import settings

import pyreg
from pyreg import _core

settings.register_profile("pyreg", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("pyreg")


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once on each instruction set of this machine."""
    _core.use_isa(request.param)
    yield request.param
    _core.use_isa(ISAS[0])


@pytest.fixture
def threads():
    """A function that sets the number of threads until the test ends."""
    yield pyreg.set_num_threads
    pyreg.set_num_threads(None)
