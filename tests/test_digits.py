"""The network of examples/digits.py, trained with pyreg.BatchNorm and, by PyTorch, with torch.nn.BatchNorm1d."""

import numpy as np
import pytest
from common import example
from threadpoolctl import threadpool_limits

import pyreg

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")
SEEDS, EPOCHS = range(2), 12


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:  # it sets variables for NumPy, which is loaded already
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        patch.delenv("OPENBLAS_CORETYPE", raising=False)
        return example("digits")


@pytest.fixture(autouse=True)
def one_thread():
    """The fastest for matrices this small, by far where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(threads)


def to_torch(digits, network):
    """The same network, with the same weights, as PyTorch's."""
    layers = []
    for layer in network.layers:
        if isinstance(layer, digits.Linear):
            theirs = torch.nn.Linear(*layer.weight.shape)
            theirs.load_state_dict({"weight": torch.tensor(layer.weight.T), "bias": torch.tensor(layer.bias)})
        elif isinstance(layer, pyreg.BatchNorm):
            theirs = torch.nn.BatchNorm1d(layer.num_features, layer.epsilon, 1 - layer.momentum)
        else:
            theirs = torch.nn.ReLU()
        layers.append(theirs)
    return torch.nn.Sequential(*layers)


def train_torch(digits, network, seed):
    """digits.train, by PyTorch; accuracy on the test labels after each epoch."""
    x, y, x_test, y_test = (torch.tensor(a) for a in digits.load_data(seed))
    optimiser = torch.optim.Adam(network.parameters(), digits.LEARNING_RATE)
    rng = np.random.default_rng(seed)
    curve = []
    for _ in range(EPOCHS):
        network.train()
        for batch in rng.permutation(len(x)).reshape(-1, digits.BATCH):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
        network.eval()
        with torch.no_grad():
            curve.append(float((network(x_test).argmax(1) == y_test).double().mean()))
    return curve


def test_as_accurate_as_pytorch(digits):
    """Rounding makes the two runs drift apart, by less than the accuracy moves from one epoch to the next."""
    ours, theirs = [], []
    for seed in SEEDS:
        network = digits.make_network(rate=0, batch_norm=True, seed=seed)
        theirs.append(train_torch(digits, to_torch(digits, network), seed))  # copies the weights
        ours.append([test for _, test in digits.train(network, seed, EPOCHS)])
    ours, theirs = np.array(ours), np.array(theirs)
    assert ours.max(axis=1).min() > 0.85  # it learned
    assert (ours[:, 0] > theirs[:, 0] - 0.01).all()  # after 20 steps, hardly any drift
    noise = np.diff(theirs, axis=1).std()
    for last in (EPOCHS, 5):
        assert ours[:, -last:].mean() > theirs[:, -last:].mean() - noise / 2


def test_running_statistics_equal_pytorchs(digits, monkeypatch):
    """In training, both layers see the same activations."""

    class Watched(pyreg.BatchNorm):
        def __init__(self, width, momentum):
            super().__init__(width, momentum=momentum)
            self.theirs = torch.nn.BatchNorm1d(width, momentum=1 - momentum)

        def __call__(self, x):
            if self.training:
                self.theirs(torch.tensor(x))
            return super().__call__(x)

    monkeypatch.setattr(pyreg, "BatchNorm", Watched)
    network = digits.make_network(rate=0, batch_norm=True, seed=0)
    digits.train(network, 0, epochs=3)
    watched = [layer for layer in network.layers if isinstance(layer, Watched)]
    assert len(watched) == 2
    n = digits.BATCH
    for layer in watched:
        steps = int(layer.theirs.num_batches_tracked)
        mean, var = layer.theirs.running_mean.numpy(), layer.theirs.running_var.numpy()
        rest = layer.momentum**steps  # what is left of the first value, 1
        biased = rest + (var - rest) * (n - 1) / n  # each batch's variance is unbiased in PyTorch
        np.testing.assert_allclose(layer.mean, mean, rtol=1e-5, atol=1e-5 * np.abs(mean).max())
        np.testing.assert_allclose(layer.var, biased, rtol=1e-5)
