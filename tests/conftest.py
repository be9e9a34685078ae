"""Processes that run tests share `tests/fixtures.py`; one that only hands tests to others need not wait for torch."""


def pytest_configure(config):
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("tests.fixtures")
