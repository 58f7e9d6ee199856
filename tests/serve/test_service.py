"""A detector over HTTP."""

import asyncio
import base64
import gzip
import io
import json
import logging
import math
import os
import re
import signal
import socket
import struct
import threading
import time
import urllib.error
import urllib.request
import warnings
import zlib
from itertools import chain, pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import featnorm as fn
import tiny_texts
from apart import first_lines_of, start
from asking import Asking, client_of, running, serve_what_never_returns, until
from featnorm.cli import serve
from featnorm.hidden import Why
from featnorm.inputs import SlicedSource, open_source
from featnorm.inputs.formats import FORMATS
from featnorm.inputs.kinds import IMAGES
from featnorm.scoring import score_source
from featnorm.serve import Limits, create_app, uploads
from featnorm.serve import app as service
from featnorm.serve.metrics import score_buckets
from featnorm.serve.requests import JsonLines
from featnorm.serve.responses import histogram, why_of
from featnorm.serve.scorers import ServedScorer
from featnorm.serve.server import bind
from hostile import chunk, hostile_files, huge_png
from narrow import command
from pages import Page
from painted import paint

TOKEN = "s3cret-t0ken"


@pytest.fixture
def client(scorer):
    with client_of(create_app(scorer)) as client:
        yield client


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Nine images and a broken one.

    None is in the calibration set: an image's score may differ by rounding from its own calibration score.
    """
    folder = tmp_path_factory.mktemp("new")
    random = np.random.default_rng(7)
    for i in range(9):
        paint(folder / f"{i}.png", i % 4, random)
    (folder / "broken.png").write_bytes(b"no")
    return folder


def png(value=200, size=32):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (value % 256, 20, 20)).save(file, "PNG")
    return file.getvalue()


def text(data):
    return base64.b64encode(data).decode()


def samples(metrics, scorer="default"):
    """The samples of a scorer in a page of metrics, by name and other labels."""
    return {
        (sample.name, *sorted(sample.labels.items() - {("scorer", scorer)})): sample.value
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.labels["scorer"] == scorer
    }


class Held:
    """Makes a scorer's model wait for the test, and records its batches."""

    def __init__(self, scorer):
        self.began = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.batches = []
        self.held = False
        inner = scorer.predict_batch

        def predict_batch(images, names, **how):
            if self.held:
                self.batches.append(list(names))
                self.began.release()
                assert self.go.acquire(timeout=30)
            return inner(images, names, **how)

        scorer.predict_batch = predict_batch

    async def begun(self):
        await until(lambda: self.began.acquire(blocking=False))


def test_every_form_of_body_gets_the_same_answer(client, new, fitted):
    source = SlicedSource(open_source(str(new)), range(5, 10), "five")
    rows = [row for batch in fitted.stream(source, runtime=fn.Runtime(workers=0)) for row in batch]
    files = [(new / row.item).read_bytes() for row in rows]
    whole = client.post("/v1/score", json={"images": [text(data) for data in files]})
    assert whole.status_code == 200
    results = whole.json()["results"]
    assert [result["name"] for result in results] == [f"image {i}" for i in range(1, 6)]
    assert list(results[0]) == [
        "name", "score", "p_value", "verdict", "predicted", "error", "group", "flagged_share", "boxes"
    ]  # fmt: skip
    for row, result in zip(rows, results, strict=True):
        assert result["error"] == row.error
        assert result["predicted"] == row.predicted
        if row.score is not None:
            assert result["score"] == pytest.approx(row.score, rel=1e-5)
            assert result["p_value"] == pytest.approx(row.p_value)
            assert result["verdict"] == ("ID" if row.is_id else "OOD")

    named = client.post("/v1/score", json={"images": [{"name": "one", "data": text(d)} for d in files]}).json()
    assert [result["name"] for result in named["results"]] == ["one"] * 5
    form = client.post("/v1/score", files=[("images", (f"\u96ea {i}.png", d)) for i, d in enumerate(files)]).json()
    assert [result["name"] for result in form["results"]] == [f"\u96ea {i}.png" for i in range(5)]
    for kind in ("image/png", "application/octet-stream", "image/anything; charset=utf-8"):
        one = client.post("/v1/score", content=files[1], headers={"content-type": kind}).json()
        form["results"].append(one["results"][0])
    for other, result in zip(
        [*named["results"], *form["results"]], [*results, *results, *[results[1]] * 3], strict=True
    ):
        assert other["error"] == result["error"]
        assert other["score"] == (result["score"] and pytest.approx(result["score"], rel=1e-5))


def test_an_unreadable_image_does_not_affect_the_others(client):
    images = [{"name": "\ud800", "data": "!"}, text(png()), text(b"no"), {"name": "", "data": text(huge_png())}]
    body = json.dumps({"images": images})
    answer = client.post("/v1/score", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    errors = [(result["name"], result["error"], result["score"] is None) for result in answer.json()["results"]]
    assert errors[0] == ("?", "the data is not base64", True)
    assert errors[1] == ("image 2", None, False)
    assert errors[2] == ("image 3", "not an image in a format that featnorm reads", True)
    assert errors[3][0] == "image 4"
    assert "exceeds limit" in errors[3][1]
    none = client.post("/v1/score", content=b"", headers={"content-type": "image/png"})
    assert none.status_code == 422
    assert none.json()["results"][0]["error"] == "an empty file"


def test_a_thousand_hostile_files(client):
    hostile = list(hostile_files(1000, png(size=64)))
    refused = scored = 0
    for first in range(0, 1000, 50):
        some = [*hostile[first : first + 50], ("good.png", png(first)), ("fine.png", png(7))]
        answer = client.post("/v1/score", files=[("images", file) for file in some])
        assert answer.status_code == 200
        results = answer.json()["results"]
        # A client escapes the quotes in a name.
        assert [result["name"] for result in results] == [name.replace('"', "%22") for name, _ in some]
        refused += sum(result["error"] is not None and result["verdict"] is None for result in results[:50])
        scored += sum(result["verdict"] is not None for result in results[50:])
    assert (refused, scored) == (1000, 40)


JSON = {"content-type": "application/json"}
FORM = {"content-type": "multipart/form-data; boundary=x"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        (b"x", {}, 415, "the content type is not given"),
        (b"x", {"content-type": "text/plain"}, 415, "the content type is text/plain"),
        (b"x", {"content-type": "video/mp4"}, 415, "score videos with `featnorm score SCORER VIDEOS`"),
        (b"{", JSON, 400, "not valid JSON"),
        (b"\xff\xfe", JSON, 400, "not valid JSON"),
        (b"[" * 5000, JSON, 400, "not valid JSON"),
        (b"[" * 10**6, JSON, 400, "more than 7,400 values"),
        (b'{"images": ' + b"9" * 10**5 + b"}", JSON, 400, "not valid JSON"),
        (b"[]", JSON, 400, "contains no list of images"),
        (b'{"images": "AAAA"}', JSON, 400, "contains no list of images"),
        (b'{"images": []}', JSON, 400, "contains no image"),
        (b'{"images": ["", 5]}', JSON, 400, "image 2 must be a base64 string"),
        (b'{"images": [{"name": 5, "data": ""}]}', JSON, 400, "image 1 must be a base64 string"),
        (b'{"images": [' + b'"",' * 64 + b'""]}', JSON, 413, "more than 64 images"),
        (b"", FORM, 400, "contains no image"),
        (b"x", {"content-type": "multipart/form-data"}, 400, "boundary"),
        (b"--x\r\n\r\n", FORM, 400, "the form cannot be read"),
        (b"--x--\r\n", FORM, 400, "contains no image"),
        (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--x--\r\n', FORM, 400, "'a', is not a"),
        (
            b'--x\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nb\r\n' * 65 + b"--x--\r\n",
            FORM,
            413,
            "more than 64 images",
        ),
        (b"--x\r\nA: " + b"b" * 10**5, FORM, 400, "the form cannot be read"),
        (b"x" * (16 * 2**20 + 1), {"content-type": "image/png"}, 413, "longer than 16,777,216 bytes"),
    ],
)  # fmt: skip
def test_invalid_bodies(client, body, headers, status, words):
    answer = client.post("/v1/score", content=body, headers=headers)
    assert answer.status_code == status
    assert words in answer.json()["error"]
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_other_invalid_requests(client):
    for method, path, status, words in (
        ("GET", "/v1/score", 405, "Method Not Allowed"),
        ("GET", "/nothing", 404, "use /v1/NAME/score, with NAME one of default"),
        ("GET", "/docs", 404, "use /v1/NAME/score, with NAME one of default"),
        ("POST", "/v1/score?explain=perhaps", 400, "explain: Input should be a valid boolean"),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert words in answer.json()["error"]


def test_limits_of_an_image_and_invalid_limits(scorer):
    with client_of(create_app(scorer, Limits(pixels=1000))) as client:
        results = client.post("/v1/score", json={"images": [text(png(size=32)), text(png(size=31))]}).json()[
            "results"
        ]
    assert results[0]["error"] == "32 x 32 pixels are more than 1,000"
    assert results[1]["score"] is not None
    for wrong, words in (
        ({"inputs": 300}, "the queue only 256"),
        ({"seconds": math.nan}, "seconds is nan"),
        ({"queue": 0}, "queue is 0"),
        ({"pixels": 10**9}, "Pillow itself rejects"),
        ({"queue_pixels": 10**6}, "the queue only 1000000"),
    ):
        with pytest.raises(ValueError, match=words):
            Limits(**wrong)
    with pytest.raises(ValueError, match="printable ASCII"):
        create_app(scorer, token="two words")


def test_images_are_read_as_in_a_folder(client):
    """Images of every format are read, and a rotated one is scored upright."""
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    exif = Image.Exif()
    exif[274] = 6
    bodies = {form: io.BytesIO() for form in (*FORMATS, "turned")}
    for form in FORMATS:
        picture.save(bodies[form], form)
    picture.transpose(Image.Transpose.ROTATE_90).save(bodies["turned"], "PNG", exif=exif)
    scores = {}
    for form, body in bodies.items():
        answer = client.post("/v1/score", content=body.getvalue(), headers={"content-type": "image/any"})
        assert answer.status_code == 200, form
        scores[form] = answer.json()["results"][0]["score"]
    assert scores["turned"] == scores["PNG"] == scores["BMP"]


def test_formats_that_run_programs_are_not_read(client):
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    answer = client.post("/v1/score", content=eps, headers={"content-type": "image/png"})
    assert answer.json()["results"][0]["error"] == "PostScript is a program, and is not run: save it as PNG"


@pytest.mark.parametrize(
    "written",
    [
        lambda data: data,
        lambda data: data + "\n",
        lambda data: "\r\n".join(data[i : i + 76] for i in range(0, len(data), 76)),
        lambda data: data.rstrip("="),
        lambda data: data.replace("+", "-").replace("/", "_"),
        lambda data: data.replace("+", "-").replace("/", "_").rstrip("="),
        lambda data: f"data:image/png;base64,{data}",
        lambda data: f" DATA:;BASE64,{data}\n",
    ],
    ids=["plain", "newline", "lines", "unpadded", "url-safe", "url-safe, unpadded", "data URL", "bare data URL"],
)
def test_every_form_of_base64_is_read(client, written):
    # With both characters that differ between the alphabets, and padding.
    data = next(data for data in map(text, map(png, range(256))) if {"+", "/", "="} <= {*data})
    answer = client.post("/v1/score", json={"images": [written(data)]})
    assert answer.status_code == 200
    assert answer.json()["results"][0]["score"] is not None


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("A", "not base64"),
        ("AAAA=AAA", "not base64"),
        ("AAAA====", "not base64"),
        ("AA AA!", "not base64"),
        ("\u00e4AAA", "not base64"),
        ("data:image/png,AAAA", "the data: URL is not base64-encoded"),
        ("data:image/png;base64;AAAA", "the data: URL is not base64-encoded"),
        ("data:image/png;base64,!", "not base64"),
    ],
)
def test_invalid_base64(client, written, words):
    answer = client.post("/v1/score", json={"images": [written]})
    assert answer.status_code == 422
    assert words in answer.json()["results"][0]["error"]


def test_a_compressed_body_is_rejected(client):
    for coding in ("gzip", "br", "identity, gzip"):
        headers = {"content-type": "image/png", "content-encoding": coding}
        answer = client.post("/v1/score", content=gzip.compress(png()), headers=headers)
        assert answer.status_code == 415
        assert f"the content encoding is {coding}: send the body as it is" in answer.json()["error"]
        assert answer.headers["accept-encoding"] == "identity"
    headers["content-encoding"] = "identity"
    assert client.post("/v1/score", content=png(), headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/", "/metrics", "/v1/detector", "/v1/scorers"])
def test_head_answers_as_get_does(client, path):
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.headers["content-type"] == get.headers["content-type"]


def test_the_name_of_a_file_may_be_encoded(client):
    body = (
        b"--x\r\nContent-Disposition: form-data; name=\"images\"; filename*=UTF-8''%E9%9B%AA.png\r\n\r\n"
        + png()
        + b"\r\n--x--\r\n"
    )
    answer = client.post("/v1/score", content=body, headers=FORM)
    assert answer.status_code == 200
    assert [result["name"] for result in answer.json()["results"]] == ["\u96ea.png"]


def flood(before, part, after):
    return before + part * (2**20 // len(part)) + after


def test_a_header_of_a_million_parts_is_not_read(client):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "JPEG")
    jpeg, image = buffer.getvalue(), png()
    floods = [
        flood(image[:33], chunk(b"prVt", b""), image[33:]),
        flood(jpeg[:2], b"\xff\xfe\x00\x02", jpeg[2:]),
        flood(jpeg[:2], b"\xff", jpeg[2:]),
        flood(b"P6\n", b"#\n", b"1 1\n255\nabc"),
        flood(b"GIF89a\1\0\1\0\0\0\0", b"!\xfe\0", b";"),
    ]
    files = [("images", ("a", data)) for data in [*floods, jpeg]]
    results = client.post("/v1/score", files=files).json()["results"]
    assert [result["error"] for result in results] == ["the header of the image has too many parts"] * len(
        floods
    ) + [None]


def bomb(side=7000):
    """An image of many pixels in few bytes."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((side // 8 + 1) * side), 9)
    end = chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


class HeldDecoding:
    """Makes the transform of large images wait for the test."""

    def __init__(self, scorer):
        self.begun = 0
        self.go = threading.Semaphore(0)
        inner = scorer.preprocess

        def transform(image):
            if image.width > 256:  # not the image of the warm-up
                self.begun += 1
                assert self.go.acquire(timeout=30)
                image = image.resize((32, 32))
            return inner(image)

        scorer._preprocess = (transform,)


def test_a_small_image_does_not_wait_for_bombs(scorer):
    async def main():
        held = HeldDecoding(scorer)
        large = bomb()
        async with running(create_app(scorer)) as app:
            bombs = [Asking(app).say(large) for _ in range(60)]
            await until(lambda: held.begun == 1 and sum(asking.task.done() for asking in bombs) == 44)
            assert (await Asking(app).say(png()).answer())[0] == 200
            # One is decoded, 15 are pending, and the rest is rejected.
            answers = [await asking.answer() for asking in bombs if asking.task.done()]
            assert {(status, headers["retry-after"]) for status, headers, _ in answers} == {(503, "1")}
            assert answers[0][2]["error"] == "784,000,000 pixels are already in the queue: try again later"
            assert held.begun == 1
            for asking in bombs:
                asking.leave()
            held.go.release()
            await until(lambda: all(asking.task.done() for asking in bombs))
            held.go.release()
            assert (await Asking(app).say(large).answer())[0] == 200

    asyncio.run(main())


class HeldHeaders:
    """Makes the reading of headers wait for the test, and records its order."""

    def __init__(self, monkeypatch):
        self.read = []
        self.go = threading.Semaphore(0)

        def measured(data, decoding_cost=uploads.decoding_cost):
            self.read.append(data)
            assert self.go.acquire(timeout=30)
            return decoding_cost(data)

        monkeypatch.setattr(uploads, "decoding_cost", measured)


def test_a_request_whose_client_disconnected_is_not_parsed(scorer, monkeypatch):
    first, second, third = png(1), png(2), png(3)

    async def main():
        async with running(create_app(scorer)) as app:
            held = HeldHeaders(monkeypatch)
            two = {"images": [text(first), text(second)]}
            gone = Asking(app, content_type="application/json").say(json.dumps(two).encode())
            await until(lambda: held.read == [first])
            never = Asking(app).say(second)
            await asyncio.sleep(0.01)
            for asking in (gone, never):
                asking.leave()
                await asking.task  # although the thread is not done
                assert not asking._sent
            held.go.release(2)
            assert (await Asking(app).say(third).answer())[0] == 200
            assert held.read == [first, third]

    asyncio.run(main())


def test_parsing_counts_for_the_time_limit(scorer, monkeypatch):
    async def main():
        async with running(create_app(scorer, Limits(seconds=0.3))) as app:
            held = HeldHeaders(monkeypatch)
            status, headers, content = await Asking(app).say(png()).answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert "the inputs were not scored within 0.3 seconds" in content["error"]
            held.go.release()

    asyncio.run(main())


def test_a_small_request_overtakes_the_headers_of_a_large_one(scorer, monkeypatch):
    many, one = [png(i) for i in range(5)], png(9)

    async def main():
        async with running(create_app(scorer)) as app:
            held = HeldHeaders(monkeypatch)
            body = json.dumps({"images": [text(data) for data in many]}).encode()
            large = Asking(app, content_type="application/json").say(body)
            await until(lambda: len(held.read) == 1)
            small = Asking(app).say(one)
            await asyncio.sleep(0.01)
            held.go.release(6)
            assert [(await asking.answer())[0] for asking in (large, small)] == [200, 200]
            assert held.read.index(one) < held.read.index(many[-1])

    asyncio.run(main())


def test_a_small_image_does_not_wait_for_all_images_of_a_large_request(scorer, batchers):
    async def main():
        held = HeldDecoding(scorer)
        many = json.dumps({"images": [text(bomb(3000))] * 6}).encode()  # each estimated at 0.9 s
        async with running(create_app(scorer)) as app:
            large = Asking(app, content_type="application/json").say(many)
            await until(lambda: held.begun == 2)
            dues = sorted(job.due for heap in batchers[0]._decoders._waiting.values() for job in heap)
            assert [b - a for a, b in pairwise(dues)] == pytest.approx([0.9] * 3, abs=0.1)
            held.go.release(6)
            assert (await large.answer())[0] == 200

    asyncio.run(main())


def test_a_request_of_too_many_pixels(scorer):
    limits = Limits(pixels=2000, queue_pixels=20_000)
    with client_of(create_app(scorer, limits)) as client:
        many = {"images": [text(png(size=40))] * 13}
        answer = client.post("/v1/score", json=many)
        assert answer.status_code == 413
        assert (
            answer.json()["error"] == "the images count as 20,800 pixels, more than 20,000: send them one by one"
        )
        two = {"images": [text(png(size=40)), text(png(size=100))]}
        results = client.post("/v1/score", json=two).json()["results"]
        assert results[0]["error"] is None
        assert results[1]["error"] == "100 x 100 pixels are more than 2,000"


def test_a_body_without_the_token_is_not_read(scorer):
    async def main():
        async with running(create_app(scorer, token=TOKEN)) as app:
            asking = Asking(app).say(b"x", more=True)
            status, headers, _ = await asking.answer()
            assert (status, headers["connection"]) == (401, "close")
            assert asking._inbox.qsize() == 1

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/nothing"])
def test_a_response_does_not_wait_for_a_body_that_is_not_read(scorer, path):
    async def main():
        async with running(create_app(scorer, Limits(seconds=1000))) as app:
            asking = Asking(app, method="GET", path=path).say(b"x", more=True)
            _, headers, _ = await asking.answer()
            assert headers["connection"] == "close"

    asyncio.run(main())


def test_a_body_is_limited_while_it_is_received(scorer):
    async def main():
        async with running(create_app(scorer, Limits(body_bytes=100, seconds=5))) as app:
            # No length, or a wrong one.
            for headers in ({}, {"content_length": "5"}, {"content_length": "-1"}, {"content_length": "\u0663"}):
                asking = Asking(app, **headers).say(b"x" * 60, more=True).say(b"x" * 41, more=True).say(b"")
                status, headers, content = await asking.answer()
                assert (status, content["error"]) == (413, "the body is longer than 100 bytes")
                assert "connection" not in headers  # the rest of it was read
            asking = Asking(app, content_length="101", expect="100-continue")
            status, headers, _ = await asking.answer()  # before the body is sent
            assert (status, headers["connection"]) == (413, "close")
            asking = Asking(app)
            for _ in range(50):
                asking.say(b"x" * 100, more=True)
            status, headers, _ = await asking.answer()  # an endless body
            assert (status, headers["connection"]) == (413, "close")

            many = [Asking(app).say(b"x" * 100, more=True) for _ in range(16)]
            await asyncio.sleep(0)
            # The request that has been incomplete for longest is rejected.
            for asking in many[:2]:
                assert (await Asking(app).say(b"x" * 99).answer())[0] == 422
                status, headers, content = await asking.answer()
                assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
                assert "at its memory limit" in content["error"]
                many.append(Asking(app).say(b"x" * 100, more=True))
                await asyncio.sleep(0)
            for asking in many[2:]:
                asking.leave()
            await asyncio.gather(*(asking.task for asking in many))
            assert (await Asking(app).say(b"x").answer())[0] == 422

    asyncio.run(main())


def test_a_slow_sender_times_out(scorer):
    async def main():
        async with running(create_app(scorer, Limits(seconds=0.1))) as app:
            status, headers, content = await Asking(app).say(b"x", more=True).answer()
            assert (status, headers["connection"]) == (408, "close")
            assert content["error"] == "the request body did not arrive within 0.1 seconds"

    asyncio.run(main())


def test_a_slow_model_times_out(scorer):
    async def main():
        held = Held(scorer)
        async with running(create_app(scorer, Limits(seconds=0.3, batch_size=1))) as app:
            held.held = True
            status, headers, content = await Asking(app).say(png()).answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert "the inputs were not scored within 0.3 seconds" in content["error"]
            held.held = False
            held.go.release()
            assert (await Asking(app).say(png()).answer())[0] == 200

    asyncio.run(main())


def waiting(app):
    """The number of pending images, from the metrics."""

    async def ask():
        asking = Asking(app, method="GET", path="/metrics").say(b"")
        await asking.task
        return samples(asking._sent[1]["body"].decode())[("featnorm_queue_inputs",)]

    return ask()


async def until_waiting(app, n):
    while await waiting(app) != n:
        await asyncio.sleep(0.002)


@pytest.fixture
def batchers(monkeypatch):
    """The batchers of the applications that a test creates."""
    made = []

    class Known(service.Batcher):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(service, "Batcher", Known)
    return made


def ready(batcher):
    """The number of images that wait for the model only."""
    return sum(map(len, batcher._ready.values()))


def test_batched_requests_get_the_same_results_as_single_ones(scorer, new, batchers):
    images = [(new / f"{i}.png").read_bytes() for i in range(9)]

    async def main():
        held = Held(scorer)
        async with running(create_app(scorer, Limits(batch_size=6))) as app:
            alone = [(await Asking(app).say(data).answer())[2]["results"][0] for data in images]
            held.held = True
            first = Asking(app).say(images[0])
            await held.begun()
            others = [Asking(app).say(data) for data in images[1:]]
            await until(lambda: ready(batchers[0]) == 8)
            assert await waiting(app) == 8
            held.go.release(3)
            answers = [await asking.answer() for asking in (first, *others)]
            assert [len(batch) for batch in held.batches] == [1, 6, 2]
            assert await waiting(app) == 0
        for (status, _, content), wanted in zip(answers, alone, strict=True):
            assert status == 200
            (result,) = content["results"]
            assert result["score"] == pytest.approx(wanted["score"], rel=1e-5)
            assert {**result, "score": 0} == {**wanted, "score": 0}

    asyncio.run(main())


def test_a_full_queue_rejects_requests(scorer):
    async def main():
        held = Held(scorer)
        two = json.dumps({"images": [text(png()), text(png())]}).encode()
        async with running(create_app(scorer, Limits(queue=4, inputs=2, batch_size=1))) as app:
            held.held = True
            first = Asking(app).say(png())
            await held.begun()
            others = [Asking(app, content_type="application/json").say(two) for _ in range(2)]
            await until_waiting(app, 4)
            status, headers, content = await Asking(app).say(png()).answer()
            assert (status, headers["retry-after"]) == (503, "1")
            assert content["error"] == "4 inputs are already in the queue: try again later"
            held.go.release(5)
            for asking in (first, *others):
                assert (await asking.answer())[0] == 200

    asyncio.run(main())


def test_the_work_of_a_disconnected_client_is_dropped(scorer, caplog):
    caplog.set_level(logging.INFO, "featnorm.serve")

    async def main():
        held = Held(scorer)
        async with running(create_app(scorer, Limits(batch_size=1))) as app:
            held.held = True
            first = Asking(app).say(png())
            await held.begun()
            gone = Asking(app, x_request_id="gone").say(png())
            await until_waiting(app, 1)
            gone.leave()
            await gone.task
            assert not gone._sent
            assert await waiting(app) == 0
            halfway = Asking(app).say(b"x", more=True).leave()
            await halfway.task
            held.go.release(2)
            assert (await first.answer())[0] == 200
            assert (await Asking(app).say(png()).answer())[0] == 200
            assert len(held.batches) == 2

    asyncio.run(main())
    assert [line["status"] for line in lines(caplog) if line.get("request_id") == "gone"] == [499]


def test_an_image_that_the_model_fails_on_does_not_affect_the_others(scorer, batchers, caplog):
    async def main():
        held = Held(scorer)
        inner = scorer.predict_batch

        def predict_batch(images, names, **how):
            if "broken" in names:
                raise RuntimeError("a secret of the inside")
            return inner(images.where(images.mean((1, 2, 3), keepdim=True) < 0.7, torch.nan), names, **how)

        async with running(create_app(scorer, Limits(batch_size=4))) as app:
            scorer.predict_batch = predict_batch
            held.held = True
            first = Asking(app).say(png())
            await held.begun()
            held.held = False
            white = io.BytesIO()
            Image.new("RGB", (32, 32), "white").save(white, "PNG")
            images = {"images": [text(png(90)), text(white.getvalue())]}
            pair = Asking(app, content_type="application/json").say(json.dumps(images).encode())
            broken = {"images": [{"name": "broken", "data": text(png())}]}
            failing = Asking(app, content_type="application/json", x_request_id="me").say(
                json.dumps(broken).encode()
            )
            await until(lambda: ready(batchers[0]) == 3)
            held.go.release()
            assert (await first.answer())[0] == 200
            status, _, content = await pair.answer()
            assert status == 200
            assert content["results"][0]["score"] is not None
            assert "not finite" in content["results"][1]["error"]
            status, headers, content = await failing.answer()
            assert (status, headers["x-request-id"]) == (500, "me")
            assert content == {
                "error": "internal error: see the log of the service at this request id",
                "request_id": "me",
            }
            assert (await Asking(app).say(png()).answer())[0] == 200

    asyncio.run(main())
    (line,) = [line for line in lines(caplog) if "traceback" in line]
    assert "a secret of the inside" in line["traceback"]
    assert line["request_id"] == "me"


def test_a_transform_that_fails(scorer):
    inner = scorer.preprocess

    def transform(image):
        if image.size == (1, 1):
            raise ZeroDivisionError("inside")
        return inner(image)

    scorer._preprocess = (transform,)
    with client_of(create_app(scorer)) as client:
        results = client.post("/v1/score", json={"images": [text(png(size=1)), text(png())]}).json()["results"]
    assert [result["error"] for result in results] == ["the transform failed on this image", None]


def lines(caplog):
    formatter = JsonLines()
    return [json.loads(formatter.format(record)) for record in caplog.records if record.name == "featnorm.serve"]


def test_the_log_has_one_line_per_request(client, caplog):
    caplog.set_level(logging.INFO, "featnorm.serve")
    given = {"x-request-id": "abc-1"}
    answer = client.post("/v1/score", json={"images": [text(png()), "!"]}, headers=given)
    assert answer.headers["x-request-id"] == "abc-1"
    (line,) = lines(caplog)
    assert set(line) == {
        "time", "level", "message", "method", "route", "scorer", "status", "milliseconds", "inputs", "flagged",
        "unreadable", "request_id",
    }  # fmt: skip
    assert (line["route"], line["status"], line["inputs"], line["unreadable"]) == ("/v1/score", 200, 2, 1)
    caplog.clear()
    for bad in ("x" * 65, "a b", ""):
        assert re.fullmatch(
            r"[0-9a-f]{32}", client.get("/x%0Ay", headers={"x-request-id": bad}).headers["x-request-id"]
        )
    assert {line["route"] for line in lines(caplog)} == {"none"}


def test_a_token_is_required(scorer, caplog):
    caplog.set_level(logging.DEBUG)
    with TestClient(create_app(scorer, token=TOKEN)) as client:
        routes = (
            ("POST", "/v1/score"), ("POST", "/v1/default/score"), ("POST", "/v1/none/score"),
            ("GET", "/v1/detector"), ("GET", "/v1/default/detector"), ("GET", "/v1/scorers"), ("GET", "/metrics"),
        )  # fmt: skip
        for method, path in routes:
            for headers in ({}, {"authorization": "Bearer other"}, {"authorization": f"Basic {TOKEN}x"},
                            {"authorization": "Bearer \xe9"}, {"authorization": TOKEN}):  # fmt: skip
                encoded = {name: value.encode("latin-1") for name, value in headers.items()}
                answer = client.request(method, path, headers=encoded)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        allowed = {"authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/detector", headers=allowed).status_code == 200
        assert client.get("/metrics", headers=allowed).status_code == 200
        answer = client.post("/v1/score", content=png(), headers={"content-type": "image/png", **allowed})
        assert answer.status_code == 200
        assert client.get("/healthz").status_code == client.get("/readyz").status_code == 200
        page = client.get("/")
        assert page.status_code == 200
        assert "NAN" not in page.text
        schema = client.get("/openapi.json").json()
        assert schema["paths"]["/v1/score"]["post"]["security"] == [{"HTTPBearer": []}]
    assert TOKEN not in caplog.text


def test_metrics_count(scorer):
    with client_of(create_app(scorer)) as client, client_of(create_app(scorer)) as other:
        assert math.isnan(samples(client.get("/metrics").text)[("featnorm_flagged_share",)])
        batch = [text(png()), text(png(10)), "!"]
        results = client.post("/v1/score", json={"images": batch}).json()["results"]
        results += client.post("/v1/score", content=png(), headers={"content-type": "image/png"}).json()["results"]
        client.post("/v1/score", content=b"", headers={"content-type": "text/plain"})
        found = samples(client.get("/metrics").text)
        verdicts = [result["verdict"] for result in results]
        for verdict, count in (("ID", verdicts.count("ID")), ("OOD", verdicts.count("OOD")), ("unreadable", 1)):
            assert found[("featnorm_inputs_total", ("verdict", verdict))] == count
        assert found[("featnorm_flagged_share",)] == pytest.approx(verdicts.count("OOD") / 3)
        assert found[("featnorm_score_count",)] == 3
        scores = [result["score"] for result in results if result["score"] is not None]
        assert found[("featnorm_score_sum",)] == pytest.approx(sum(scores))
        assert found[("featnorm_queue_inputs",)] == 0
        for status, count in (("200", 2), ("415", 1)):
            labels = (("route", "/v1/score"), ("status", status))
            assert found[("featnorm_request_seconds_count", *labels)] == count
        for name, value in found.items():
            if name[0] == "featnorm_score_bucket":
                assert value == sum(score <= float(dict(name[1:])["le"]) for score in scores)
        # The image of the warm-up counts as a batch, but for no request.
        assert found[("featnorm_batch_inputs_sum",)] == 4
        assert samples(other.get("/metrics").text)[("featnorm_inputs_total", ("verdict", "ID"))] == 0


def test_infinite_scores(scorer):
    inner = scorer.predict_batch

    def predict_batch(images, names, **how):
        above = {"image 1": True, "image 2": False}
        return [
            verdict._replace(score=math.inf if above[verdict.item] else -math.inf, is_id=above[verdict.item])
            for verdict in inner(images, names, **how)
        ]

    with client_of(create_app(scorer)) as client:
        scorer.predict_batch = predict_batch
        results = client.post("/v1/score", json={"images": [text(png()), text(png(9))]}).json()["results"]
        assert [(r["score"], r["verdict"], r["error"]) for r in results] == [
            (None, "ID", None),
            (None, "OOD", None),
        ]
        found = samples(client.get("/metrics").text)
        assert found[("featnorm_score_count",)] == 2
        assert math.isfinite(found[("featnorm_score_sum",)])
        (lowest,) = [v for k, v in found.items() if k[0] == "featnorm_score_bucket" and float(dict(k[1:])["le"])
                     == score_buckets(scorer.calibration.scores)[0]]  # fmt: skip
        assert lowest == 1


@pytest.mark.parametrize(
    "scores", [[1.0] * 30, [math.inf] * 20, [-math.inf, 0.0, math.inf] * 9, [1e300, -1e300] * 10, list(range(99))]
)
def test_buckets_and_histogram_of_any_scores(scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    buckets = score_buckets(scores)
    assert buckets
    assert all(map(math.isfinite, buckets))
    assert all(a < b for a, b in pairwise(buckets))
    for threshold in (-math.inf, 0.0, 50.0):
        counts = histogram(scores, [threshold])
        assert sum(counts.counts) == len(scores)
        assert len(counts.edges) == len(counts.counts) + 1
        assert np.isfinite(counts.edges).all()
        assert (np.diff(counts.edges) > 0).all()
        assert not math.isfinite(threshold) or counts.edges[0] <= threshold <= counts.edges[-1]


def test_readiness(scorer):
    async def status(app, path):
        return (await Asking(app, method="GET", path=path).say(b"").answer())[0]

    async def main():
        held = Held(scorer)
        held.held = True
        app = create_app(scorer)
        async with app.router.lifespan_context(app):
            await held.begun()
            assert await status(app, "/healthz") == 200
            assert await status(app, "/readyz") == 503
            held.held = False
            held.go.release()
            while await status(app, "/readyz") != 200:
                await asyncio.sleep(0.002)
        assert await status(app, "/readyz") == 503

    asyncio.run(main())


def test_detector_route(client, scorer):
    detector = client.get("/v1/detector").json()
    calibration = scorer.calibration
    assert detector["detector"] == "NAN()"
    assert detector["classes"] == ["a", "b", "c", "d"]
    assert detector["threshold"] == float(calibration.threshold)
    assert detector["tpr"] == 0.95
    assert detector["facts"] == scorer.facts
    assert sum(detector["calibration"]["counts"]) == len(calibration.scores)
    assert detector["limits"]["inputs"] == 64
    assert detector["explains"] is True


def test_explanations(client, scorer):
    plain = client.post("/v1/score", json={"images": [text(png())]}).json()["results"][0]
    answer = client.post("/v1/score?explain=true", json={"images": [text(png()), "!"]}).json()["results"]
    assert "why" not in plain
    assert answer[0]["why"]["units"][0] == ["the network predicts", plain["predicted"]]
    assert answer[1]["why"] is None
    scorer.statistics = scorer.examples = None
    with client_of(create_app(scorer)) as other:
        assert other.get("/v1/detector").json()["explains"] is False
        answer = other.post("/v1/score?explain=true", json={"images": [text(png())]})
        assert answer.status_code == 400
        assert "fit it again" in answer.json()["error"]


def drawn(uri):
    """The picture in a data URL."""
    assert re.fullmatch("data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+", uri)
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture
def halved(scorer):
    """A scorer that flags some of the images of `new`."""
    scorer.calibration = scorer.calibration.with_tpr(0.5)
    return scorer


def explained(client, images):
    """The results for some images and their explanations."""
    answer = client.post("/v1/score?explain=true", json={"images": [text(image) for image in images]})
    assert answer.status_code == 200
    return [(result, result.pop("why")) for result in answer.json()["results"]]


def test_the_lowest_flagged_images_have_pictures(halved, new):
    images = [(new / f"{i}.png").read_bytes() for i in range(9)] * 3
    with client_of(create_app(halved)) as client:
        plain = client.post("/v1/score", json={"images": [text(image) for image in images]}).json()["results"]
        found = explained(client, images)
        counted = samples(client.get("/metrics").text)
    for (result, _), one in zip(found, plain, strict=True):
        assert result == {**one, "score": pytest.approx(one["score"], rel=1e-5)}
    assert counted[("featnorm_score_count",)] == 2 * len(images), "an explanation is not another image"
    flagged = [i for i, (one, _) in enumerate(found) if one["verdict"] == "OOD"]
    flagged.sort(key=lambda i: found[i][0]["score"])
    assert 8 < len(flagged) < len(images) - 8
    pictured = [i for i, (_, why) in enumerate(found) if why["heat"] is not None]
    assert pictured == sorted(flagged[:8])
    verdicts = halved.predict([Image.open(io.BytesIO(image)) for image in images[:9]], explain=True)
    for i, (_, why) in enumerate(found):
        expected = verdicts[i % 9].why
        assert [tuple(row) for row in why["units"]] == expected.units.rows()
        assert why["terms"] == expected.terms == []
        for one, neighbor in zip(why["nearest"], expected.nearest, strict=True):
            assert (one["label"], one["similarity"]) == (
                neighbor.label,
                pytest.approx(neighbor.similarity, abs=1e-5),
            )
            assert (one["thumbnail"] is not None) == (i in pictured)
            if i in pictured:
                assert np.array_equal(drawn(one["thumbnail"]), neighbor.image())
        if i in pictured:
            assert why["no_heat"] is None
            assert why["heat"]["reference"] == "the most similar images"
            assert drawn(why["heat"]["picture"]).size == (96, 96)
        elif i in flagged:
            assert why["no_heat"] == "only the 8 flagged images of a request with the lowest scores have one"
        else:
            assert why["no_heat"] is None


def test_the_heat_map_of_the_service_is_that_of_the_page_of_scores(halved, new, tmp_path):
    with client_of(create_app(halved)) as client:
        found = explained(client, [(new / f"{i}.png").read_bytes() for i in range(9)])
    score_source(halved, open_source(str(new)), page=tmp_path / "page.html", runtime=fn.Runtime(workers=0))
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    on_page = {kind: set() for kind in "tme"}
    for tag, attrs in page.attributes:
        if tag == "image":
            on_page[attrs["id"][0]].add(attrs["href"])
    assert {one["thumbnail"] for _, why in found for one in why["nearest"]} - {None} <= on_page["e"]
    maps = [np.asarray(drawn(uri), np.float64) for uri in on_page["m"]]
    heat = [np.asarray(drawn(why["heat"]["picture"]), np.float64) for _, why in found if why["heat"] is not None]
    assert len(heat) > 1
    for one in heat:  # in another batch, a score differs in its last digits
        distances = sorted(np.abs(one - other).mean() for other in maps)
        assert distances[0] < 1 < distances[1]


def test_what_has_no_pictures_says_why(halved, new, caplog):
    images = [(new / f"{i}.png").read_bytes() for i in range(9)]
    halved.examples.thumbnails = None
    halved.detector = fn.Views(fn.NAN())
    with client_of(create_app(halved)) as client:
        found = explained(client, images)
        flagged = [why for result, why in found if result["verdict"] == "OOD"]
        assert flagged
        for why in flagged:
            assert why["heat"] is None
            assert "runs the model on changed inputs" in why["no_heat"]
            assert [one["thumbnail"] for one in why["nearest"]] == [None] * 3
        halved.examples = None
        assert all(why["nearest"] == [] for _, why in explained(client, images))

        inner = halved.predict_batch

        def predict_batch(images, names, *, heat=False, **how):
            if heat:
                raise RuntimeError("a secret of the inside")
            return inner(images, names, **how)

        halved.predict_batch = predict_batch
        found = explained(client, images)
    for result, why in found:
        assert why["no_heat"] == (
            "an internal error: see the log of the service" if result["verdict"] == "OOD" else None
        )
    assert "a secret of the inside" in caplog.text


def test_the_first_explanation_is_made_before_the_service_is_ready(
    scorer, caplog, monkeypatch, warm_up_explanations
):
    """It takes seconds; if it fails, images are scored all the same."""
    monkeypatch.setattr(ServedScorer, "warm_up_explanations", warm_up_explanations)
    explained = []
    inner = scorer.predict_batch

    def predict_batch(images, names, *, heat=False, **how):
        if heat:
            explained.append(names)
            raise RuntimeError("a secret of the inside")
        return inner(images, names, **how)

    scorer.predict_batch = predict_batch
    with client_of(create_app(scorer)):
        assert explained == [["warm-up"]]
    assert "an explanation failed" in caplog.text


class HeldHeat(Held):
    """Makes explanations with pictures, and images named "other", wait for the test. All images are flagged."""

    def __init__(self, scorer):
        super().__init__(scorer)
        held = scorer.predict_batch

        def predict_batch(images, names, *, heat=False, **how):
            self.held = names != ["warm-up"] and (heat or names[0].startswith("other"))
            found = held(images, [f"heat of {name}" for name in names] if heat else names, heat=heat, **how)
            return [verdict._replace(is_id=False) for verdict in found]

        scorer.predict_batch = predict_batch


def several(app, n, name="image", explain=True):
    images = [{"name": f"{name} {i}", "data": text(png(i))} for i in range(n)]
    asking = Asking(app, path=f"/v1/score?explain={explain}", content_type="application/json")
    return asking.say(json.dumps({"images": images}).encode())


def test_explanations_of_one_client_do_not_hold_the_others(scorer, batchers):
    """Few images are explained at a time, and the images of others are scored between two batches of them."""

    async def main():
        held = HeldHeat(scorer)
        async with running(create_app(scorer, Limits(batch_size=16))) as app:
            asking = several(app, 8)
            await held.begun()
            assert await waiting(app) == 6
            others = several(app, 2, "other", explain=False)
            await until(lambda: ready(batchers[0]) == 8)
            held.go.release(5)
            assert [(await one.answer())[0] for one in (asking, others)] == [200, 200]
            assert await waiting(app) == 0
        assert [*map(len, held.batches)] == [2, 2, 2, 2, 2]
        assert sorted(held.batches.pop(2)) == ["other 0", "other 1"]
        assert sorted(chain(*held.batches)) == [f"heat of image {i}" for i in range(8)]

    asyncio.run(main())


def test_the_queue_limits_explanations_and_the_verdicts_remain(scorer, batchers):
    async def main():
        held = HeldHeat(scorer)
        async with running(create_app(scorer, Limits(queue=8, inputs=8, batch_size=15))) as app:
            first = several(app, 6)
            await held.begun()  # the first explanation; five wait
            status, _, content = await several(app, 4).answer()
            assert (status, content["error"]) == (503, "5 inputs are already in the queue: try again later")
            others = several(app, 2, "other")
            await until(lambda: ready(batchers[0]) == 7)
            for _ in range(2):  # the second explanation, and the others
                held.go.release()
                await held.begun()
            plain = several(app, 4, explain=False)
            await until(lambda: ready(batchers[0]) == 8)
            held.go.release(6)
            for asking in (first, others, plain):
                status, _, content = await asking.answer()
                assert status == 200
                whys = [result.get("why") for result in content["results"]]
                if asking is first:
                    assert all(why["heat"] for why in whys)
                elif asking is others:
                    assert [(why["heat"], why["no_heat"]) for why in whys] == [(None, "the service is busy")] * 2

    asyncio.run(main())


def test_slow_explanations_leave_the_verdicts(scorer):
    async def main():
        held = HeldHeat(scorer)
        async with running(create_app(scorer, Limits(seconds=2))) as app:
            status, _, content = await several(app, 2).answer()
            assert status == 200
            for result in content["results"]:
                assert result["verdict"] == "OOD"
                assert result["why"]["heat"] is None
                assert result["why"]["no_heat"] == "the service is busy"
            assert await waiting(app) == 0
            held.go.release(2)

    asyncio.run(main())


def test_explanations_for_a_client_that_disconnected_are_dropped(scorer):
    async def main():
        held = HeldHeat(scorer)
        async with running(create_app(scorer, Limits(batch_size=8))) as app:
            asking = several(app, 5)
            await held.begun()
            asking.leave()
            await asking.task
            assert await waiting(app) == 0
            held.go.release()
            assert (await Asking(app).say(png()).answer())[0] == 200
            assert len(held.batches) == 1

    asyncio.run(main())


def test_openapi_describes_the_results(client):
    schema = client.get("/openapi.json").json()
    named = {"/v1/{name}/score", "/v1/{name}/detector"}
    assert set(schema["paths"]) == {
        "/v1/score", "/v1/detector", *named, "/v1/scorers", "/metrics", "/healthz", "/readyz",
    }  # fmt: skip
    for path in named:
        (parameter,) = [p for m in schema["paths"][path].values() for p in m["parameters"] if p["in"] == "path"]
        assert parameter["schema"]["enum"] == ["default"]
    post = schema["paths"]["/v1/score"]["post"]
    assert set(post["requestBody"]["content"]) == {
        "image/*", "application/octet-stream", "application/json", "multipart/form-data",
    }  # fmt: skip
    assert {"200", "400", "401", "408", "413", "415", "422", "503"} <= set(post["responses"])
    result = schema["components"]["schemas"]["Result"]
    assert set(result["properties"]) == {
        "name", "score", "p_value", "verdict", "predicted", "error", "group", "flagged_share", "boxes", "why",
    }  # fmt: skip
    properties = {"units", "terms", "nearest", "heat", "no_heat"}
    assert set(schema["components"]["schemas"]["Why"]["properties"]) == properties
    (explain,) = [parameter for parameter in post["parameters"] if parameter["name"] == "explain"]
    assert "at most 8 per request" in explain["description"]


def test_an_explanation_has_the_terms_of_a_sum():
    why = why_of(Why(terms=[("KLUniform()", -0.5), ("KNN(k=10)", -math.inf)]), IMAGES)
    assert why.terms == [("KLUniform()", -0.5), ("KNN(k=10)", None)]


def test_the_page_loads_nothing_from_other_origins(client):
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "access-control-allow-origin" not in page.headers
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert page.text.count("<script>") == policy.split("style-src")[0].count("sha256-")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)
    assert not re.search(r"\son\w+=", page.text)


def test_the_page_names_the_formats(client):
    assert f">{', '.join(FORMATS)}<" in client.get("/").text


def threads():
    """The threads of services."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("featnorm-")]


def test_it_works_mounted_in_another_application(scorer):
    outer = FastAPI()
    outer.mount("/a", create_app(scorer))
    before = {*threads()}
    with TestClient(outer) as client:
        # The first request starts it.
        answer = client.post("/a/v1/score", content=png(), headers={"content-type": "image/png"})
        assert answer.status_code == 200
        assert answer.json()["results"][0]["score"] is not None
        end = time.monotonic() + 30
        while client.get("/a/readyz").status_code != 200:
            assert time.monotonic() < end, "it never was ready"
        assert client.get("/a/").text.startswith("<!doctype html>")
        mine = {*threads()} - before
        assert mine
    # Its threads end with the event loop of the other application, which is its only signal.
    for thread in mine:
        thread.join(30)
        assert not thread.is_alive()


def test_a_client_without_a_lifespan(scorer):
    client = TestClient(create_app(scorer))
    for _ in range(2):  # each in an event loop of its own
        assert client.post("/v1/score", content=png(), headers={"content-type": "image/png"}).status_code == 200


def test_an_application_may_be_started_again(scorer):
    app = create_app(scorer)
    for _ in range(2):
        with client_of(app) as client:
            answer = client.post("/v1/score", content=png(), headers={"content-type": "image/png"})
            assert answer.status_code == 200


def test_it_scores_nothing_after_the_shutdown(scorer):
    async def main():
        async with running(create_app(scorer)) as app:
            pass
        status, _, content = await Asking(app).say(png()).answer()
        assert (status, content["error"]) == (503, "the service is shutting down: try again later")

    asyncio.run(main())


def test_an_uncalibrated_scorer_is_an_error(scorer):
    scorer.calibration = None
    with pytest.raises(ValueError, match="not calibrated"):
        create_app(scorer)


@pytest.fixture(scope="module")
def detector(fitted, tmp_path_factory):
    file = tmp_path_factory.mktemp("served") / "d.featnorm"
    fitted.save(file, weights=True)
    return file


@pytest.mark.posix
def test_the_command_serves_until_a_signal(detector, tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    # By default a network that is slow on this machine is exported first.
    served = ["serve", detector, "--port", "0", "--tpr", "0.9", "--engine", "torch"]
    served += ["--token-file", tmp_path / "token"]
    process = start(command, *served, out=tmp_path / "out", error=tmp_path / "log")
    try:
        said = first_lines_of(tmp_path / "out", process)
        host, port = re.search(r"http://([\d.]+):(\d+)/", said).groups()
        assert host == "127.0.0.1"
        request = urllib.request.Request(
            f"http://{host}:{port}/v1/score",
            png(),
            {"Content-Type": "image/png", "Authorization": f"Bearer {TOKEN}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["results"][0]["score"] is not None
        about = urllib.request.Request(f"http://{host}:{port}/v1/detector", headers=dict(request.header_items()))
        with urllib.request.urlopen(about, timeout=30) as answer:
            assert json.load(answer)["tpr"] == 0.9
        request.add_header("Origin", f"http://{host}:{int(port) % 65535 + 1}")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=30)
        image = png()
        under_way = socket.create_connection((host, int(port)), timeout=30)
        under_way.sendall(
            f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/png\r\n"
            f"Content-Length: {len(image)}\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Expect: 100-continue\r\n\r\n".encode()
        )
        assert under_way.recv(100).startswith(b"HTTP/1.1 100")
        process.terminate()
        while True:  # until connections are rejected
            try:
                socket.create_connection((host, int(port)), timeout=30).close()
            except OSError:
                break
        under_way.sendall(image)
        assert under_way.recv(100).startswith(b"HTTP/1.1 200")
        under_way.close()
        process.join(60)
    finally:
        process.kill()
    log = (tmp_path / "log").read_text("utf-8")
    assert process.exitcode == 0, log
    assert (tmp_path / "out").read_text("utf-8") == said
    assert [json.loads(line)["status"] for line in log.splitlines()] == [200, 200, 403, 200]
    assert TOKEN not in log + said


@pytest.mark.posix
def test_the_command_ends_in_time_whatever_its_threads_do(detector, tmp_path):
    served = (serve_what_never_returns, detector, "--port", "0", "--grace-seconds", "0.5", "--engine", "torch")
    process = start(*served, out=tmp_path / "out", error=tmp_path / "log")
    try:
        said = first_lines_of(tmp_path / "out", process, 2)
        assert {line[:5] for line in said.splitlines()} == {"begun", "Servi"}
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 130
        assert (tmp_path / "log").read_text("utf-8") == "featnorm: interrupted\n"
    finally:
        process.kill()


def test_all_of_the_log_is_json(capsys, monkeypatch):
    for name in (None, "featnorm.serve", "uvicorn"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logger.level)
    try:
        serve._log_lines()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("of a library", stacklevel=1)
        logging.getLogger("some.parser").warning("from a parser")
        logging.getLogger("some.parser").info("of no interest")
        logging.getLogger("featnorm.serve").info("request", extra={"fields": {"status": 200}})
    finally:
        logging.captureWarnings(False)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["warning", "warning", "info"]
    assert "of a library" in lines[0]["message"]
    assert lines[1]["message"] == "from a parser"
    assert lines[2]["status"] == 200


def test_invalid_options_of_the_command(featnorm, detector, tmp_path, monkeypatch):
    (tmp_path / "empty").write_text("\n")
    taken = bind("127.0.0.1", 0)
    taken.listen()
    port = taken.getsockname()[1]
    with taken:
        for arguments, words in {
            ("serve", detector, "--port", port): f"cannot listen on 127.0.0.1 port {port}: Address already in use",
            ("serve", detector, "--host", "192.0.2.1"): "cannot listen on 192.0.2.1",
            ("serve", "nothing.featnorm", "--port", 0): "cannot find the detector file",
            ("serve", detector, "--token-file", "nothing"): "nothing",
            (
                "serve",
                detector,
                "--token-file",
                "empty",
            ): "empty is empty: put a token in it, or omit --token-file",
            (
                "serve",
                detector,
                "--token-file",
                detector,
            ): "is not a text file: pass the file that holds the",
            ("serve", detector, "--max-queue", 5): "the queue only 5",
            ("serve", detector, "--max-seconds", 0): "seconds is 0",
            ("serve", detector, "--port", 0, "--allowed-host", "http://a"): "'http://a' is not a host name",
        }.items():
            status, _, error = featnorm(*arguments)
            assert status == 2
            assert words in error, (arguments, error)
            assert error.count("\n") == 1
    monkeypatch.setenv("FEATNORM_TOKEN", "")
    assert "FEATNORM_TOKEN is empty: put a token in it, or unset it" in featnorm("serve", detector, "--port", 0)[2]


def test_rows_are_scored_as_by_the_scorer():
    rows = np.random.default_rng(0).normal(size=(200, 5))
    table = pd.DataFrame(rows, columns=list("abcde")).assign(word=np.where(rows[:, 0] > 0, "x", "y"))
    vectors, records = fn.fit(rows), fn.fit(table)
    sent = rows[:3].tolist()
    named = [{**row, "a": str(row["a"])} for row in table.head(3).to_dict("records")]
    for scorer, body in ((vectors, [*sent, [1.0], [1, 2, 3, 4, None], [1, 2, 3, 4, 10**400]]), (records, named)):
        with client_of(create_app(scorer)) as client:
            assert client.get("/v1/detector").json()["inputs"] == "rows"
            answer = client.post("/v1/score?explain=true", json={"rows": body})
            assert answer.status_code == 200
            results = answer.json()["results"]
            expected = scorer.predict(body)
            assert [result["name"] for result in results] == [f"row {i + 1}" for i in range(len(body))]
            assert [result["error"] for result in results] == [verdict.error for verdict in expected]
            assert [r["score"] for r in results[:3]] == pytest.approx([v.score for v in expected[:3]], rel=1e-5)
            assert len(results[0]["why"]["nearest"]) > 0
            assert ("a: " in results[0]["why"]["nearest"][0]["text"]) == (scorer is records)
    assert [verdict.error for verdict in vectors.predict([*sent, [1.0], [1, 2, 3, 4, None]])[3:]] == [
        "it has 1 numbers: 5 are needed",
        "column 4 is nan in float32, which is not finite",
    ]


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        ({"rows": []}, 400, "the request contains no row"),
        ({"rows": "1,2"}, 400, "this scorer takes rows, and the body contains no list of rows: send"),
        ({"rows": [[1, 2], "1,2"]}, 400, "row 2 must be a list or an object: send"),
        ({"rows": [[1, 2]] * 65}, 413, "the request contains more than 64 rows"),
        ({"rows": [list(range(300_000))]}, 400, "the body contains more than 263,144 values"),
        ({"rows": [[1.0]]}, 422, None),
    ],
)
def test_rows_that_cannot_be_scored(body, status, why):
    scorer = fn.fit(np.random.default_rng(0).normal(size=(40, 2)))
    with client_of(create_app(scorer)) as client:
        answer = client.post("/v1/score", json=body)
        assert answer.status_code == status
        assert why is None or answer.json()["error"].startswith(why)
        image = client.post("/v1/score", content=b"png", headers={"Content-Type": "image/png"})
        assert (image.status_code, "this scorer takes rows: send application/json" in image.text) == (415, True)


@pytest.fixture(scope="module")
def text_scorer(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    tiny_texts.write_texts(root / "known.parquet", 2, 60, tiny_texts.WORDS[4:])
    runtime = fn.Runtime(progress=False, workers=0)
    model = f"hf:{tiny_texts.saved(root / 'encoder')}"
    return fn.fit(root / "known.parquet", model, detector="KNN(k=3)", cache=root / "cache", runtime=runtime)


def test_texts_are_scored_as_outside_the_service(text_scorer):
    good = ["my card was lost", "is it lost ?, [{:}]" * 900]
    expected = [verdict.score for verdict in text_scorer.predict(good)]
    with client_of(create_app(text_scorer)) as client:
        assert client.get("/v1/detector").json()["inputs"] == "texts"
        body = {"texts": [good[0], {"name": "n", "text": good[1]}, " ", "a\0b", "\ud800"]}
        answer = client.post("/v1/score?explain=true", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 200
        results = answer.json()["results"]
        assert [result["name"] for result in results] == ["text 1", "n", "text 3", "text 4", "text 5"]
        assert [result["score"] for result in results[:2]] == pytest.approx(expected, abs=1e-4)
        nul = "it has a NUL character, so it is not text"
        assert [r["error"] for r in results] == [None, None, "an empty text", nul, "it is not valid UTF-8"]
        nearest = results[0]["why"]["nearest"]
        assert len(nearest) == 3
        assert all(item["text"] and item["thumbnail"] is None for item in nearest)
        for status, words, sent in (
            (400, "the body contains no list of texts: send", {"json": {"images": []}}),
            (400, "the request contains no text", {"json": {"texts": []}}),
            (400, "text 1 must be a string or an object with `name` and `text`", {"json": {"texts": [5]}}),
            (413, "the request contains more than 64 texts", {"json": {"texts": ["a"] * 65}}),
            (400, "the body contains more than 7,400 values", {"json": {"texts": [[]] * 9000}}),
            (415, "this scorer takes texts: send application/json", {"content": png()}),
        ):
            rejected = client.post("/v1/score", **sent)
            assert (rejected.status_code, words in rejected.json()["error"]) == (status, True), rejected.text


def test_a_service_of_images_takes_no_texts(client):
    answer = client.post("/v1/score", json={"texts": ["a"]})
    assert answer.status_code == 400
    assert "the body contains no list of images" in answer.json()["error"]
