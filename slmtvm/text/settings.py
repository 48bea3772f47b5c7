"""What the settings beside a vocabulary say: its kind, its special and its added tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmtvm.errors import InvalidModelError
from slmtvm.files import read_text

MAX_TOKENIZER_BYTES = 256 << 20
_MAX_SETTINGS_BYTES = 64 << 20
_OF_MODELS = {
    "bart": "BartTokenizer", "bert": "BertTokenizer", "distilbert": "DistilBertTokenizer",
    "electra": "ElectraTokenizer", "gemma": "GemmaTokenizer", "gpt2": "GPT2Tokenizer",
    "llama": "LlamaTokenizer", "mistral": "LlamaTokenizer", "mpnet": "MPNetTokenizer",
    "mt5": "T5Tokenizer", "qwen2": "Qwen2Tokenizer", "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
}  # fmt: skip
_SPECIAL = ("bos_token", "eos_token", "unk_token", "cls_token", "sep_token", "pad_token",
            "mask_token")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """tokenizer_config.json with what older exports keep in files of their own."""

    fields: dict[str, Any]
    where: Path  # the file that is to be converted

    @property
    def kind(self) -> str:
        """The class that reads the vocabulary, without a "Fast" at its end; "" where unknown.

        Where the settings name none, it follows from the model's.
        """
        said = self.fields.get("tokenizer_class")
        if isinstance(said, str) and said != "PreTrainedTokenizerFast":
            return said.removesuffix("Fast")
        model = self.fields.get("model_type")
        return _OF_MODELS.get(model, model) if isinstance(model, str) else ""

    def flag(self, name: str, default: bool) -> bool:
        value = self.fields.get(name)
        return value if isinstance(value, bool) else default

    def token(self, name: str, default: str | None) -> str | None:
        """The special token ``name``, such as "cls_token"."""
        value = self.fields.get(name, default)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else default

    def special_tokens(self, defaults: dict[str, str]) -> list[str]:
        """All of them, of those that are not said the ``defaults``."""
        names = dict.fromkeys((*_SPECIAL, *defaults))
        tokens = [self.token(name, defaults.get(name)) for name in names]
        more = self.fields.get("additional_special_tokens")
        tokens += more if isinstance(more, list) else []
        return list(dict.fromkeys(token for token in tokens if isinstance(token, str)))

    def added_tokens(self) -> list[tuple[int, str, bool]]:
        """(id, text, whether it is special) of tokens outside the vocabulary, by id."""
        found = self.fields.get("added_tokens_decoder")
        tokens = found.items() if isinstance(found, dict) else ()
        return sorted(
            (int(id_), str(token["content"]), bool(token.get("special")))
            for id_, token in tokens
            if str(id_).isdigit() and isinstance(token, dict) and "content" in token
        )

    def not_converted(self) -> InvalidModelError:
        """The error for a kind of tokenizer that is not converted."""
        return InvalidModelError(
            f"a vocabulary of {self.kind or 'an unknown kind'}, which is not converted; write its "
            "tokenizer.json: transformers.AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)",
            where=str(self.where),
        )


def read_settings(vocabulary: Path) -> Settings:
    """The settings beside the file ``vocabulary``; InvalidModelError where one is no JSON."""
    model = _object(vocabulary.with_name("config.json"))
    fields = {name: model[name] for name in ("model_type", "tokenizer_class") if model.get(name)}
    fields |= _object(vocabulary.with_name("special_tokens_map.json"))
    fields |= _object(vocabulary.with_name("tokenizer_config.json"))
    if not fields.get("added_tokens_decoder"):
        older = _object(vocabulary.with_name("added_tokens.json"))
        fields["added_tokens_decoder"] = {
            id_: {"content": token, "special": False} for token, id_ in older.items()
        }
    return Settings(fields, vocabulary)


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(read_text(path, _MAX_SETTINGS_BYTES, InvalidModelError))
    except (ValueError, RecursionError) as error:
        raise InvalidModelError(f"is no JSON: {error}", where=str(path)) from error
    return value if isinstance(value, dict) else {}
