"""Interleaved timing, and what is said of the samples."""

import math
import time
import timeit

import numpy as np

import pyreg
from pyreg import _core

SAMPLE_SECONDS = 0.4e-3  # quick calls are repeated until a sample is about this long
WARM_BELOW_SECONDS = 5e-3  # quicker ones run once untimed before each sample: what came before has filled the caches
UNSTEADY = 0.1  # a median that moves by more than this within the run would not come out again
LEAST_ROUNDS = 6


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=20, help="in which contenders take turns (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=3.0, help=f"a case, from round {LEAST_ROUNDS} on (%(default)s)"
    )


def interleave(contenders, args, pairs=()):
    """Seconds a call of each contender, one sample in each round: A B C, A B C, ...

    Other work on the machine comes and goes in seconds.  It hits neighbouring samples alike, so the ratios of two
    contenders within a round are steadier than their times.  While the median ratio of a pair is unsteady there are
    more rounds, up to three times as many.
    """
    timers = {name: timeit.Timer(call) for name, call in contenders.items()}
    calls, samples = {}, {name: [] for name in contenders}
    for name, timer in timers.items():
        timer.timeit(1)  # compiles, starts threads, touches memory
        calls[name] = max(1, math.ceil(SAMPLE_SECONDS / timer.timeit(1)))
    start = time.perf_counter()
    for done in range(3 * args.rounds):
        spent = time.perf_counter() - start
        if done >= min(args.rounds, LEAST_ROUNDS) and spent > args.seconds:
            break
        if done % args.rounds == 0 and done and not any(unsteady(summary(ratio(samples, *pair))) for pair in pairs):
            break
        for name, timer in timers.items():
            if not samples[name] or samples[name][-1] < WARM_BELOW_SECONDS:
                timer.timeit(1)
            samples[name].append(timer.timeit(calls[name]) / calls[name])
    return {name: np.array(s) for name, s in samples.items()}


def ratio(samples, a, b):
    return np.array(samples[a]) / np.array(samples[b])


def summary(samples):
    """spread: how far the median of a third of the run is from that of the whole, at most."""
    median = np.median(samples)
    thirds = [np.median(third) for third in np.array_split(samples, 3) if len(third)]
    spread = max(abs(third / median - 1) for third in thirds)
    return {"min": float(np.min(samples)), "median": float(median), "spread": float(spread)}


def unsteady(ratio):
    return ratio["spread"] > UNSTEADY


def compare(contenders, pairs, args):
    """The summaries of all times, and of the ratios a / b of the pairs (a, b) that are there."""
    pairs = [(a, b) for a, b in pairs if a in contenders and b in contenders]
    samples = interleave(contenders, args, pairs)
    return {
        "rounds": len(next(iter(samples.values()))),
        "seconds": {name: summary(s) for name, s in samples.items()},
        "ratios": {f"{a} / {b}": summary(ratio(samples, a, b)) for a, b in pairs},
    }


BUILT = _core.config()  # the sizes at which calls change gear, for one


def with_threads(n, call, parallel_from=BUILT["parallel_from_ns"], cache_bytes=BUILT["cache_bytes"]):
    """A call that first sets the number of threads, and the sizes at which calls change gear: a few stores."""

    def run():
        pyreg.set_num_threads(n)
        _core.set_gears(parallel_from, cache_bytes)
        call()

    return run
