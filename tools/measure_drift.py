"""Measure how soon the drift monitor finds a drift, and how often it raises a false alarm.

    python tools/measure_drift.py [--streams 300] [--out FILE]

Scores are normal, with 1,000 for calibration. A drift starts at the first input of the stream or at the 1,001st.
Three methods see the same streams: `featnorm.DriftMonitor`; the Composite Jumper, which bets on the mean of the
same p-values; and a CUSUM that is given the size and direction of the shift, and whose threshold was tuned on
2,000 streams to raise a false alarm in 1 % of them within the length of the stream. The other two keep that bound
however long the stream.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featnorm import DriftMonitor
from featnorm.cli.console import environment

Array = npt.NDArray[np.float64]

CALIBRATED = 1000
STARTS = (0, 1000)
AFTER = 2000
FALSE_ALARM = 0.01
LONG, FALSE_ALARMS = 10_000, (0.1, 0.01)
TUNED_ON = 2000
SHIFTS = (0.1, 0.25, 0.5, 1.0, 2.0)
Draw = Callable[[np.random.Generator], Array]
OTHERS: dict[str, Draw] = {
    "5 % of the inputs 4 lower": lambda rng: rng.normal(size=AFTER) - 4 * (rng.random(AFTER) < 0.05),
    "10 % of the inputs 2.5 lower": lambda rng: rng.normal(size=AFTER) - 2.5 * (rng.random(AFTER) < 0.1),
    "deviation 1.5": lambda rng: rng.normal(0, 1.5, AFTER),
    "deviation 0.6": lambda rng: rng.normal(0, 0.6, AFTER),
    "half of the inputs 1 lower, half 1 higher, each of deviation 0.5": lambda rng: (
        rng.choice([-1.0, 1.0], AFTER) + rng.normal(0, 0.5, AFTER)
    ),
    "the same score again and again": lambda rng: np.full(AFTER, rng.normal()),
    "a shift that grows from 0 to 1": lambda rng: rng.normal(size=AFTER) - np.linspace(0, 1, AFTER),
}


class Jumper:
    """The Composite Jumper (Vovk and others, "Retrain or not retrain", COPA 2021), in place of the bets."""

    rates = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def bet(self, p_values: Array) -> Array:
        """Bet on all p-values of a stream; return log10 of the capital after each."""
        shares = [(1 / 3, 1 / 3, 1 / 3)] * len(self.rates)
        gains = np.empty((len(p_values), len(self.rates)))
        # Plain numbers, because arrays of three numbers are several times slower.
        for step, p in enumerate(p_values.tolist()):
            for i, rate in enumerate(self.rates):
                low, none, high = ((1 - rate) * share + rate / 3 for share in shares[i])
                low, high = low * (1.5 - p), high * (0.5 + p)
                gain = low + none + high
                shares[i] = (low / gain, none / gain, high / gain)
                gains[step, i] = gain
        log_capital = np.cumsum(np.log(gains), axis=0)
        return (np.logaddexp.reduce(log_capital, axis=1) - math.log(len(self.rates))) / math.log(10)


def cusum(calibration: Array, stream: Array, shift: float) -> Array:
    """Return the statistics (streams, inputs) of streams that are expected to shift down."""
    mean, deviation = calibration.mean(1, keepdims=True), calibration.std(1, keepdims=True)
    steps = -shift * (stream - mean) / deviation - shift**2 / 2
    # max(0, previous + step), in one go.
    sums = np.cumsum(steps, axis=1)
    return sums - np.minimum(np.minimum.accumulate(sums, axis=1), 0)


def delays(reached: list[int | None], start: int) -> dict[str, Any]:
    """Return false alarms, the share of the other streams in which the drift was found, and after how many inputs.

    Parameters
    ----------
    reached : index of the alarm in each stream.
    start : index of the first input after the start of the drift.
    """
    true = [at for at in reached if at is None or at >= start]
    after = np.array([np.inf if at is None else at - start + 1 for at in true])
    quantiles = np.quantile(after, [0.1, 0.5, 0.9], method="higher")
    ends = 2 ** np.arange(int(math.log2(AFTER)) + 1)
    return {
        "false": len(reached) - len(true),
        "found": float(np.mean(after <= AFTER)),
        "delay": [None if math.isinf(q) else int(q) for q in quantiles],
        "curve": [float(np.mean(after <= end)) for end in ends],
    }


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("drift.json"))
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    calm = rng.normal(size=(TUNED_ON, CALIBRATED + max(STARTS) + AFTER)).astype(np.float32)
    drifts = {f"a shift of {shift:g}": (lambda rng, s=shift: rng.normal(-s, 1, AFTER), shift) for shift in SHIFTS}
    drifts |= {name: (draw, None) for name, draw in OTHERS.items()}
    rows = []
    for start in STARTS:
        for name, (draw, shift) in drifts.items():
            reached: dict[str, list[int | None]] = {"DriftMonitor": [], "Composite Jumper": [], "CUSUM, tuned": []}
            if shift is None:
                del reached["CUSUM, tuned"]
            else:
                tuning = calm[:, : CALIBRATED + start + AFTER]
                highest = cusum(tuning[:, :CALIBRATED], tuning[:, CALIBRATED:], shift).max(1)
                threshold = np.quantile(highest, 1 - FALSE_ALARM)
            for seed in range(options.streams):
                rng = np.random.default_rng((2, seed))
                calibration = rng.normal(size=CALIBRATED)
                stream = np.concatenate([rng.normal(size=start), draw(rng)])
                for method, gamblers in (("DriftMonitor", None), ("Composite Jumper", Jumper())):
                    monitor = DriftMonitor(calibration, FALSE_ALARM, seed)
                    monitor._gamblers = gamblers or monitor._gamblers
                    monitor.update(stream)
                    reached[method].append(monitor.alarmed_at)
                if shift is not None:
                    above = cusum(calibration[None], stream[None], shift)[0] >= threshold
                    reached["CUSUM, tuned"].append(int(above.argmax()) if above.any() else None)
            for method, at in reached.items():
                rows.append({"drift": name, "start": start, "method": method, **delays(at, start)})
            print(f"after {start}: {name}", flush=True)
    content = {
        "streams": options.streams,
        "after": AFTER,
        "rows": rows,
        "false_alarms": [false_alarms(options.streams, calibrated) for calibrated in (20, CALIBRATED)],
        "environment": {name: fact for name, fact in environment().items() if name != "command"},
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def false_alarms(streams: int, calibrated: int) -> dict[str, Any]:
    """Return how often streams without drift raise the alarm, by false-alarm rate."""
    highest = []
    for seed in range(streams):
        scores = np.random.default_rng((3, seed)).normal(size=calibrated + LONG)
        monitor = DriftMonitor(scores[:calibrated], FALSE_ALARM, seed)
        monitor.update(scores[calibrated:])
        highest.append(monitor.highest)
    shares = {f"{rate:g}": float(np.mean(np.array(highest) >= -math.log10(rate))) for rate in FALSE_ALARMS}
    return {"calibrated": calibrated, "inputs": LONG, "shares": shares}


if __name__ == "__main__":
    main()
