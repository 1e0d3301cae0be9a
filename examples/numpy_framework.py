"""pyreg's NumPy layers inside another NumPy framework: Thinc, the one below spaCy.

    python examples/numpy_framework.py [--seeds 2] [--epochs 30] [--rate 0.5]

A layer of Thinc is a function of (model, x, is_train) that returns y and a callback, which turns the gradient of y into
that of x.  `with_pyreg` makes one of a layer of pyreg; `chain` puts it between Thinc's own, and Thinc's optimiser
trains its parameters.  The task is that of digits.py: 40 % of the training labels are wrong.  Dropout keeps the network
from learning these by heart; batch-norm makes it learn faster, these too.
"""

import argparse
import time
from collections.abc import Callable

from digits import BATCH, LEARNING_RATE, WIDTH, load_data  # first, because it sets the number of BLAS's threads

# isort: split
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table
from thinc.api import Adam, CategoricalCrossentropy, Dropout, Model, Relu, Softmax, chain, fix_random_seed

import pyreg

console = Console(highlight=False)


def with_pyreg(layer: pyreg.Dropout | pyreg.BatchNorm) -> Model:
    """A layer of pyreg as one of Thinc.  Thinc holds the parameters: the scale and bias of a BatchNorm."""
    parameters = {name: getattr(layer, name) for name in ("scale", "bias") if hasattr(layer, name)}

    def forward(model: Model, x: np.ndarray, is_train: bool) -> tuple[np.ndarray, Callable]:
        for name in parameters:
            setattr(layer, name, model.get_param(name))
        y = layer.train(is_train)(x)

        def backward(dy: np.ndarray) -> np.ndarray:
            dx = layer.backward(dy)
            for name in parameters:
                model.inc_grad(name, layer.grads[name])
            return dx

        return y, backward

    return Model(f"pyreg.{type(layer).__name__}", forward, params=parameters)


def make_network(*regularisers: Callable[[int], Model]) -> Model:
    """64 pixels, two hidden layers, each with the regularisers behind it, and 10 classes."""
    layers = []
    for i, inputs in enumerate((64, WIDTH)):
        layers += [Relu(WIDTH, inputs), *(make(i) for make in regularisers)]
    return chain(*layers, Softmax(10, WIDTH))


def train(network: Model, seed: int, epochs: int) -> list[float]:
    """Accuracy on the test labels, which are right, after each epoch."""
    x, y, x_test, y_test = load_data(seed)
    rng, optimiser, loss = np.random.default_rng(seed), Adam(LEARNING_RATE), CategoricalCrossentropy()
    network.initialize()
    curve = []
    for _ in range(epochs):
        for batch in rng.permutation(len(x)).reshape(-1, BATCH):
            guess, backward = network.begin_update(x[batch])  # is_train is true
            backward(loss.get_grad(guess, y[batch]))
            network.finish_update(optimiser)
        curve.append(float((network.predict(x_test).argmax(axis=1) == y_test).mean()))  # is_train is false
    return curve


def regularisations(rate: float, seed: int) -> dict[str, list[Callable[[int], Model]]]:
    """By name: what makes the layers behind hidden layer i."""

    def dropout(i: int) -> Model:
        return with_pyreg(pyreg.Dropout(rate, rng=np.random.default_rng([seed, i])))

    def batch_norm(i: int) -> Model:
        return with_pyreg(pyreg.BatchNorm(WIDTH, momentum=0.9))

    return {
        "none": [],
        "Thinc's Dropout": [lambda i: Dropout(rate)],
        "pyreg.Dropout": [dropout],
        "pyreg.BatchNorm": [batch_norm],
        "both of pyreg": [batch_norm, dropout],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--rate", type=float, default=0.5, help="probability of dropping")
    args = parser.parse_args()

    table = Table(title=f"Test accuracy, mean of {args.seeds} seeds")
    for header in ("", "epoch 1", f"epoch {args.epochs}", "seconds"):
        table.add_column(header, justify="right" if header else "left")
    for name in track(regularisations(args.rate, 0), "training", console=console, transient=True):
        start, curves = time.perf_counter(), []
        for seed in range(args.seeds):
            fix_random_seed(seed)  # Thinc's first weights
            network = make_network(*regularisations(args.rate, seed)[name])
            curves.append(train(network, seed, args.epochs))
        first, last = np.mean(curves, axis=0)[[0, -1]]
        table.add_row(name, f"{first:.1%}", f"{last:.1%}", f"{(time.perf_counter() - start) / args.seeds:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
