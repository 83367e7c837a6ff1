"""What the package gives out."""

import langchain_flashmoe


def test_name_is_missing():
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
