"""Several JAX processes train one model, with dropout and synchronised batch-norm, as one process does.

    python examples/distributed.py [--processes 2] [--steps 20]

Starts the processes on this machine, and one more that trains on the whole batch alone, and prints the losses of both.
Each process holds a part of the batch.  The program has no communication in it: `jax.jit` sees that the batch is
sharded, dropout gives each part the mask that it has in the whole, and batch-norm pools the statistics.
"""

import argparse
import json
import os
import socket
import subprocess
import sys

BATCH, INPUTS, HIDDEN, CLASSES = 64, 20, 32, 3


def data():
    """Points of three clouds, and which cloud each is from."""
    import numpy as np

    rng = np.random.default_rng(0)
    labels = rng.integers(CLASSES, size=BATCH)
    centres = rng.standard_normal((CLASSES, INPUTS))
    return (centres[labels] + rng.standard_normal((BATCH, INPUTS))).astype(np.float32), labels


def train(processes, process, port, steps):
    """The losses of all steps, as one of the processes sees them."""
    import jax

    if processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=processes, process_id=process)
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import pyreg.jax

    mesh = Mesh(np.array(jax.devices()), ("batch",))

    def shard(array):  # each process makes its own part
        sharding = NamedSharding(mesh, PartitionSpec("batch"))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    def replicate(tree):
        return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))

    def loss_of(params, x, labels, key):
        h = x @ params["w1"]
        h, _, _ = pyreg.jax.batch_norm(h, params["scale"], params["bias"], activation="relu")
        h = pyreg.jax.dropout(h, 0.5, key=key)
        logits = jax.nn.log_softmax(h @ params["w2"])
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], axis=1))

    @jax.jit
    def step(params, x, labels, key):
        loss, gradients = jax.value_and_grad(loss_of)(params, x, labels, key)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), loss

    rng = np.random.default_rng(1)
    params = replicate(
        {
            "w1": rng.standard_normal((INPUTS, HIDDEN)).astype(np.float32) / INPUTS**0.5,
            "scale": np.ones(HIDDEN, np.float32),
            "bias": np.zeros(HIDDEN, np.float32),
            "w2": rng.standard_normal((HIDDEN, CLASSES)).astype(np.float32) / HIDDEN**0.5,
        }
    )
    x, labels = map(shard, data())
    losses = []
    for i in range(steps):
        params, loss = step(params, x, labels, jax.random.fold_in(jax.random.key(0), i))
        losses.append(float(loss))
    return losses


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(processes, steps, timeout=300):
    """The losses that each of the processes saw."""
    port = free_port()
    command = [
        sys.executable,
        "-P",
        __file__,
        "--processes",
        str(processes),
        "--steps",
        str(steps),
        "--port",
        str(port),
    ]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)  # one device per process
    children = [
        subprocess.Popen([*command, "--process", str(i)], stdout=subprocess.PIPE, text=True, env=env)
        for i in range(processes)
    ]
    try:
        outputs = [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    if any(child.returncode for child in children):
        raise SystemExit("a process failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if BATCH % args.processes:
        parser.error(f"--processes is {args.processes}; wanted a divisor of the batch, {BATCH}")
    if args.process is not None:
        print(json.dumps(train(args.processes, args.process, args.port, args.steps)))
        return

    (alone,) = start(1, args.steps)
    together = start(args.processes, args.steps)
    print(f"step  one process  {args.processes} processes")
    for i, (a, b) in enumerate(zip(alone, together[0], strict=True)):
        print(f"{i:4}  {a:11.7f}  {b:11.7f}")
    assert all(losses == together[0] for losses in together), "the processes disagree"
    worst = max(abs(a - b) / abs(a) for a, b in zip(alone, together[0], strict=True))
    print(f"largest difference: {worst:.1e} of the loss (sums of floats in another order; the masks are the same bits)")
    assert worst < 1e-4


if __name__ == "__main__":
    main()
