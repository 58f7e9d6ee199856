"""The tests mirror the source: what a module does is tested where a reader looks for it."""

from pathlib import Path

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "featnorm"
#: Modules that other tests cover.
ELSEWHERE = {
    "__main__": "cli/test_interrupt.py",
    "archive": "test_scorer.py",
    "callbacks": "test_lightning.py",
    "scorer_file": "test_scorer.py",
    "verdict": "test_scorer.py",
}
#: Tests of the package as a whole, and of the tests.
WHOLE = {"docs", "docstrings", "init", "running", "structure"}


def modules() -> set[tuple[str, str]]:
    """Return package and name of every module: ("inputs", "cache"), ("", "norms")."""
    files = (file.relative_to(SOURCE) for file in SOURCE.rglob("*.py"))
    return {(_folder(file), file.stem) for file in files if file.stem != "__init__"}


def named_tests() -> set[tuple[str, str]]:
    """Return folder and name of every file of tests, without the "test_" that it begins with."""
    files = (file.relative_to(TESTS) for file in TESTS.rglob("test_*.py"))
    return {(_folder(file), file.stem.removeprefix("test_")) for file in files}


def _folder(file: Path) -> str:
    return file.parent.as_posix().removeprefix(".")


def test_every_package_has_tests_and_every_folder_of_tests_a_package():
    assert {folder for folder, _ in named_tests()} - {"tap/zoo"} == {package for package, _ in modules()}


def test_every_module_at_the_top_has_its_tests():
    named = {name for package, name in modules() if not package} - ELSEWHERE.keys()
    assert {name for folder, name in named_tests() if not folder} - WHOLE == named
    assert all((TESTS / file).is_file() for file in ELSEWHERE.values())


def test_no_file_of_tests_has_the_name_of_a_module_elsewhere():
    names = {name for _, name in modules()}
    assert not [test for test in named_tests() - modules() if test[1] in names and test[1] not in WHOLE]
