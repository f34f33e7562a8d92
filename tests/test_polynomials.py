"""The coefficients of the elementary functions are those that bench/polynomials.py makes, and as good as is stated."""

import inspect
import re

import numpy as np
import polynomials
import pytest
from polynomials import FITS, POINTS, Fit, interpolation, largest_error, minimax

from grpo_fast._kernels import elementary

every_fit = pytest.mark.parametrize("fit", FITS, ids=lambda fit: fit.name)
#: For each name, what its comments in elementary.py state: the error, and that of the rounded coefficients.
STATED = {
    name: (float(made), float(rounded))
    for name, made, rounded in re.findall(
        r"^(\w+) = \(.*# error (\S+), rounded (\S+)$", inspect.getsource(elementary), re.MULTILINE
    )
}


@every_fit
def test_the_coefficients_are_made_again(fit):
    # To the last bit: they are linear functions of at most 11 values, known to 200 bits, of which powers of an argument
    # below 0.0404 lose 50; what is then rounded to the 53 bits of a float64 has about 100 to spare.
    made, stand = list(map(float, interpolation(fit))), list(getattr(elementary, fit.name))
    assert made[-len(stand) :] == stand
    # The ½ before R comes from the formula; the format holds nothing closer to what was made.
    assert tuple(float(fit.dtype(c)) for c in made) == fit.rounded()


@every_fit
def test_the_errors_are_as_stated(fit):
    found = largest_error(fit, interpolation(fit)), largest_error(fit, fit.rounded())
    assert STATED.keys() == {fit.name for fit in FITS}
    assert tuple(float(f"{error:.1e}") for error in found) == STATED[fit.name]


@every_fit
def test_they_are_nearly_minimax(fit):
    # No polynomial of this degree has an error below `least`, by de la Vallée Poussin's theorem.
    coefficients, least = minimax(fit)
    assert largest_error(fit, coefficients) == pytest.approx(least, rel=1e-12)
    percent = {"TAIL": 2, "REST": 4}[fit.name[:4]]
    assert least < largest_error(fit, interpolation(fit)) <= (1 + percent / 100) * least
    assert f"{percent} % from minimax" in inspect.getsource(elementary)


@pytest.mark.parametrize("degree", range(1, 12))
def test_remez_finds_chebyshev(degree):
    # Of all polynomials of degree n that approximate x^(n+1) between −1 and 1, the best leaves 2^-n times that of
    # Chebyshev, cos((n+1)·arccos x), whose extrema lie half a point or less from one of the points.
    power = Fit("power", lambda x: x ** (degree + 1), (-1.0, 1.0), (0.0,) * (degree + 1), np.float64)
    _, least = minimax(power)
    missed = np.cos((degree + 1) * np.pi / POINTS / 2)
    assert missed * (1 - 1e-12) <= least * 2.0**degree <= 1 + 1e-12


def test_the_tables_are_printed(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["polynomials.py"])
    polynomials.main()
    printed = capsys.readouterr().out
    assert all(repr(c) in printed for fit in FITS for c in fit.coefficients)
