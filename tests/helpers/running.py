"""How the tests run and report: slow files first, one line per file, and an end when a process of tests dies."""

from collections import Counter, defaultdict

import pytest


class FileLines:
    """Prints one line per finished test file in place of one letter per test, and ends a run that lost a worker.

    pytest-xdist replaces a worker that died, gives the new one the test that killed the old one, and with
    ``--dist loadfile`` may then wait for ever.
    """

    def __init__(self, config):
        self.config = config
        self.left = Counter()
        self.found = defaultdict(Counter)
        self.seconds = Counter()

    def pytest_collection_finish(self, session):
        self.expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        if not self.left:
            self.expect(ids)

    def expect(self, tests):
        self.left = Counter(map(file_of, tests))

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self, report):
        category, _, _ = yield
        if category:
            self.found[file_of(report.nodeid)][category] += 1
        return category, "", ""

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report):
        self.seconds[file_of(report.nodeid)] += report.duration
        # As xdist makes it for a test whose worker died. The failure is counted and will be shown.
        if report.when == "???":
            pytest.exit(f"{report.nodeid} ended its process", returncode=1)

    def pytest_runtest_logfinish(self, nodeid):
        file = file_of(nodeid)
        self.left[file] -= 1
        if not self.left[file]:
            counts = ", ".join(f"{number} {category}" for category, number in sorted(self.found[file].items()))
            terminal = self.config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line(f"{file:48} {self.seconds[file]:6.1f} s  {counts}")


def file_of(nodeid):
    return nodeid.partition("::")[0]


def put_slow_first(items):
    """Begin with the files that hold a test marked as slow, so that no worker is left with one at the end."""
    slow = {file_of(item.nodeid) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: file_of(item.nodeid) not in slow)


def register(config):
    """Let the run report so unless it was asked to be verbose, or is a worker, whose controller reports."""
    if not hasattr(config, "workerinput") and config.get_verbosity() <= 0:
        config.pluginmanager.register(FileLines(config), "file-lines")
