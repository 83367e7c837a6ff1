"""One call of a kernel with a fault that only AddressSanitizer sees at once: see test_msl.py."""

from toy_kernel import matvec, multiply, problem


def cases():
    arguments, _ = problem(rows=1)
    yield "sound", lambda: multiply(matvec(), *arguments)
    # A read past the end whose value changes nothing.
    past = ("float sum = 0;", "float sum = x[K + lane] > 1 ? 1.0f : 0.0f;")
    yield "past the end", lambda: multiply(matvec(past), *arguments)
