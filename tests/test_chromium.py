"""The browser of the tests: one that is installed already, one that can be installed, or a message on how to get it."""

import chromium
import pytest
from browser import HOW_TO_GET_ONE


@pytest.fixture
def machine(monkeypatch):
    """A machine on which the second of two ways to install works, unless ``works`` is false."""
    state = {"ran": [], "works": True}

    def run(command, **_):
        state["ran"].append(command)
        return type("Run", (), {"returncode": int(command != ["second"] or not state["works"])})

    ways = [[["first", "update"], ["first", "install"]], [["second"]]]
    monkeypatch.setattr(chromium, "attempts", lambda: ways)
    monkeypatch.setattr(chromium.subprocess, "run", run)
    monkeypatch.setattr(chromium, "found", lambda: "/there" if ["second"] in state["ran"] and state["works"] else None)
    return state


def test_a_browser_that_is_installed_is_used(machine, monkeypatch, capsys):
    monkeypatch.setattr(chromium, "found", lambda: "/there")
    chromium.main()
    assert machine["ran"] == []
    assert "/there" in capsys.readouterr().out


def test_ways_to_install_are_tried_in_turn(machine, capsys):
    chromium.main()
    assert machine["ran"] == [["first", "update"], ["second"]]  # the first way stops at its first failure
    assert "/there" in capsys.readouterr().out


def test_it_exits_with_instructions_if_no_way_works(machine):
    machine["works"] = False
    with pytest.raises(SystemExit) as stop:
        chromium.main()
    assert stop.value.code == HOW_TO_GET_ONE
