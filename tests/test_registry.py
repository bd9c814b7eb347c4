"""Registry: names, owners, duplicates, misspellings, roll-back."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twnn_plugin.errors import DuplicateNameError, OptionError, UnknownNameError, nearest
from twnn_plugin.registry import Entry, Registry, check_options


class Tool:
    """Base of the things registered here."""


@dataclass(frozen=True)
class Hammer(Tool):
    """Drives nails.

    And more that listings leave out.
    """

    weight: float = 1.0
    handle: str = "ash"


def not_a_tool():
    return 3


@pytest.fixture
def tools() -> Registry[Tool]:
    registry: Registry[Tool] = Registry("tool", Tool)
    registry.register("hammer", Hammer, owner="shed")
    registry.register("saw", lambda: Tool(), owner="shed")
    return registry


def test_names_are_sorted_and_entries_carry_owner_and_summary(tools):
    tools.register("axe", Hammer)
    assert tools.names() == ["axe", "hammer", "saw"]
    assert [entry.name for entry in tools.entries()] == tools.names()
    assert tools.entry("hammer") == Entry("hammer", Hammer, "shed")
    assert tools.entry("hammer").summary == "Drives nails."
    assert tools.entry("saw").summary == ""
    assert tools.owner("axe") == Hammer.__module__.split(".")[0]
    assert tools.get("hammer") is Hammer


def test_register_returns_the_factory(tools):
    assert tools.register("mallet", Hammer) is Hammer


def test_unknown_name_says_what_is_near_and_what_there_is(tools):
    with pytest.raises(UnknownNameError) as caught:
        tools.get("hamer")
    assert str(caught.value) == "Unknown tool 'hamer'. Did you mean 'hammer'? Registered: hammer, saw."
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ValueError)


def test_unknown_name_with_nothing_near_makes_no_guess(tools):
    with pytest.raises(UnknownNameError) as caught:
        tools.get("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_unknown_name_in_an_empty_registry():
    with pytest.raises(UnknownNameError, match="Registered: none"):
        Registry("tool", Tool).get("hammer")


@pytest.mark.parametrize("name", [None, 3, ["hammer"], {}])
def test_lookup_of_something_that_is_no_name(tools, name):
    with pytest.raises(UnknownNameError, match="Unknown tool"):
        tools.get(name)


def test_duplicate_is_refused_with_both_owners_and_the_first_stays(tools):
    with pytest.raises(DuplicateNameError) as caught:
        tools.register("hammer", Tool, owner="garage")
    assert "'garage'" in str(caught.value)
    assert "'shed'" in str(caught.value)
    assert "replace=True" in str(caught.value)
    assert tools.entry("hammer") == Entry("hammer", Hammer, "shed")


def test_replace_takes_a_name_over(tools):
    tools.register("hammer", Tool, replace=True, owner="garage")
    assert tools.owner("hammer") == "garage"


@pytest.mark.parametrize("name", ["", " ", "two words", "tab\t", "line\n", None, 3])
def test_bad_names_are_refused(tools, name):
    with pytest.raises(ValueError, match="tool name is a non-empty string"):
        tools.register(name, Hammer)
    assert tools.names() == ["hammer", "saw"]


def test_a_factory_must_be_callable(tools):
    with pytest.raises(TypeError, match="'rake' must be callable, not a int"):
        tools.register("rake", 3)
    assert "rake" not in tools.names()


def test_make_passes_options(tools):
    assert tools.make("hammer", weight=2.0) == Hammer(weight=2.0)


def test_make_refuses_options_that_nobody_knows(tools):
    with pytest.raises(OptionError) as caught:
        tools.make("hammer", wieght=2.0)
    assert "Did you mean 'weight'?" in str(caught.value)
    assert "Its options: weight, handle." in str(caught.value)


def test_make_refuses_what_a_factory_of_another_kind_returns(tools):
    tools.register("rake", not_a_tool, owner="garden")
    with pytest.raises(TypeError, match=r"'rake' \(owner 'garden'\) returned a int; it must return a Tool"):
        tools.make("rake")


def test_check_options_lets_a_keyword_sink_pass():
    check_options("It", lambda **options: options, {"anything": 1})


def test_resolve_takes_names_and_instances_and_nothing_else(tools):
    hammer = Hammer()
    assert tools.resolve(hammer) is hammer
    assert tools.resolve("hammer") == hammer
    with pytest.raises(OptionError, match="got a type"):
        tools.resolve(Hammer)


def test_restore_undoes_everything_since_the_snapshot(tools):
    before = tools.snapshot()
    tools.register("axe", Hammer)
    tools.register("saw", Hammer, replace=True, owner="garage")
    tools.restore(before)
    assert tools.names() == ["hammer", "saw"]
    assert tools.owner("saw") == "shed"


def test_a_snapshot_does_not_change_with_the_registry(tools):
    before = tools.snapshot()
    tools.register("axe", Hammer)
    assert set(before) == {"hammer", "saw"}
    tools.restore(before)
    tools.register("axe", Hammer)
    assert set(before) == {"hammer", "saw"}


def test_bound_methods_see_a_restored_registry(tools):
    names = tools.names  # subpackages bind them once, at import
    before = tools.snapshot()
    tools.register("axe", Hammer)
    tools.restore(before)
    assert names() == ["hammer", "saw"]


@given(st.lists(st.text(alphabet="abc_.", min_size=1, max_size=4), unique=True), st.text(max_size=6))
def test_every_name_is_found_and_every_other_refused(names, other):
    registry: Registry[Tool] = Registry("tool", Tool)
    for name in names:
        registry.register(name, Tool, owner=f"owner of {name}")
    assert registry.names() == sorted(names)
    assert all(registry.owner(name) == f"owner of {name}" for name in names)
    if other not in names:
        with pytest.raises(UnknownNameError):
            registry.get(other)


def test_nearest_is_empty_without_a_match():
    assert nearest("picard", []) == ""
    assert nearest("andersen", ["anderson", "picard"]) == " Did you mean 'anderson'?"


def test_the_owner_of_a_partial_function_is_that_of_the_function():
    tools: Registry[Tool] = Registry("tool", Tool)
    tools.register("mallet", functools.partial(functools.partial(Hammer)))
    assert tools.owner("mallet") == Hammer.__module__.split(".")[0]
