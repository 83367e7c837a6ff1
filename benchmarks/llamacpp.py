"""Measure llama.cpp with the GGUF version of synth.py's model, to compare streaming with it.

    python benchmarks/synth_gguf.py OUT.gguf --layers 4 --experts 256
    python benchmarks/llamacpp.py OUT.gguf --warm           # all in memory
    python benchmarks/llamacpp.py OUT.gguf --limit 4GB      # mapped, in a memory cgroup

It needs llama-cpp-python, 0.3.36 or later, in the interpreter that runs it, or in the one given by
--python; flashmoe is not needed. Built with CMAKE_ARGS=-DGGML_NATIVE=ON, it uses all instructions
of the processor.

The tokens are given, so the routing is random and each token needs other experts. The cold run
starts with an empty page cache; the warm one decodes the same tokens in the same process, with an
empty KV cache. Without a limit the bound is the speed of memory: each token moves the dense weights
and K experts of each layer through the cores once. With a limit, page faults read the experts that
the page cache dropped, and the kernel reads ahead around them (read_ahead_kb of the drive):
`disk_bytes_per_token` minus the bytes of the K experts was read in vain.

Weights that are repacked for the processor are a copy in memory, which would not fit under a limit:
repacking is off there. The last line is JSON.
"""

import argparse
import ctypes
import json
import math
import sys
import time
from pathlib import Path
from statistics import mean, median

import disk
import runs

MATRIX_BYTES = 2_359_296  # one of the three matrices of an expert


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level, text, data) -> None:
    """Drop a message of llama.cpp's log."""


def load(path: Path, threads: int, context: int, repack: bool):
    """Load a model; return the API, the model and a context of `context` tokens."""
    import llama_cpp as api

    api.llama_log_set(_silent, None)
    api.llama_backend_init()
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = repack
    model = api.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}: write it again with synth_gguf.py.")
    params = api.llama_context_default_params()
    params.n_ctx = context
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("llama.cpp cannot create a context: there may be too little memory.")
    return api, model, context


def measure(api, context, prompt: list[int], forced: list[int]) -> dict:
    """Prefill the prompt, decode the forced tokens, and return the figures."""
    api.llama_memory_clear(api.llama_get_memory(context), True)

    def decode(tokens: list[int]) -> float:
        start = time.perf_counter()
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if failed := api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit(f"llama_decode failed with {failed}.")
        api.llama_synchronize(context)
        return time.perf_counter() - start

    read = runs.Usage()
    at_once = api.llama_n_batch(context)
    took = sum(decode(prompt[i : i + at_once]) for i in range(0, len(prompt), at_once))
    prefill = read.so_far()
    used = runs.Usage()
    seconds = [decode([token]) for token in forced]
    usage = used.so_far()
    # With NaN in the hidden states, every token would choose the same experts.
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(api.llama_get_model(context)))
    if not all(map(math.isfinite, api.llama_get_logits_ith(context, -1)[:vocab])):
        raise SystemExit("llama.cpp's logits are not finite: the file does not fit this version.")
    return {
        "prefill_tokens_per_second": round(len(prompt) / took, 2),
        "prefill_disk_bytes": prefill["disk_bytes"],
        "tokens_per_second": round(1 / median(seconds), 3),
        "tokens_per_second_mean": round(1 / mean(seconds), 3),
        "disk_bytes_per_token": usage["disk_bytes"] // len(forced),
        "cpu_ms_per_token": round(1e3 * usage["cpu"] / len(forced), 1),
        "major_faults_per_token": round(usage["faults"] / len(forced), 1),
        "cores_of_others": usage["others"],
    }


def child(args: argparse.Namespace) -> dict:
    """Measure the disk, one or two runs, and the disk again, in this process."""
    ranges = disk.pieces(args.path, MATRIX_BYTES)
    raw = [disk.bandwidth(ranges, args.depth, args.raw_seconds)]
    start = time.perf_counter()
    context = 256 * (1 + (args.prompt + args.steps) // 256)
    api, model, context = load(args.path, args.threads, context, args.repack)
    loaded = time.perf_counter() - start
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    ids = runs.tokens(args.tokens, args.prompt + args.steps, vocab, args.seed)
    report = {"version": api.__version__, "system": api.llama_print_system_info().decode()}
    report["load_seconds"] = round(loaded, 2)
    for name in ("cold", "warm") if args.warm else ("cold",):
        report[name] = measure(api, context, ids[: args.prompt], ids[args.prompt :])
    raw.append(disk.bandwidth(ranges, args.depth, args.raw_seconds))
    if None not in raw:
        report["raw_gb_s_before"], report["raw_gb_s_after"] = (round(r / 1e9, 3) for r in raw)
    report["swapped"] = runs.swapped()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path, help="a file written by synth_gguf.py")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has llama_cpp")
    parser.add_argument("--limit", default="none", help="memory limit of the cgroup, such as 4GB")
    parser.add_argument("--keep-cache", action="store_true", help="do not drop the page cache")
    parser.add_argument("--repack", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32, help="tokens decoded")
    parser.add_argument(
        "--tokens", type=Path, help="file of ids between white space; else random ids"
    )
    parser.add_argument("--warm", action="store_true", help="run again in the same process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=8, help="reads in flight, for raw speed")
    parser.add_argument("--raw-seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    limit = runs.nbytes(args.limit)
    if args.repack is None:
        args.repack = limit is None
    if args.child:
        print(json.dumps(child(args)))
        return
    command = [args.python, __file__, *sys.argv[1:], "--child"]
    measured = runs.alternated(
        {"llama.cpp": limit},
        args.rounds,
        lambda limit: runs.run(command, limit=limit, keep=args.keep_cache),
    )
    settings = {"rounds": args.rounds, "repack": args.repack, "prompt": args.prompt}
    size = {"file": args.path.stat().st_size}
    print(json.dumps({"benchmark": "llamacpp"} | size | settings | measured["llama.cpp"]))


if __name__ == "__main__":
    main()
