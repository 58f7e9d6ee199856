"""Tiny classifiers of transformers with random weights, and batches of several lengths for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import featnorm as fn

CLASSES = 4
PAD, EOS = 0, 2
SIZE = 32
LENGTHS = (7, 4, 9, 1)

TEXT = {"vocab_size": 40, "hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": PAD}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
SEQ2SEQ = {"vocab_size": 40, "d_model": SIZE, "encoder_layers": 2, "decoder_layers": 2, "pad_token_id": PAD,
           "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
           "decoder_ffn_dim": 48, "max_position_embeddings": 40, "eos_token_id": EOS,
           "decoder_start_token_id": EOS}  # fmt: skip
VISION = {"image_size": 32, "patch_size": 8, "hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 48}  # fmt: skip
STAGES = {"image_size": 32, "depths": [1, 1], "hidden_sizes": [16, SIZE], "num_stages": 2}
# Convolutions whose normalization covers each position by itself: the other kind depends on the padding.
AUDIO = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
         "conv_dim": (16, 16), "conv_kernel": (10, 4), "conv_stride": (5, 4), "num_feat_extract_layers": 2,
         "feat_extract_norm": "layer", "do_stable_layer_norm": True, "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "classifier_proj_size": SIZE}  # fmt: skip
WHISPER = {key: value for key, value in SEQ2SEQ.items() if key != "max_position_embeddings"}


@dataclass(frozen=True)
class Architecture:
    """A classifier of transformers."""

    kind: str  # of model: encoder, decoder, encoder-decoder, vision or audio
    name: str  # that its classes begin with
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: str = "input_ids"
    task: str = "SequenceClassification"


ZOO = {
    architecture.name: architecture
    for architecture in (
        Architecture("encoder", "Bert", TEXT),
        Architecture("encoder", "Roberta", TEXT),
        Architecture(
            "encoder", "DistilBert", {**TEXT, "dim": SIZE, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
        ),
        Architecture("encoder", "Electra", {**TEXT, "embedding_size": 16}),
        Architecture("encoder", "DebertaV2", {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
        Architecture("encoder", "Albert", {**TEXT, "embedding_size": 16}),
        Architecture("encoder", "MPNet", TEXT),
        Architecture("encoder", "ModernBert", {**TEXT, "bos_token_id": 1, "eos_token_id": EOS}),
        Architecture("decoder", "GPT2", {**TEXT, "n_embd": SIZE, "n_layer": 2, "n_head": 4, "n_positions": 40,
                                           "bos_token_id": 1, "eos_token_id": EOS}),
        Architecture("decoder", "Llama", GROUPED),
        Architecture("decoder", "Qwen2", GROUPED),
        Architecture("decoder", "Mistral", GROUPED),
        Architecture("decoder", "GPTNeoX", TEXT),
        Architecture("decoder", "OPT", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": SIZE}),
        Architecture("encoder-decoder", "Bart", SEQ2SEQ),
        Architecture(
            "encoder-decoder", "T5",
            {"vocab_size": 40, "d_model": SIZE, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
             "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD},
        ),
        Architecture("vision", "ViT", VISION, "pixel_values", "ImageClassification"),
        Architecture(
            "vision", "Swin",
            {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
             "window_size": 4}, "pixel_values", "ImageClassification",
        ),
        Architecture("vision", "Dinov2", {**VISION, "mlp_ratio": 2}, "pixel_values", "ImageClassification"),
        Architecture("vision", "ConvNext", STAGES, "pixel_values", "ImageClassification"),
        Architecture(
            "vision", "ResNet", {"embedding_size": 16, "hidden_sizes": [16, SIZE], "depths": [1, 1]},
            "pixel_values", "ImageClassification",
        ),
        Architecture("audio", "Wav2Vec2", AUDIO, "input_values"),
        Architecture("audio", "Hubert", AUDIO, "input_values"),
        Architecture(
            "audio", "Whisper", {**WHISPER, "num_mel_bins": 16, "max_source_positions": 20},
            "input_features", "AudioClassification",
        ),
        Architecture(
            "audio", "AST", {**VISION, "num_mel_bins": 32, "max_length": 64}, "input_values", "AudioClassification"
        ),
    )
}  # fmt: skip


def build(name: str) -> nn.Module:
    """Return a classifier in evaluation mode, none of whose weights is constant."""
    import transformers

    of = ZOO[name]
    config = getattr(transformers, f"{name}Config")(**of.options, num_labels=CLASSES)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}For{of.task}")(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.eval()


def inputs(name: str, count: int, seed: int = 0) -> list[Tensor]:
    """Return inputs one by one, of several lengths if the model takes such."""
    of, generator = ZOO[name], torch.Generator().manual_seed(seed)

    def draw(i: int) -> Tensor:
        length = LENGTHS[i % len(LENGTHS)]
        if of.inputs == "input_ids":
            tokens = torch.randint(3, 40, (length,), generator=generator)
            return torch.cat([tokens, torch.tensor([EOS])])
        if of.inputs == "pixel_values":
            return torch.randn(3, 32, 32, generator=generator)
        if of.inputs == "input_values" and name != "AST":
            return torch.randn(100 * (length + 1), generator=generator)
        return torch.randn((64, 32) if name == "AST" else (16, 40), generator=generator)

    return [draw(i) for i in range(count)]


def batch(name: str, items: list[Tensor]) -> dict[str, Tensor]:
    """Return the batch that a collator of transformers makes of inputs: padded, with a mask of what is padding."""
    of = ZOO[name]
    if of.kind == "vision" or name in ("Whisper", "AST"):
        return {of.inputs: torch.stack(items)}
    padded = nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=PAD)
    mask = nn.utils.rnn.pad_sequence(
        [torch.ones(len(item), dtype=torch.int64) for item in items], batch_first=True
    )
    return {of.inputs: padded, "attention_mask": mask}


def check(name: str) -> dict[str, Any]:
    """Return what is found in a model, and how far inputs in a padded batch are from the same inputs alone.

    Differences are relative to the largest value.
    """
    model, items = build(name), inputs(name, 8)
    tap = fn.FeatureTap(model)
    together = tap.extract([{**batch(name, items), "labels": torch.arange(8) % CLASSES}])
    alone = fn.Features.cat([tap(batch(name, [item])) for item in items])
    with torch.no_grad():
        logits = model(**batch(name, items)).logits
    row: dict[str, Any] = {
        "labels": together.labels,
        "widths": {field: value.shape[1] for field, value in alone.fields()},
        "padded": {field: _difference(together.tensor(field), value) for field, value in alone.fields()},
        "logits": None if together.logits is None else _difference(together.logits, logits),
        "classifier": None,
    }
    if together.classifier is not None:
        weight, bias = together.linear()
        read = together.pooled if together.activation is None else together.activation
        row["classifier"] = _difference(read @ weight.T + (0 if bias is None else bias), logits)
    for detector in (fn.MSP(), fn.KNN(k=1), fn.NAN()):
        if detector.reads[0] in row["widths"]:
            scorer = fn.Scorer(model, detector).fit([batch(name, inputs(name, 16, seed=1))])
            scores = torch.cat([scorer(batch(name, [item])).score for item in items])
            row["padded"][repr(detector)] = _difference(scorer(batch(name, items)).score, scores)
    return row


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
