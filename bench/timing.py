"""Interleaved timing, and summaries of the samples."""

import contextlib
import math
import signal
import subprocess
import sys
import time
import timeit

import numpy as np

import pyreg
from pyreg import _core

SAMPLE_SECONDS = 0.4e-3  # quick calls are repeated until a sample is about this long
WARM_BELOW_SECONDS = 5e-3  # quicker calls run once untimed before each sample, to fill the caches with their own data
UNSTEADY = 0.1  # a median that moves by more than this within the run may not come out again
PASSES = 2
LEAST_ROUNDS = 4  # of a pass, however long they take


def add_arguments(parser):
    parser.add_argument("--rounds", type=int, default=20, help="in which contenders take turns (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for a case, roughly (%(default)s)")


def in_passes(cases, contenders, args, show=lambda steps: steps):
    """Samples of each case by contender: half of them in a first pass over all cases, half in a second.

    contenders(case) returns the calls, and the pairs of names whose ratios are wanted.  Some things differ between two
    runs: where the arrays happen to lie, what else the machine does in that minute.  They differ between the passes,
    too.
    """
    kept = [[] for _ in cases]
    each = type("Pass", (), {"rounds": math.ceil(args.rounds / PASSES), "seconds": args.seconds / PASSES})
    for i in show([i for _ in range(PASSES) for i in range(len(cases))]):
        calls, pairs = contenders(cases[i])
        kept[i].append(interleave(calls, each, pairs))
    return [{name: np.concatenate([s[name] for s in passes]) for name in passes[0]} for passes in kept]


def interleave(contenders, args, pairs=()):
    """Seconds per call of each contender, one sample in each round: A B C, A B C, ...

    Other work on the machine comes and goes within seconds.  It hits neighbouring samples alike, so the ratio of two
    contenders within a round is steadier than their times.  As long as the median ratio of a pair is unsteady there are
    more rounds, up to three times as many.
    """
    return take_turns({name: sampler(call) for name, call in contenders.items()}, args, pairs)


def sampler(call):
    """A call that returns the seconds which the given one takes, in a sample of it."""
    timer = timeit.Timer(call)
    timer.timeit(1)  # compiles, starts threads, touches memory
    calls = max(1, math.ceil(SAMPLE_SECONDS / timer.timeit(1)))
    seconds = -1.0  # so that the first sample is warm, too

    def sample():
        nonlocal seconds
        if seconds < WARM_BELOW_SECONDS:
            timer.timeit(1)
        seconds = timer.timeit(calls) / calls
        return seconds

    return sample


def take_turns(samplers, args, pairs=()):
    """The samples of ``interleave``, of calls that return seconds."""
    samples = {name: [] for name in samplers}
    start = time.perf_counter()
    for done in range(3 * args.rounds):
        spent = time.perf_counter() - start
        if done >= min(args.rounds, LEAST_ROUNDS) and spent > args.seconds:
            break
        if done % args.rounds == 0 and done and not any(unsteady(summary(ratio(samples, *p))) for p in pairs):
            break
        for name, sample in samplers.items():
            samples[name].append(sample())
    return {name: np.array(s) for name, s in samples.items()}


def ratio(samples, a, b):
    return np.array(samples[a]) / np.array(samples[b])


# It ends by itself after ten minutes, in case this process is killed before it can end it.
BUSY = "import time\nend = time.monotonic() + 600\nwhile time.monotonic() < end: pass"


@contextlib.contextmanager
def neighbour():
    """A process that computes; it is stopped at first (SIGSTOP, SIGCONT)."""
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def beside(process, call):
    """The call while a stopped process goes on."""

    def busy():
        process.send_signal(signal.SIGCONT)
        try:
            call()
        finally:
            process.send_signal(signal.SIGSTOP)

    return busy


def summary(samples):
    """Minimum and median; spread is how far the medians of four parts of the run are from each other, at most."""
    medians = [np.median(part) for part in np.array_split(samples, 4) if len(part)]
    spread = max(medians) / min(medians) - 1 if min(medians) > 0 else 1.0
    return {"min": float(np.min(samples)), "median": float(np.median(samples)), "spread": float(spread)}


def unsteady(ratio):
    return ratio["spread"] > UNSTEADY


def compared(samples, pairs):
    """The summaries of all times, and of the ratios a / b of the pairs (a, b) that are there."""
    return {
        "rounds": len(next(iter(samples.values()))),
        "seconds": {name: summary(s) for name, s in samples.items()},
        "ratios": {f"{a} / {b}": summary(ratio(samples, a, b)) for a, b in pairs if a in samples and b in samples},
    }


BUILT = _core.config()  # among other things, the sizes at which calls change gear


def with_threads(n, call, parallel_from=BUILT["parallel_from_ns"], cache_bytes=BUILT["cache_bytes"]):
    """A call that first sets the number of threads and the sizes at which calls change gear, which takes no time."""

    def run():
        pyreg.set_num_threads(n)
        _core.set_gears(parallel_from, cache_bytes)
        call()

    return run
