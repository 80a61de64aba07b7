"""Fit the polynomials of `csrc/common/math.h`, `csrc/common/activations.h` and of `fastgen/reference/random.py`.

The random stream promises the same bits on every CPU and device, so its elementary functions are
ours: Chebyshev fits (within a small factor of minimax) on reduced ranges, rounded to the working
precision. Run `python scripts/fit_polynomials.py` (needs mpmath) to print every coefficient, lowest
power first, with the worst relative error that the rounded polynomial adds to its function.
"""

import mpmath as mp
import numpy as np

mp.mp.dps = 50

LN2 = mp.log(2)
QUARTER_PI = mp.pi / 4
F_LOW, F_HIGH = mp.sqrt("0.5") - 1, mp.sqrt(2) - 1
S_HIGH = F_HIGH / (2 + F_HIGH)
MILLS = mp.mpf("0.36")  # of those tried, where nine terms are closest


def mills(x):
    """Mills' ratio of the normal distribution times its density at 0."""
    return mp.exp(x * x / 2) * mp.erfc(x / mp.sqrt(2)) / 2


def guard(function, series):
    """`function` away from zero, the leading terms of its Taylor series near it."""
    return lambda x: mp.polyval(series[::-1], x) if abs(x) < mp.mpf("1e-12") else function(x)


# name: (tail(x), interval, the function whose relative error counts, how the tail enters it)
FITS = {
    # log1p(f) = f + f^2 tail(f)
    "LOG": (
        guard(lambda f: (mp.log1p(f) - f) / f**2, [-mp.mpf(1) / 2, mp.mpf(1) / 3]),
        (F_LOW, F_HIGH),
        mp.log1p,
        lambda f, p: f + f * f * p,
    ),
    # log1p(f) = 2 atanh(s), s = f / (2 + f), 2 atanh(s) / s = 2 + z tail(z), z = s^2
    "ATANH": (
        guard(lambda z: (2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z) - 2) / z, [mp.mpf(2) / 3, mp.mpf(2) / 5]),
        (0, S_HIGH**2),
        lambda z: 2 * mp.atanh(mp.sqrt(z)) / mp.sqrt(z) if z else mp.mpf(2),
        lambda z, p: 2 + z * p,
    ),
    # sin(r) = r + r y tail(y), y = r^2
    "SIN": (
        guard(lambda y: (mp.sin(mp.sqrt(y)) / mp.sqrt(y) - 1) / y, [-mp.mpf(1) / 6, mp.mpf(1) / 120]),
        (0, QUARTER_PI**2),
        lambda y: mp.sin(mp.sqrt(y)) / mp.sqrt(y) if y else mp.mpf(1),
        lambda y, p: 1 + y * p,
    ),
    # cos(r) = 1 - y/2 + y^2 tail(y)
    "COS": (
        guard(lambda y: (mp.cos(mp.sqrt(y)) - 1 + y / 2) / y**2, [mp.mpf(1) / 24, -mp.mpf(1) / 720]),
        (0, QUARTER_PI**2),
        lambda y: mp.cos(mp.sqrt(y)),
        lambda y, p: 1 - y / 2 + y * y * p,
    ),
    # exp(r) = 1 + r + r^2 tail(r)
    "EXP": (
        guard(lambda r: (mp.exp(r) - 1 - r) / r**2, [mp.mpf(1) / 2, mp.mpf(1) / 6]),
        (-LN2 / 2, LN2 / 2),
        mp.exp,
        lambda r, p: 1 + r + r * r * p,
    ),
    # exp(x^2 / 2) Phi(-x) = t tail(t), t = 1 / (1 + MILLS x), 0 <= x <= 14
    "MILLS": (
        lambda t: mills((1 / t - 1) / MILLS) / t,
        (1 / (1 + 14 * MILLS), mp.mpf(1)),
        lambda t: mills((1 / t - 1) / MILLS),
        lambda t, p: t * p,
    ),
}
TERMS = {
    "float32": {"LOG": 9, "SIN": 3, "COS": 3, "EXP": 5, "MILLS": 9},
    "float64": {"ATANH": 8, "SIN": 6, "COS": 6, "EXP": 11},
}


def main() -> None:
    for precision, terms in TERMS.items():
        kind = np.dtype(precision).type
        for name, count in terms.items():
            tail, (low, high), exact, whole = FITS[name]
            fitted = mp.chebyfit(tail, (mp.mpf(low), mp.mpf(high)), count)
            rounded = [kind(float(c)) for c in fitted]
            worst = 0
            for i in range(2001):
                x = low + (high - low) * mp.mpf(i) / 2000
                true = exact(x)
                if true:
                    got = whole(x, mp.polyval([mp.mpf(float(c)) for c in rounded], x))
                    worst = max(worst, abs(got / true - 1))
            print(f"{precision} {name}: worst relative error 2^{float(mp.log(worst, 2)):.1f}")
            print("   ", ", ".join(repr(float(c)) if kind is np.float64 else f"{c:.9g}" for c in rounded[::-1]))


if __name__ == "__main__":
    main()
