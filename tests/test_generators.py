"""The generators against the vectors of their inventors, and the naive ones that the other tests rely on."""

from pathlib import Path

import pytest
import reference

from pyreg import _core


def rows():
    for line in (Path(__file__).parent / "data" / "random123.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, *fields = line.split("|")
            yield (name.split()[0], *(tuple(int(word, 16) for word in field.split()) for field in fields))


@pytest.mark.parametrize(("name", "counter", "key", "output"), [*rows()])
def test_known_answers(isa, name, counter, key, output):
    generator = {"philox4x32": _core.PHILOX, "threefry2x32": _core.THREEFRY}[name]
    assert _core.random_block(generator, key, counter) == output


@pytest.mark.parametrize(("name", "counter", "key", "output"), [*rows()])
def test_known_answers_of_the_reference(name, counter, key, output):
    generator = {"philox4x32": reference.philox4x32_10, "threefry2x32": reference.threefry2x32_20}[name]
    assert tuple(int(word) for word in generator(counter, key)) == output
