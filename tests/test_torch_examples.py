"""Examples in docstrings of pyreg.torch, and the program of examples/ that uses PyTorch, on small sizes."""

import argparse
import doctest

import pytest
from common import example
from torchcommon import torch as torch

import pyreg.torch


def test_examples_in_docstrings():
    result = doctest.testmod(pyreg.torch)
    assert result.failed == 0
    assert result.attempted > 10


def test_public_names_have_docs():
    for name, thing in vars(pyreg.torch).items():
        if not name.startswith("_") and callable(thing):
            assert thing.__doc__, name


def test_a_transformer_learns_as_well_with_pyreg():
    pytest.importorskip("sklearn")
    guide = example("torch_transformer")
    args = argparse.Namespace(steps=60, batch=64, width=64, depth=1, p=0.1)
    x, digits = guide.load()
    model, losses = guide.train(x, digits, args, "torch")
    with pyreg.torch.accelerate():
        ours, our_losses = guide.train(x, digits, args, "pyreg")
        saved = guide.saved_bytes(ours, x[:64])
    assert losses[0] != our_losses[0]  # another mask
    assert abs(sum(losses[-10:]) - sum(our_losses[-10:])) / 10 < 0.35
    assert sum(our_losses[-10:]) / 10 < 1.9 < our_losses[0]
    assert saved < 0.9 * guide.saved_bytes(model, x[:64])
