"""A call of a kernel with a fault that only AddressSanitizer notices, for test_msl_faults.py."""

from toy_kernel import matvec, multiply, problem


def cases():
    arguments, _ = problem(rows=1)
    yield "sound", lambda: multiply(matvec(), *arguments)
    # The value that is read past the end does not change the result.
    past = ("float sum = 0;", "float sum = x[K + lane] > 1 ? 1.0f : 0.0f;")
    yield "past the end", lambda: multiply(matvec(past), *arguments)
