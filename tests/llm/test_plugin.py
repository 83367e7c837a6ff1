"""Test the plugin with the real `llm` in processes of its own, and with its real logs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from toys import write_toy

import llm
from flashmoe.catalog import DEMO
from flashmoe.cli import cli
from llm_flashmoe.errors import UserError

#: `make test-all` runs these.
pytestmark = pytest.mark.slow

STORY = "Tell me a short story about a cat."
LLM = str(Path(sys.executable).parent / "llm")


def logs(run_llm) -> list[dict]:
    return json.loads(run_llm("logs", "--json", "-n", "0").stdout)


def test_answer_is_streamed_and_logged(run_llm):
    done = run_llm("-m", DEMO, STORY, "-o", "seed", "0", "-o", "max_tokens", "6", "-u")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "Token usage:" in done.stderr
    (entry,) = logs(run_llm)
    assert entry["response"].strip() == done.stdout.strip()
    figures = entry["response_json"]
    assert figures["finish_reason"] == "length"
    assert (figures["experts"], figures["trained_experts"], figures["bits"]) == (10, 10, 4)
    assert 0 <= figures["hit_rate"] <= 1
    assert figures["bytes_read"] > 0
    assert figures["tokens_per_second"] > 0
    assert entry["output_tokens"] == 6
    assert entry["input_tokens"] > 5

    again = run_llm("-m", DEMO, STORY, "-o", "seed", "0", "-o", "max_tokens", "6", "--no-stream")
    assert again.stdout == done.stdout, "same seed, and streamed or not: the same text"


def test_continued_conversation_is_remembered(run_llm):
    greedy = ("-o", "temperature", "0", "-o", "max_tokens", "40")
    first = run_llm("-m", DEMO, "My name is Emma.", *greedy)
    assert first.returncode == 0, first.stderr
    second = run_llm("-c", "What is my name?", *greedy)
    assert "Emma" in second.stdout
    details = [json.loads(e["token_details"] or "{}") for e in logs(run_llm)]
    assert "cached_tokens" not in details[0]
    cached = details[1]["cached_tokens"]
    assert cached > 5, "a new process reads only the new turn"
    first_prompt = logs(run_llm)[0]["input_tokens"]
    assert first_prompt - cached == 7, "all but the template's tail"
    alone = run_llm("-m", DEMO, "What is my name?", *greedy)
    assert "Emma" not in alone.stdout
    tokens = [e["input_tokens"] for e in logs(run_llm)]
    assert tokens[1] > tokens[0] + tokens[2] - 10, "the second prompt holds the first turn"


def test_options_of_a_response_are_used(run_llm):
    done = run_llm(
        *("-m", DEMO, "Count from one to ten.", "-o", "temperature", "0", "-o", "experts", "4"),
        *("-o", "max_tokens", "20", "-o", "stop", '["zebra", "e"]', "-o", "memory", "2GB"),
        *("-o", "top_p", "0.9", "-o", "top_k", "5", "-o", "min_p", "0.1", "-o", "io", "uncached"),
        *("-o", "repetition_penalty", "1.1", "-o", "think", "0", "-o", "cache", "false"),
        *("-o", "activations", "int8"),
    )
    assert done.returncode == 0, done.stderr
    assert "e" not in done.stdout
    (entry,) = logs(run_llm)
    assert entry["response_json"]["experts"] == 4
    assert entry["response_json"]["activations"] == "int8"
    assert entry["options_json"]["memory"] == "2GB"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("experts", "0"), ("experts=0", "1 or more")),
        (("experts", "11"), ("experts=11", "between 1 and 10")),
        (("temperature", "-1"), ("temperature=-1", "between 0 and 100")),
        (("memory", "1MB"), ("memory 1.0 MB is too small", "needs at least")),
        (("memory", "lots"), ("'lots' is not a memory size", "8GB")),
        (("max_tokens", "0"), ("max_tokens=0", "1 or more")),
        (("stop", ""), ("has an empty string",)),
        (("io", "fast"), ("io='fast'", "buffered, uncached, direct")),
        (("activations", "int4"), ("activations='int4'", "float32, int8")),
        (("thinking_budget", "-1"), ("thinking_budget=-1", "0 or more")),
    ],
)
def test_bad_option_is_refused(options, words):
    model = llm.get_model(DEMO)
    with pytest.raises(UserError) as error:
        model.prompt("hello", options=dict([options])).text()
    for word in words:
        assert word in str(error.value)


def test_bad_option_is_an_error_without_a_traceback(run_llm):
    done = run_llm("-m", DEMO, "hello", "-o", "experts", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: experts=0")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("prompt", "words"),
    [(" ", ("the prompt is empty",)), ("word " * 5000, ("tokens", "context", "4096"))],
)
def test_bad_prompt_is_an_error_without_a_traceback(run_llm, prompt, words):
    done = run_llm("-m", DEMO, prompt)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_listing_models_does_not_import_mlx(tmp_path):
    code = (
        "import sys; from click.testing import CliRunner; from llm.cli import cli\n"
        "done = CliRunner().invoke(cli, ['models'])\n"
        f"assert {DEMO!r} in done.output, done.output\n"
        "heavy = {'mlx', 'mlx_lm', 'numba', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_interrupt_ends_without_a_traceback_or_an_abort(tmp_path):
    env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
    command = [LLM, "-m", DEMO, "Tell me a very long story."]
    # All tokens are equally likely, so that the answer is long.
    even = {"temperature": 100, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 1}
    for name, value in even.items():
        command += ["-o", name, str(value)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.read(5), process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "Traceback" not in errors
    assert "terminate called" not in errors


def test_seed_zero_is_a_seed():
    model = llm.get_model(DEMO)

    def text(seed):
        return model.prompt("Name an animal.", max_tokens=16, seed=seed, temperature=1.5).text()

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(5)}) > 1


def test_missing_checkpoint_is_an_error_without_a_traceback(run_llm, tmp_path):
    done = run_llm("flashmoe", "run", tmp_path / "nothing", "hello")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "no directory" in done.stderr


def truncate(path):
    with open(path / "model.safetensors", "r+b") as f:
        f.truncate(f.seek(0, 2) - 1)


def long_header(path):
    with open(path / "model.safetensors", "r+b") as f:
        f.write((2**40).to_bytes(8, "little"))


def header(change):
    def apply(path):
        raw = (path / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        content = json.loads(raw[8 : 8 + length])
        change(content)
        text = json.dumps(content).encode()
        text += b" " * (length - len(text))
        new = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        (path / "model.safetensors").write_bytes(new)

    return apply


def config(**values):
    def apply(path):
        content = json.loads((path / "config.json").read_text())
        for place in (content, content["text_config"]):
            place.update({k: v for k, v in values.items() if k in place})
        content.update({k: v for k, v in values.items() if k not in content["text_config"]})
        (path / "config.json").write_text(json.dumps(content))

    return apply


EXPERT = "language_model.model.layers.1.mlp.switch_mlp.up_proj.weight"
BAD = {
    "truncated shard": (truncate, "the download is incomplete"),
    "header beyond the file": (long_header, "header 1099511627776 bytes"),
    "overlapping ranges": (
        header(lambda h: h[EXPERT].update(data_offsets=[n - 4 for n in h[EXPERT]["data_offsets"]])),
        "overlaps",
    ),
    "wrong dtype": (header(lambda h: h[EXPERT].update(dtype="I32")), "I32"),
    "missing expert tensor": (header(lambda h: h.update(x=h.pop(EXPERT))), EXPERT),
    "config that disagrees": (config(num_experts=8), "8"),
    "unsupported model type": (config(model_type="llama"), "qwen3_5_moe, qwen3_moe, qwen3_next"),
    "unsupported quantisation": (
        config(quantization={"bits": 4, "group_size": 32, "mode": "mxfp6"}),
        "mxfp6",
    ),
}


@pytest.mark.parametrize("fault", list(BAD))
def test_bad_checkpoint_is_an_error_without_a_traceback(tmp_path, fault):
    damage, words = BAD[fault]
    path = write_toy(tmp_path / "toy", group_size=64, moe_intermediate_size=64)
    damage(path)
    done = CliRunner().invoke(cli, ["run", str(path), "hello"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: "), done.output
    assert "Traceback" not in done.output
    assert words in done.output


def test_long_or_odd_model_name_is_an_error_without_a_traceback(run_llm):
    for name in ("word " * 100, "~nobody-here/model"):
        done = run_llm("flashmoe", "run", name, "hello")
        assert done.returncode == 1
        assert done.stderr.startswith("Error: "), done.stderr
        assert "Traceback" not in done.stderr


def test_run_command_shows_its_memory_plan(run_llm):
    done = run_llm("flashmoe", "run", DEMO, "hello", "--max-tokens", "5", "--slots", "12", "-v")
    assert done.returncode == 0, done.stderr
    assert "12 slots x 8 layers" in done.stderr
    assert "K=10 of 10, 4 bits" in done.stderr
