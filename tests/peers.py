"""Tests of other frameworks, with pyreg's layers in the place of their own; stock first, so that it shows what differs.

    python tests/peers.py [equinox haiku keras keras-torch nnx linen] [--from keras=DIR_OR_URL] [-v]

Tests are those of the version that is installed: Haiku's are in its package, the others are cloned into build/peers, at
the tag of the version or, where there is none, at the newest commit.  --from names another place of a repository.

This file is also the plugin of pytest that puts pyreg's layers in place.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
LAYERS = "keras/src/layers"


class Peer(NamedTuple):
    package: str
    repository: str  # empty: its package has the tests
    tests: tuple[str, ...]
    more: tuple[str, ...] = ()  # other files that these want
    backend: str = ""  # of Keras


KERAS = Peer(
    "keras",
    "https://github.com/keras-team/keras",
    (
        f"{LAYERS}/regularization/dropout_test.py",
        f"{LAYERS}/regularization/spatial_dropout_test.py",
        f"{LAYERS}/normalization/batch_normalization_test.py",
        f"{LAYERS}/attention/multi_head_attention_test.py",
        f"{LAYERS}/attention/grouped_query_attention_test.py",
    ),
    ("conftest.py",),
    "jax",
)
FLAX = Peer("flax", "https://github.com/google/flax", ())
PEERS = {
    "equinox": Peer(
        "equinox",
        "https://github.com/patrick-kidger/equinox",
        ("tests/test_nn.py", "tests/test_stateful.py", "tests/test_serialisation.py"),
        ("tests/__init__.py", "tests/conftest.py", "tests/helpers.py"),
    ),
    "haiku": Peer(
        "dm-haiku", "", ("haiku/_src/basic_test.py", "haiku/_src/batch_norm_test.py", "haiku/_src/nets/mlp_test.py")
    ),
    "keras": KERAS,
    "keras-torch": KERAS._replace(backend="torch"),
    "nnx": FLAX._replace(
        tests=tuple(f"tests/nnx/nn/{name}_test.py" for name in ("stochastic", "normalization", "attention"))
    ),
    "linen": FLAX._replace(tests=("tests/linen/linen_attention_test.py", "tests/linen/linen_test.py")),
}


# ---- The plugin ------------------------------------------------------------------------------------------------------


def pytest_configure(config):
    put = {
        "equinox": _put_equinox,
        "haiku": _put_haiku,
        "keras": _put_keras,
        "keras-torch": _put_keras,
        "nnx": _put_nnx,
        "linen": _put_linen,
    }
    if name := os.environ.get("PYREG_PEER"):
        put[name](config)


def _put_equinox(config):
    import equinox as eqx

    import pyreg.equinox

    eqx.nn._attention.Dropout = pyreg.equinox.Dropout
    eqx.nn.Dropout, eqx.nn.BatchNorm = pyreg.equinox.Dropout, pyreg.equinox.BatchNorm


def _put_haiku(config):
    from haiku._src import basic, batch_norm
    from haiku._src.nets import mlp

    import pyreg.haiku

    basic.dropout = mlp.hk.dropout = pyreg.haiku.dropout
    batch_norm.BatchNorm = pyreg.haiku.BatchNorm


def _put_keras(config):
    """Each layer is converted when it is first called: Keras takes a close look at __init__."""
    from keras import layers

    import pyreg.keras

    names = ("Dropout", "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "BatchNormalization")
    for kind in [getattr(layers, name) for name in names]:

        @functools.wraps(kind.__call__)
        def call(layer, *args, kind=kind, stock=kind.__call__, **options):
            if type(layer) is kind and "call" not in vars(layer):
                pyreg.keras.convert(layer)
            return stock(layer, *args, **options)

        kind.__call__ = call


def _put_nnx(config):
    """Of linen, too: these tests compare batch-norm of the two bit for bit."""
    from flax import nnx

    import pyreg.nnx

    stock = nnx.dot_product_attention
    nnx.Dropout, nnx.BatchNorm = pyreg.nnx.Dropout, pyreg.nnx.BatchNorm
    make = nnx.MultiHeadAttention.__init__

    @functools.wraps(make)
    def with_attention(layer, *args, **options):
        make(layer, *args, **options)
        if layer.attention_fn is stock:
            layer.attention_fn = pyreg.nnx.dot_product_attention

    nnx.MultiHeadAttention.__init__ = with_attention
    _put_linen(config)


def _put_linen(config):
    import pyreg.linen

    around = contextlib.ExitStack()
    around.enter_context(pyreg.linen.accelerate())
    config.add_cleanup(around.close)


# ---- The program -----------------------------------------------------------------------------------------------------


def files(name, place):
    """Where the tests of a peer are, and of which version."""
    peer = PEERS[name]
    version = importlib.metadata.version(peer.package)
    if not peer.repository:
        return Path(importlib.util.find_spec(name).origin).parents[1], version
    folder = ROOT / "build" / "peers" / peer.package
    if not folder.exists():
        git("clone", "--quiet", "--no-checkout", place or peer.repository, folder)
    tag = f"v{version}"
    if git("-C", folder, "tag", "--list", tag).strip() != tag:
        tag = "HEAD"
        version = f"newest, for {version}"
    git("-C", folder, "checkout", "--quiet", tag, "--", *peer.tests, *peer.more)
    return folder, version


def git(*arguments):
    done = subprocess.run(["git", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(map(str, arguments))}: {done.stderr}")
    return done.stdout


def outcomes(name, folder, ours, verbose):
    """What becomes of each test: passed, skipped or failed."""
    peer = PEERS[name]
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        options = ["-q", "-p", "peers", "-p", "no:cacheprovider", "-p", "no:warnings", f"--junitxml={report.name}"]
        environ = {**os.environ, "KERAS_BACKEND": peer.backend, "PYREG_PEER": name if ours else ""}
        environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-P", "-m", "pytest", *options, *peer.tests]
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
        if verbose or done.returncode not in (0, 1):
            print(done.stdout[-20000:], done.stderr[-5000:])
        found = {}
        for case in ElementTree.parse(report.name).iter("testcase"):
            kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
            result = "skipped" if kinds == {"skipped"} else "failed" if kinds else "passed"
            found[f"{case.get('classname')}.{case.get('name')}"] = result
        return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"any of {', '.join(PEERS)}; by default all")
    parser.add_argument("--from", dest="places", action="append", default=[], metavar="PACKAGE=PLACE")
    parser.add_argument("-v", "--verbose", action="store_true", help="show what pytest prints")
    args = parser.parse_args()
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"no peer {' '.join(sorted(unknown))}; wanted any of {', '.join(PEERS)}")
    places = dict(place.split("=", 1) for place in args.places)
    print("| peer | tests of | run | passed | failed | failed also with stock | skipped |")
    print("|---|---|---:|---:|---:|---:|---:|")
    different = []
    for name in args.peers or PEERS:
        folder, version = files(name, places.get(PEERS[name].package))
        theirs, ours = (outcomes(name, folder, which, args.verbose) for which in (False, True))
        failed = {test for test, result in ours.items() if result == "failed"}
        also = {test for test in failed if theirs.get(test) == "failed"}
        counts = [sum(result == kind for result in ours.values()) for kind in ("passed", "skipped")]
        row = [name, version, sum(counts[:1]) + len(failed), counts[0], len(failed), len(also), counts[1]]
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        different += [(name, test, theirs.get(test), ours[test]) for test in sorted(failed - also)]
        missing = set(theirs) - set(ours)
        different += [(name, test, theirs[test], "not run") for test in sorted(missing)]
    for name, test, before, now in different:
        print(f"{name}: {test}: {before} with stock, {now} with pyreg")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
