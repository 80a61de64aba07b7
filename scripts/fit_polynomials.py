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


def mills(x):
    """exp(x^2 / 2) Phi(-x): Mills' ratio of the normal distribution times its density at 0."""
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
    # 2^r = 1 + r tail(r)
    "POWER": (
        guard(lambda r: (2**r - 1) / r, [LN2, LN2**2 / 2]),
        (-mp.mpf(1) / 2, mp.mpf(1) / 2),
        lambda r: mp.mpf(2) ** r,
        lambda r, p: 1 + r * p,
    ),
}
# accuracy: the precision of the coefficients, and how many a polynomial has; what "half types" asks for is computed in
# float32 and then rounded
TERMS = {
    "float32": (np.float32, {"LOG": 9, "SIN": 3, "COS": 3, "EXP": 5, "POWER": 6}),
    "float64": (np.float64, {"ATANH": 8, "SIN": 6, "COS": 6, "EXP": 11}),
    "half types": (np.float32, {"POWER": 4}),
}
# accuracy: powers of numerator and denominator in exp(a^2 / 2) Phi(-a) = P(a) / Q(a), 0 <= a <= NORMAL_END
NORMAL = {"float32": (3, 4), "half types": (2, 3)}
NORMAL_END = mp.mpf("13.27")


def rational_fit(function, end, powers, allowed, points=160, rounds=40):
    """P and Q of those powers, lowest first, Q's highest coefficient 1, with the largest |P / (Q function) - 1| /
    allowed on [0, end] as small as can be: (that error, P, Q). Least squares on P - Q function, weighted anew in each
    round (Lawson, 1961)."""
    numerator, denominator = powers
    xs = [end * (mp.sin(mp.pi * (2 * i + 1) / (4 * points))) ** 4 for i in range(points)]  # denser near 0
    true = [function(x) for x in xs]
    weights, scale, best = (
        [mp.mpf(1) / points] * points,
        [1 / (y * allowed(x)) for x, y in zip(xs, true, strict=True)],
        None,
    )
    for _ in range(rounds):
        rows = mp.matrix(
            [
                [s * mp.sqrt(w) * x**j for j in range(numerator + 1)]
                + [-s * mp.sqrt(w) * y * x**j for j in range(denominator)]
                for x, y, w, s in zip(xs, true, weights, scale, strict=True)
            ]
        )
        right = mp.matrix(
            [s * mp.sqrt(w) * y * x**denominator for x, y, w, s in zip(xs, true, weights, scale, strict=True)]
        )
        solved = list(mp.lu_solve(rows.T * rows, rows.T * right))
        p, q = solved[: numerator + 1], [*solved[numerator + 1 :], mp.mpf(1)]
        below = [mp.polyval(q[::-1], x) for x in xs]
        errors = [
            abs(mp.polyval(p[::-1], x) / (d * y) - 1) / allowed(x) for x, y, d in zip(xs, true, below, strict=True)
        ]
        if best is None or max(errors) < best[0]:
            best = max(errors), p, q
        scale = [1 / (d * y * allowed(x)) for x, y, d in zip(xs, true, below, strict=True)]
        weights = [w * e for w, e in zip(weights, errors, strict=True)]
        weights = [w / sum(weights) for w in weights]
    return best


def show(coefficients, kind):
    print("   ", ", ".join(repr(float(c)) if kind is np.float64 else f"{float(c):.9g}" for c in coefficients))


def main() -> None:
    for accuracy, (kind, terms) in TERMS.items():
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
            print(f"{accuracy} {name}: worst relative error 2^{float(mp.log(worst, 2)):.1f}")
            show(rounded[::-1], kind)
    for accuracy, powers in NORMAL.items():
        # exp(-a^2 / 2) beside it has a relative error of about a^2 / 2 roundings: as much more is allowed.
        worst, p, q = rational_fit(mills, NORMAL_END, powers, lambda a: 1 + a * a / 2)
        print(f"{accuracy} NORMAL: worst relative error 2^{float(mp.log(worst, 2)):.1f} (1 + a^2 / 2)")
        show([np.float32(float(c)) for c in p], np.float32)
        show([np.float32(float(c)) for c in q], np.float32)


if __name__ == "__main__":
    main()
