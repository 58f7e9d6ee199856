import gc
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

import running
from featnorm.__main__ import main
from featnorm._utils import progress
from featnorm._utils.memory import keep_freed_memory

# No test depends on how fast the machine is, or how busy.
hypothesis.settings.register_profile(
    "featnorm", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("featnorm")


def pytest_configure(config):
    # As every command does: giving memory back and taking it again costs a network on a CPU half its time.
    keep_freed_memory()
    running.register(config)
    # A process that only distributes the tests needs no fixtures, and not torch either.
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("own_images")
        # Nothing that is imported or collected becomes garbage, and looking for it doubles the time of collection.
        gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
    # Looking for garbage at every 700 objects takes one twentieth of the tests' time.
    gc.set_threshold(10_000)


def pytest_collection_modifyitems(items):
    running.put_slow_first(items)
    if os.name == "nt":
        for item in items:
            if item.get_closest_marker("posix"):
                item.add_marker(pytest.mark.skip(reason="tests POSIX"))


@pytest.fixture(scope="session", autouse=True)
def quick_seeds():
    """Seed no GPU for later with the stack of the caller, which takes half a millisecond a time."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.xpu):
            patch.setattr(device, "traceback", SimpleNamespace(format_stack=list))
        yield


@pytest.fixture(scope="session", autouse=True)
def engines(tmp_path_factory):
    """Keep exported networks apart from the user's own, which would be read, and written, by the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featnorm.engine.DEFAULT_CACHE", str(tmp_path_factory.mktemp("engines")))
        yield


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all processes of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data: parquet files described in their own README."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for place in (os.environ.get("FEATNORM_DATA"), beside):
        if place and (Path(place) / "imagenet1k_sample" / "test.parquet").is_file():
            return Path(place)
    pytest.skip("real data not here: set FEATNORM_DATA or place shared/data beside the checkout")


@pytest.fixture
def featnorm(monkeypatch, capsys, tmp_path):
    """Run the command in an empty folder; returns exit status, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEATNORM_DATA", raising=False)
    # On a busy machine, what takes over 30 seconds would write lines of progress.
    monkeypatch.setattr(progress, "_SECONDS", 3600.0)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["featnorm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    # The command handles Ctrl-C to the end of its process, which here is pytest's.
    handler, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    yield run
    signal.signal(signal.SIGINT, handler)
    sys.unraisablehook = hook


@pytest.fixture(scope="module")
def browser():
    """A Chromium for one file: while Playwright runs, nothing else in the process can run an event loop."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
