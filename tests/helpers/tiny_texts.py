"""Tiny models of texts with random weights, as `save_pretrained` writes them, and a data root with texts."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import tokenizers
import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "my", "card", "was", "lost", "where", "is", "it", "?", "the", "news"]


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    marks = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **marks).save_pretrained(folder)


def saved(folder: Path, name: str = "BertModel", **options: object) -> Path:
    """Save a model of a class of transformers, by default with 16 features and 24 tokens, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    options = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 24, "pad_token_id": 0, **options}
    family = name.removesuffix("ForSequenceClassification").removesuffix("Model")
    config = getattr(transformers, f"{family}Config")(**options)
    getattr(transformers, name)(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def saved_classifier(folder: Path, names: list[str], texts: list[str]) -> Path:
    """Save a classifier into named classes, whose logits are centered over some texts: it predicts several."""
    named = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    saved(folder, "BertForSequenceClassification", **named)
    model = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        model.classifier.bias -= model(batch["input_ids"], batch["attention_mask"]).logits.mean(0)
    model.save_pretrained(folder)
    return folder


def write_texts(path: Path, classes: int, count: int, words: list[str]) -> None:
    """Write a parquet file of distinct texts with the columns text and label, ``count`` per class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(c, i) for i in range(count) for c in range(classes)]
    texts = [" ".join(words[(c + i * k) % len(words)] for k in range(1 + i % 7)) + f" {words[c]}" for c, i in rows]
    table = pyarrow.table({"text": texts, "label": [c for c, _ in rows]})
    pyarrow.parquet.write_table(table, path)
