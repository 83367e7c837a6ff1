"""Test the options of a model, its description for LangChain, and that creating it is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest
from langchain_core.load import dumpd, load
from pydantic import ValidationError

from flashmoe.catalog import DEMO, find
from langchain_flashmoe import ChatFlashMoE, InvalidRequest, ModelNotFound


def model(**kwargs):
    return ChatFlashMoE(model=DEMO, **kwargs)


def test_creating_a_model_loads_nothing():
    code = (
        "import sys\n"
        "from langchain_flashmoe import ChatFlashMoE\n"
        "ChatFlashMoE(model='flashmoe-demo').bind_tools([{'name': 'f', 'parameters': {}}])\n"
        "ChatFlashMoE(model='not-there')\n"
        "print({'mlx', 'mlx_lm', 'numba', 'transformers'} & set(sys.modules))\n"
        "import threading; print(threading.active_count())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n1\n", "")


@pytest.mark.parametrize("name", ["temprature", "top_pp", "base_url"])
def test_unknown_argument_is_refused(name):
    with pytest.raises(ValidationError, match=f"'{name}' is not a known option"):
        model(**{name: 1})
    with pytest.raises(InvalidRequest, match=f"'{name}' is not a known option"):
        model().invoke("Hi", **{name: 1})
    with pytest.raises(InvalidRequest, match=f"'{name}' is not a known option"):
        model().bind_tools([], **{name: 1})


def test_misspelt_argument_gets_a_hint():
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        model().invoke("Hi", temprature=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 2),
        ("max_tokens", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("experts", 0),
        ("timeout", 0),
        ("thinking_budget", -1),
        ("reasoning", "maybe"),
        ("temperature", float("nan")),
    ],
)
def test_value_out_of_range_is_refused(name, value):
    with pytest.raises(ValidationError, match=name):
        model(**{name: value})
    with pytest.raises(InvalidRequest, match=name):
        model().invoke("Hi", **{name: value})


def test_missing_model_name_is_explained(monkeypatch):
    monkeypatch.delenv("FLASHMOE_MODEL", raising=False)
    with pytest.raises(ValueError, match="pass model='flashmoe-demo'.*set FLASHMOE_MODEL"):
        ChatFlashMoE()


def test_unknown_model_is_refused():
    with pytest.raises(ModelNotFound, match="'not-there' is no model name"):
        ChatFlashMoE(model="not-there").invoke("Hi")
    with pytest.raises(ModelNotFound, match="224 GB. To get it, run"):
        ChatFlashMoE(model="qwen3.5-397b").invoke("Hi")
    with pytest.raises(ModelNotFound):
        model().invoke("Hi", model="not-there")
    assert ChatFlashMoE(model="not-there").profile is None


def test_every_field_has_a_description():
    own = ChatFlashMoE.model_fields.keys() - ChatFlashMoE.__mro__[1].model_fields.keys()
    assert {"temperature", "experts", "memory", "reasoning", "stop"} <= own
    for name in own:
        assert ChatFlashMoE.model_fields[name].description, name


def keys(**kwargs):
    return model(**kwargs)._get_llm_string()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0.5},
        {"seed": 1},
        {"experts": 4},
        {"stop": ["x"]},
        {"reasoning": True},
        {"thinking_budget": 5},
        {"max_tokens": 5},
    ],
)
def test_models_that_answer_differently_have_different_cache_keys(kwargs):
    assert keys(**kwargs) != keys()
    assert model(**kwargs)._identifying_params != model()._identifying_params
    # A call may set the same options as the model.
    if "stop" not in kwargs:
        assert model()._get_llm_string(**kwargs) == keys(**kwargs)
    # Stop strings of a call are added to those of the model.
    assert model(**kwargs)._get_llm_string(stop=["y"]) != model()._get_llm_string(stop=["y"])


def test_models_that_answer_alike_share_a_cache_key():
    for kwargs in ({"memory": "8GB"}, {"prompt_cache": False}, {"timeout": 9}, {"max_retries": 3}):
        assert keys(**kwargs) == keys()


def test_changed_checkpoint_has_another_cache_key(tmp_path):
    for file in find(DEMO).iterdir():
        (tmp_path / file.name).symlink_to(file)
    before = ChatFlashMoE(model=str(tmp_path))._get_llm_string()
    assert before == ChatFlashMoE(model=str(tmp_path))._get_llm_string()
    assert before != keys()
    assert model()._get_llm_string(model=str(tmp_path)) == before
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    assert ChatFlashMoE(model=str(tmp_path))._get_llm_string() != before


def test_traces_have_the_parameters():
    made = model(temperature=0.5, max_tokens=9, stop=["a"])
    assert made._get_ls_params() == {
        "ls_provider": "flashmoe",
        "ls_model_name": DEMO,
        "ls_model_type": "chat",
        "ls_temperature": 0.5,
        "ls_max_tokens": 9,
        "ls_stop": ["a"],
    }
    of_call = made._get_ls_params(stop=["b", "a"], temperature=0, model="other")
    assert of_call["ls_temperature"] == 0
    assert of_call["ls_stop"] == ["a", "b"]
    assert of_call["ls_model_name"] == "other"
    assert made._llm_type == "flashmoe-chat"
    assert made.metadata["lc_versions"].keys() >= {"langchain-core", "langchain-flashmoe"}


def test_profile_says_what_the_model_can_do():
    profile = model().profile
    assert profile["max_input_tokens"] == profile["max_output_tokens"] == 4096
    assert profile["mid_conversation_system_messages"]
    assert not profile["attachment"]
    able = ("tool_calling", "tool_choice", "tool_call_streaming", "structured_output")
    assert all(profile[name] for name in (*able, "reasoning_output", "text_inputs"))
    assert not any(profile[f"{kind}_inputs"] for kind in ("image", "pdf", "audio", "video"))


def test_profile_of_a_bare_template_has_no_tools(tmp_path):
    for file in find(DEMO).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    profile = ChatFlashMoE(model=str(tmp_path)).profile
    assert not profile["tool_calling"]
    assert not profile["reasoning_output"]


@pytest.mark.filterwarnings("ignore:The function .load. is in beta")
def test_dumped_model_is_restored():
    made = model(temperature=0.5, stop=["a"], api_key="secret", experts=4)
    dumped = dumpd(made)
    assert "secret" not in str(dumped)
    again = load(dumped, allowed_objects=[ChatFlashMoE], valid_namespaces=["langchain_flashmoe"])
    assert again._get_llm_string() == made._get_llm_string()


def test_single_stop_string_becomes_a_list():
    assert model(stop="you").stop == ["you"]


def test_model_is_named_by_the_environment(monkeypatch):
    monkeypatch.setenv("FLASHMOE_MODEL", str(Path("/not/there")))
    assert ChatFlashMoE().model == "/not/there"
