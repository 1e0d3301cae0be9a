"""Some cases of tests/fuzz_jax.py; `python tests/fuzz.py --jax --cases 2000` runs many."""

import fuzz
import pytest

fuzz_jax = pytest.importorskip("fuzz_jax")


@pytest.mark.parametrize("first", range(0, 30, 5))
def test_cases(first):
    for number in range(first, first + 5):
        said = []
        problem = fuzz.find(number, lambda n, said=said: fuzz_jax.run_case(n, lambda *words: said.append(words)))
        assert problem is None, (number, problem, said)


@pytest.mark.slow
def test_many_cases():
    found = fuzz.fuzz(0, 2000, 2, True, lambda *_: None)
    assert not found


def test_it_finds_a_fault(monkeypatch):
    dropout, batch_norm = fuzz_jax.pyreg.jax.dropout, fuzz_jax.pyreg.jax.batch_norm
    monkeypatch.setattr(fuzz_jax.pyreg.jax, "dropout", lambda x, rate, **options: dropout(x, rate + 0.04, **options))
    monkeypatch.setattr(fuzz_jax.pyreg.jax, "batch_norm", lambda x, *a, **o: batch_norm(x * 1.1, *a, **o))
    assert sum(fuzz.find(n, fuzz_jax.run_case) is not None for n in range(12)) >= 6
