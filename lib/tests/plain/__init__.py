"""Plain versions of the methods, slow and obvious, that the library is held against; benchmarks may import them."""
