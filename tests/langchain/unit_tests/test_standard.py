"""Run LangChain's own unit tests of a chat model."""

import importlib

import pytest
from langchain_tests.unit_tests import ChatModelUnitTests

from flashmoe.catalog import DEMO
from langchain_flashmoe import ChatFlashMoE


@pytest.fixture(autouse=True)
def loadable(monkeypatch):
    """Allow LangChain to load ChatFlashMoE.

    LangChain loads only the classes of a list that has no classes of other packages. Users name the
    class in `load(dumped, allowed_objects=[ChatFlashMoE], ...)`, which the suite cannot do.
    """
    load = importlib.import_module("langchain_core.load.load")
    known = load._get_default_allowed_class_paths("all")
    ours = {tuple(ChatFlashMoE.lc_id())}
    monkeypatch.setitem(load._default_class_paths_cache, "all", known | ours)


class TestChatFlashMoE(ChatModelUnitTests):
    @property
    def chat_model_class(self):
        return ChatFlashMoE

    @property
    def chat_model_params(self):
        return {"model": DEMO}

    @property
    def init_from_env_params(self):
        return {"FLASHMOE_MODEL": DEMO}, {}, {"model": DEMO}
