"""Launches of kernels in tests: by MLX where there is a GPU, else by the stand-in `msl_cpu`."""

from contextlib import contextmanager

from flashmoe_metal import kernel


@contextmanager
def launched(seed: int = 0):
    """Kernels can be launched in here. Gives a list, to which each launch adds its name.

    seed: of the order in which the stand-in runs the lanes; 0 is as they are numbered.
    """
    launches = []
    on_gpu = kernel.available()

    def launch(k: kernel.Kernel, **call):
        launches.append(k.name)
        if on_gpu:
            return k.on_gpu(**call)
        import msl_cpu

        return msl_cpu.run(k.metal, seed=seed, **call)

    with kernel.launched_by(launch):
        yield launches
