"""The tiny growth path of the tests of notebook 03."""

PATH = [(1, 8), (1, 16)]
RATES = {"staged": [5e-3, 5e-3], "scratch": [5e-3], "small": [5e-3]}
