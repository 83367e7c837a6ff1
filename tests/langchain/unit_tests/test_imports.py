"""Test which names the package exports."""

import langchain_flashmoe


def test_package_exports_every_name():
    assert sorted(langchain_flashmoe.__all__) == [
        "ChatFlashMoE",
        "ContextOverflow",
        "IncompleteOutput",
        "InvalidRequest",
        "ModelFailed",
        "ModelNotFound",
        "RequestTimeout",
    ]
    assert all(hasattr(langchain_flashmoe, name) for name in langchain_flashmoe.__all__)
