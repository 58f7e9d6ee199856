"""Several scorers in one service, and files that are replaced while it runs."""

import asyncio
import collections
import copy
import dataclasses
import inspect
import io
import itertools
import json
import logging
import os
import re
import signal
import threading
import time
import urllib.request

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from torch import nn
from torchvision.transforms import v2

import featnorm as fn
from apart import command, first_lines_of, start
from asking import Asking, running, until
from featnorm.cli import serve
from featnorm.serve import Limits, ScorerFile, create_app, workers
from featnorm.serve.requests import JsonLines
from pages import Page

TYPE = {"content-type": "image/png"}


def png(value=200):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value, 20, 20)).save(file, "PNG")
    return file.getvalue()


def with_tpr(scorer, tpr):
    """A copy of a scorer that accepts another share, and so has another digest."""
    other = copy.deepcopy(scorer)
    other.calibration = scorer.calibration.with_tpr(tpr)
    return other


@pytest.fixture
def two(fitted):
    return {"a": copy.deepcopy(fitted), "b b%": with_tpr(fitted, 0.5)}


def test_each_scorer_has_its_own_addresses(two, caplog):
    caplog.set_level(logging.INFO, "featnorm.serve")
    with TestClient(create_app(two)) as client:
        listed = client.get("/v1/scorers").json()["scorers"]
        assert [scorer["name"] for scorer in listed] == ["a", "b b%"]
        assert [scorer["digest"] for scorer in listed] == [scorer.digest() for scorer in two.values()]
        for name, path, scorer in zip(two, ("a", "b%20b%25"), listed, strict=True):
            detector = client.get(f"/v1/{path}/detector").json()
            assert {key: detector[key] for key in scorer} == scorer
            assert detector["threshold"] == float(two[name].calibration.threshold)
            assert client.head(f"/v1/{path}/detector").status_code == 200
            answer = client.post(f"/v1/{path}/score", content=png(), headers=TYPE).json()
            (verdict,) = two[name].predict([Image.open(io.BytesIO(png()))])
            assert answer["digest"] == scorer["digest"]
            assert answer["results"][0]["score"] == pytest.approx(verdict.score, rel=1e-5)
            assert answer["results"][0]["verdict"] == ("ID" if verdict.is_id else "OOD")
        for path in ("/v1/score", "/v1/c/score", "/v1/a%2F/score"):
            answer = client.post(path, content=png(), headers=TYPE)
            assert answer.status_code == 404
        for path in ("/v1/detector", "/v1/c/detector"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]) == (
                404,
                "there is nothing at this address: use /v1/NAME/score, with NAME one of a, b b%; /openapi.json "
                "describes the API",
            )  # fmt: skip
        paths = client.get("/openapi.json").json()["paths"]
        assert {path for path in paths if path.startswith("/v1")} == {
            "/v1/{name}/score", "/v1/{name}/detector", "/v1/scorers",
        }  # fmt: skip
        metrics = client.get("/metrics").text
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if hasattr(record, "fields")]
    assert [line["scorer"] for line in lines if line["route"] == "/v1/{name}/score"] == ["a", "b b%", ""]
    for sample in (sample for family in text_string_to_metric_families(metrics) for sample in family.samples):
        if sample.name in ("featnorm_score_count", "featnorm_request_seconds_count") and sample.labels["scorer"]:
            assert sample.value == (1 if sample.labels.get("route", "/v1/{name}/score").endswith("score") else 2)
    by_name = collections.Counter()
    for family in text_string_to_metric_families(metrics):
        if family.name == "featnorm_score":
            by_name.update(sample.labels["scorer"] for sample in family.samples)
    assert by_name["a"] == by_name["b b%"] > 3
    assert metrics.count("# TYPE featnorm_score histogram") == 1


def test_a_wrong_address_is_answered_with_those_that_exist(two):
    two["<b>&"] = two["a"]
    inner = create_app(two)
    outer = FastAPI()
    outer.mount("/in", inner)
    browser = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    for app, root in ((inner, ""), (outer, "/in"), (create_app(two, root_path="/ood"), "/ood")):
        client = TestClient(app)
        for method, path in (("GET", "/docs"), ("POST", "/v2"), ("GET", "/v1/c/detector")):
            answer = client.request(method, root + path)
            assert answer.status_code == 404
            assert answer.headers["vary"] == "Accept"
            assert answer.json() == {
                "error": f"there is nothing at this address: use {root}/v1/NAME/score, with NAME one of a, b b%, "
                f"<b>&; {root}/openapi.json describes the API",
                "request_id": answer.headers["x-request-id"],
            }
            answer = client.request(method, root + path, headers=browser)
            assert (answer.status_code, answer.headers["vary"]) == (404, "Accept")
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
            assert "unsafe" not in answer.headers["content-security-policy"]
            page = Page(answer.text)
            assert "There is nothing at this address" in page.text
            assert f"b b%: POST {root}/v1/b%20b%25/score" in page.text
            assert page.tags["b"] == 0
            links = page.values("href")
            assert len(links) == 5
            assert f"{root}/v1/%3Cb%3E%26/detector" in links
            assert [client.get(link).status_code for link in links] == [200] * 5


def test_a_single_scorer_needs_no_name(fitted):
    with TestClient(create_app({"photos": fitted})) as client:
        for path in ("/v1", "/v1/photos"):
            assert client.get(f"{path}/detector").json()["name"] == "photos"
            answer = client.post(f"{path}/score", content=png(), headers=TYPE)
            assert answer.json()["digest"] == fitted.digest()


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", "a\n"])
def test_names_that_cannot_be_addresses(fitted, name):
    with pytest.raises(ValueError, match=re.escape(f"{name!r} cannot be the name of a scorer")):
        create_app({name: fitted})


def test_invalid_scorers(fitted, scorer):
    with pytest.raises(ValueError, match="there is no scorer: pass at least one"):
        create_app({})
    with pytest.raises(TypeError, match="the scorer 'a' must be a Scorer or a ScorerFile, got str"):
        create_app({"a": "photos.featnorm"})
    scorer.calibration = None
    with pytest.raises(ValueError, match="the scorer 'b' is not calibrated"):
        create_app({"a": fitted, "b": scorer})


@pytest.fixture
def quick_polls(monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.02)


@pytest.fixture
def grouped(scorer):
    """A scorer with thresholds by folder: of the lower half of the scores, and of the upper one."""
    scores = scorer.calibration.scores
    scorer.thresholds_by = "folder"
    return scorer.use_scores(scores, ["low"] * 24 + ["high"] * (len(scores) - 24), tpr=0.9)


def test_thresholds_by_group(grouped, file, quick_polls):
    low, high = (
        float(grouped.calibration.threshold[grouped.calibration.group_names.index(name)])
        for name in ("low", "high")
    )
    assert low < high
    with TestClient(create_app({"d": ScorerFile(file, lambda _: copy.deepcopy(grouped))})) as client:
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        detector = client.get("/v1/detector").json()
        assert (detector["threshold"], detector["thresholds_by"]) == (None, "folder")
        assert detector["thresholds"] == {"low": low, "high": high}
        edges = detector["calibration"]["edges"]
        assert edges[0] <= low < high <= edges[-1]
        for group in ("low", "high"):
            answer = client.post(f"/v1/score?group={group}", content=png(), headers=TYPE).json()["results"][0]
            (verdict,) = grouped.predict([Image.open(io.BytesIO(png()))], groups=[group])
            assert answer["p_value"] == pytest.approx(verdict.p_value)
            assert (answer["group"], answer["verdict"]) == (group, "ID" if verdict.is_id else "OOD")
        for query in ("", "?group=", "?group=middle"):
            answer = client.post(f"/v1/score{query}", content=png(), headers=TYPE)
            assert (answer.status_code, answer.json()["error"]) == (
                400, f"the parameter group must be one of {', '.join(detector['thresholds'])}",
            )  # fmt: skip
        os.utime(file)  # the new scorer is warmed up with a group too
        while 'featnorm_reloads_total{result="loaded",scorer="d"} 1.0' not in client.get("/metrics").text:
            time.sleep(0.01)
        # The same scorer: what it has seen stays.
        assert client.get("/v1/detector").json()["drift"]["inputs"] == 2


def test_thresholds_by_predicted_class(scorer):
    scorer.thresholds_by = "class"
    scores = scorer.calibration.scores
    scorer.use_scores(scores, [scorer.classes[i % 4] for i in range(len(scores))], scorer.classes, tpr=0.9)
    with TestClient(create_app(scorer)) as client:
        detector = client.get("/v1/detector").json()
        assert detector["thresholds_by"] == "class"
        assert list(detector["thresholds"]) == scorer.classes
        result = client.post("/v1/score", content=png(), headers=TYPE).json()["results"][0]
        assert result["group"] == result["predicted"]
        answer = client.post("/v1/score?group=a", content=png(), headers=TYPE)
        assert (answer.status_code, answer.json()["error"]) == (
            400,
            "the parameter group must be omitted: the scorer has no thresholds by group",
        )


def test_images_of_a_scorer_of_positions_have_a_share_of_flagged_ones():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    to_tensor = v2.Compose([v2.Resize((16, 16)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    scorer = fn.Scorer(net, fn.NAN(), per="position", preprocess=to_tensor)
    scorer.calibrate([torch.rand(30, 3, 16, 16)], 0.8)
    with TestClient(create_app(scorer)) as client:
        detector = client.get("/v1/detector").json()
        assert (detector["threshold"], detector["explains"]) == (float(scorer.calibration.units.threshold), False)
        (found,) = client.post("/v1/score", content=png(), headers=TYPE).json()["results"]
        (verdict,) = scorer.predict([Image.open(io.BytesIO(png()))])
        assert found["score"] == pytest.approx(verdict.score)
        assert found["flagged_share"] == pytest.approx(verdict.flagged_share)
        assert found["verdict"] == ("ID" if verdict.is_id else "OOD")


class Held:
    """Makes the models of scorers wait for the test, and records the scorer and the size of each batch."""

    def __init__(self, scorers):
        self.batches = []
        self.held = False
        self.go = threading.Semaphore(0)
        for name, scorer in scorers.items():
            scorer.predict_batch = self._predict(name, scorer.predict_batch)

    def _predict(self, name, predict_batch):
        def held(images, names, **how):
            if self.held and not how.get("heat"):
                self.batches.append((name, len(images)))
                assert self.go.acquire(timeout=30)
            return predict_batch(images, names, **how)

        return held


def test_scorers_take_turns(two):
    async def main():
        held = Held(two)
        async with running(create_app(two, Limits(batch_size=2, queue=70))) as app:
            held.held = True
            many = [Asking(app, path="/v1/a/score").say(png())]
            await until(lambda: held.batches == [("a", 1)])
            many += [Asking(app, path="/v1/a/score").say(png(i)) for i in range(6)]
            await asyncio.sleep(0.2)
            few = [Asking(app, path="/v1/b b%/score").say(png(i)) for i in range(3)]
            await asyncio.sleep(0.2)
            held.go.release(20)
            assert {(await asking.answer())[0] for asking in (*many, *few)} == {200}
            assert held.batches == [("a", 1), ("a", 2), ("b b%", 2), ("a", 2), ("b b%", 1), ("a", 2)]

    asyncio.run(main())


def test_the_queue_is_limited_for_all_scorers_together(two):
    async def main():
        held = Held(two)
        async with running(create_app(two, Limits(batch_size=1, queue=2, inputs=1))) as app:
            held.held = True
            askings = [Asking(app, path="/v1/a/score").say(png())]
            await until(lambda: held.batches == [("a", 1)])
            askings += [Asking(app, path=f"/v1/{name}/score").say(png()) for name in two]
            await asyncio.sleep(0.2)
            status, _, content = await Asking(app, path="/v1/b b%/score").say(png()).answer()
            assert (status, content["error"]) == (503, "2 inputs are already in the queue: try again later")
            held.go.release(20)
            assert {(await asking.answer())[0] for asking in askings} == {200}

    asyncio.run(main())


def test_it_is_ready_when_all_scorers_are(two):
    async def status(app):
        return (await Asking(app, method="GET", path="/readyz").say(b"").answer())[0]

    async def main():
        held = Held(two)
        held.held = True
        app = create_app(two)
        async with app.router.lifespan_context(app):
            await until(lambda: held.batches == [("a", 1)])
            assert await status(app) == 503
            held.go.release()
            await until(lambda: len(held.batches) == 2)
            assert await status(app) == 503
            held.go.release()
            while await status(app) != 200:
                await asyncio.sleep(0.002)

    asyncio.run(main())


@pytest.fixture
def file(fitted, tmp_path):
    file = tmp_path / "d.featnorm"
    fitted.save(file, weights=True)
    return file


@pytest.fixture(scope="module")
def other(fitted, tmp_path_factory):
    """The content of a file with another digest."""
    file = tmp_path_factory.mktemp("other") / "d.featnorm"
    with_tpr(fitted, 0.5).save(file, weights=True)
    return file.read_bytes()


def replace(file, content):
    temporary = file.with_suffix(".new")
    temporary.write_bytes(content)
    os.replace(temporary, file)


def test_a_file_needs_a_reload_once_it_has_settled(file, other, fitted):
    loads = []
    watched = ScorerFile(file, lambda path: loads.append(path.read_bytes()) or fitted)
    watched.load()
    old = file.read_bytes()
    assert [watched.needs_reload() for _ in range(3)] == [False] * 3
    for content in (other[:1000], other[:2000], other):  # while it is written
        file.write_bytes(content)
        assert not watched.needs_reload()
    assert watched.needs_reload()
    assert watched.reload() is fitted
    assert loads == [old, other]
    assert [watched.needs_reload() for _ in range(3)] == [False] * 3
    replace(file, other)  # another file of the same content
    assert [watched.needs_reload() for _ in range(2)] == [False, True]
    watched.reload()
    watched.request_reload()
    assert watched.needs_reload()
    watched.reload()
    assert not watched.needs_reload()
    file.unlink()
    assert [watched.needs_reload() for _ in range(2)] == [False, True]
    with pytest.raises(ValueError, match="No such file"):
        watched.reload()
    assert [watched.needs_reload() for _ in range(2)] == [False] * 2  # the error is reported once
    replace(file, other)
    assert [watched.needs_reload() for _ in range(2)] == [False, True]


def test_a_reload_does_not_depend_on_the_file_while_it_loads(file):
    def load(path):
        file.write_bytes(b"")  # would end a process that has mapped it
        return fn.load(path)

    assert isinstance(ScorerFile(file, load).reload(), fn.Scorer)


def test_requests_in_progress_finish_on_the_old_scorer(file, other, quick_polls):
    loaded = []
    began, go = threading.Event(), threading.Event()

    def load(path):
        loaded.append(fn.load(path))
        return loaded[-1]

    async def digest(app):
        return (await Asking(app, method="GET", path="/v1/detector").say(b"").answer())[2]["digest"]

    async def main():
        async with running(create_app({"d": ScorerFile(file, load)})) as app:
            old = await digest(app)
            inner = loaded[0].predict_batch

            def held(*arguments, **how):
                began.set()
                assert go.wait(30)
                return inner(*arguments, **how)

            loaded[0].predict_batch = held
            asking = [Asking(app).say(png(i)) for i in range(2)]
            await until(began.is_set)
            late = Asking(app).say(png()[:50], more=True)
            await asyncio.sleep(0.01)
            replace(file, other)
            while (new := await digest(app)) == old:
                await asyncio.sleep(0.01)
            fresh = Asking(app).say(png())
            late.say(png()[50:])
            go.set()
            answers = [await one.answer() for one in (*asking, late, fresh)]
            assert [answer[0] for answer in answers] == [200] * 4
            assert [answer[2]["digest"] for answer in answers] == [old, old, old, new]

    asyncio.run(main())


def test_a_file_that_cannot_be_used_is_reported_and_the_old_scorer_stays(file, fitted, other, quick_polls, caplog):
    caplog.set_level(logging.INFO, "featnorm.serve")
    foreign = fn.Scorer(fitted.model, fn.NAN(), preprocess=fitted.preprocess, spec=fitted.spec, head=fitted.head)

    def lines():
        return [
            json.loads(JsonLines().format(record))
            for record in caplog.records
            if "file" in getattr(record, "fields", {})
        ]

    def reloads(client):
        return {
            sample.labels["result"]: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "featnorm_reloads_total"
        }

    with TestClient(create_app({"d": ScorerFile(file)})) as client:
        client.post("/v1/score", content=png(), headers=TYPE)
        before = client.get("/v1/detector").json()
        contents = {
            "half": other[: len(other) // 2],
            "damaged": other[:-9] + bytes(9),
            "text": b"not a scorer",
            "empty": b"",
            "uncalibrated": saved(foreign, file.with_name("u"), fitted),
            "no model": saved(fitted, file.with_name("n"), weights=False),
        }
        errors = {}
        for count, (what, content) in enumerate(contents.items(), start=1):
            replace(file, content)
            end = time.monotonic() + 30
            while len(lines()) < count:
                assert time.monotonic() < end
                time.sleep(0.01)
            line = lines()[-1]
            assert (line["level"], line["scorer"], line["file"]) == ("error", "d", str(file)), line
            assert "traceback" not in line
            errors[what] = line["error"]
        assert reloads(client) == {"loaded": 0, "failed": 6}
        assert client.get("/v1/detector").json() == before
        for what in ("half", "damaged", "text", "empty"):
            assert errors[what].startswith(f"{file} is not a featnorm detector file, or is damaged"), errors[what]
        assert errors["uncalibrated"].startswith("the scorer 'd' is not calibrated")
        assert errors["no model"].startswith(f"{file} does not contain its model")
        replace(file, other)
        end = time.monotonic() + 30
        while client.get("/v1/detector").json()["digest"] == before["digest"]:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert client.post("/v1/score", content=png(), headers=TYPE).json()["digest"] != before["digest"]
        assert reloads(client) == {"loaded": 1, "failed": 6}
        # The distribution of scores starts over, and the number of images goes on.
        totals = {
            sample.name: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "featnorm_score_count" or sample.labels.get("verdict") in ("ID", "OOD")
            if sample.value
        }
        assert totals["featnorm_score_count"] == 1
    (line,) = [line for line in lines() if line["level"] == "info"]
    assert line["message"] == "scorer loaded again"
    assert line["scorer"] == "d"


def saved(scorer, file, fitted=None, *, weights=True):
    """The content of a scorer's file."""
    if fitted is not None:
        scorer.tap.capture(fitted.preprocess(Image.new("RGB", (32, 32)))[None], classifier=False)
    scorer.save(file, weights=weights)
    return file.read_bytes()


@pytest.mark.posix
def test_files_are_replaced_under_load_without_an_error(file, other, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.2)  # a slow copy is as much faster
    second = tmp_path / "second.featnorm"
    second.write_bytes(other)
    first = file.read_bytes()
    # By default a network that is slow on this machine is exported at every load.
    served = ("serve", file, f"two={second}", "--port", "0", "--root-path", "/ood", "--engine", "torch")
    process = start(command, *served, out=tmp_path / "out", error=tmp_path / "log")
    stop = threading.Event()
    try:
        url = re.search(r"http://[\d.]+:\d+/", first_lines_of(tmp_path / "out", process))[0]

        def get(path):
            with urllib.request.urlopen(url + path, timeout=30) as answer:
                return json.load(answer)

        wrong, digests = [], collections.Counter()

        def ask(name):
            for i in itertools.count():
                if stop.is_set():
                    return
                request = urllib.request.Request(
                    f"{url}v1/{name}/score", png(i % 256), {"Content-Type": "image/png"}
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as answer:
                        content = json.load(answer)
                    assert content["results"][0]["score"] is not None
                    digests[name, content["digest"]] += 1
                except Exception as error:
                    wrong.append(error)

        clients = [threading.Thread(target=ask, args=(name,)) for name in ("d", "d", "two")]
        for client in clients:
            client.start()
        known = {scorer["name"]: scorer["digest"] for scorer in get("v1/scorers")["scorers"]}
        assert get("ood/v1/scorers") == get("v1/scorers")
        assert get("openapi.json")["servers"] == [{"url": "/ood"}]
        seen = [known["d"]]
        for turn, content in enumerate((other, first, other)):
            if turn == 1:  # in place, in parts, as a slow copy does
                with file.open("wb") as written:
                    for place in range(0, len(content), len(content) // 4):
                        written.write(content[place : place + len(content) // 4])
                        written.flush()
                        time.sleep(0.06)
            else:
                replace(file, content)
            end = time.monotonic() + 60
            while (digest := get("v1/d/detector")["digest"]) == seen[-1]:
                assert time.monotonic() < end, "the file was not loaded again"
                time.sleep(0.05)
            seen.append(digest)
            replace(file, content[:-9])  # the damaged file changes nothing
        os.kill(process.pid, signal.SIGHUP)
        end = time.monotonic() + 60
        while len([line for line in (tmp_path / "log").read_text().splitlines() if "loaded again" in line]) < 4:
            assert time.monotonic() < end, "SIGHUP loaded nothing"
            time.sleep(0.05)
        stop.set()
        for client in clients:
            client.join(60)
        assert not wrong
        assert seen == [known["d"], known["two"], known["d"], known["two"]]
        assert {name for name, _ in digests} == {"d", "two"}
        assert {digest for name, digest in digests if name == "d"} == {*seen}
        process.terminate()
        process.join(60)
        assert process.exitcode == 0
    finally:
        stop.set()
        process.kill()
        process.join()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert {line["status"] for line in lines if line["message"] == "request"} == {200}
    assert [line["scorer"] for line in lines if line["message"] == "scorer loaded again"].count("two") == 1


@pytest.mark.parametrize("root", ["/ood", "/a/b"])
def test_behind_a_prefix(fitted, root):
    with TestClient(create_app(fitted, root_path=root)) as client:
        for prefix in (root, ""):  # the proxy keeps it, or removes it
            assert client.get(f"{prefix}/openapi.json").json()["servers"] == [{"url": root}]
            assert client.get(f"{prefix}/v1/detector").status_code == 200
            assert client.post(f"{prefix}/v1/score", content=png(), headers=TYPE).status_code == 200
            assert client.get(f"{prefix}/").status_code == 200
        assert client.get(root).status_code == 200
        assert client.get(f"{root}/nothing").status_code == 404


def test_mounted_it_knows_its_path(fitted):
    inner = FastAPI()
    inner.mount("/b", create_app(fitted))
    outer = FastAPI()
    outer.mount("/a", inner)
    client = TestClient(outer)
    assert client.get("/a/b/openapi.json").json()["servers"] == [{"url": "/a/b"}]
    assert client.get("/a/b/v1/detector").status_code == 200
    assert client.get("/a/b").text.startswith("<!doctype html>")


@pytest.mark.parametrize("root", ["ood", "/ood/", "//evil.example", "https://a/ood", "/a b", "/a?b"])
def test_an_invalid_root_path(fitted, root):
    with pytest.raises(ValueError, match=re.escape(f"the root path {root!r} must start with / and not end with")):
        create_app(fitted, root_path=root)


def test_the_defaults_of_the_command_are_those_of_the_limits():
    options = inspect.signature(serve.serve).parameters
    for limit in dataclasses.fields(Limits):
        option = {"batch_size": "batch_size", "grace": "grace_seconds"}.get(limit.name, f"max_{limit.name}")
        assert options[option].default == limit.default, limit.name


def test_invalid_scorers_of_the_command(featnorm, file, tmp_path):
    (tmp_path / "sub").mkdir()
    same = tmp_path / "sub" / "d.featnorm"
    same.write_bytes(file.read_bytes())
    (tmp_path / "e=f.featnorm").write_bytes(file.read_bytes())
    for arguments, words in {
        (file, same): f"{file} and {same} have the same name, 'd': choose one with NAME=FILE",
        (f"e={file}", f"e={same}"): "have the same name, 'e'",
        ("g=nothing.featnorm",): "cannot find the detector file nothing.featnorm",
        ("sub/g=nothing.featnorm",): "cannot find the detector file sub/g=nothing.featnorm",
        ("e=f.featnorm", "--tpr", "1"): "tpr",
        ("e=f.featnorm", "--tpr", "0.9999"): "48 calibration scores are too few for tpr=0.9999",
        (
            file,
            "--model",
            "a:b",
            "--model",
            "c:d",
        ): "--model is given as a:b and as c:d: repeat it as NAME=..., with",
        (file, "--model", "d=a:b", "--model", "d=c:d"): "--model is given twice for 'd': omit one of them",
        (file, "--weights", "d=w.pth"): "d.featnorm contains the weights of its model: omit w.pth",
        (file, "--root-path", "ood/"): "the root path 'ood/' must start with /",
    }.items():
        status, _, error = featnorm("serve", *arguments, "--port", 0)
        assert status == 2, error
        assert words in error, (arguments, error)
        assert error.count("\n") == 1


def test_the_options_of_each_scorer(tmp_path):
    names = {"a": tmp_path, "b": tmp_path}
    assert serve._per_scorer(None, names, "--model") == {}
    assert serve._per_scorer(["m:f"], names, "--model") == {"a": "m:f", "b": "m:f"}
    assert serve._per_scorer(["b=m:g"], names, "--model") == {"b": "m:g"}
    assert serve._per_scorer(["m:f", "b=m:g"], names, "--model") == {"a": "m:f", "b": "m:g"}
    assert serve._per_scorer(["c=d.pth"], names, "--weights") == {"a": "c=d.pth", "b": "c=d.pth"}
