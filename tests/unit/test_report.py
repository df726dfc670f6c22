"""The HTML report holds its numbers and plots, and needs nothing from the network."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

from test_scenario_answer import run_traces

from llmtrace.scenarios.prefix_cache.answer import answer
from llmtrace.scenarios.prefix_cache.report import prefix_cache_html


class Tags(HTMLParser):
    """Collects whatever a browser would fetch for the page."""

    def __init__(self) -> None:
        super().__init__()
        self.remote: list[str] = []
        self.scripts = self.bodies = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.bodies += tag == "body"
        self.remote += [f"{tag} {value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_is_self_contained() -> None:
    found = answer("run-1", run_traces(300))
    page = prefix_cache_html(found)
    assert "<!doctype html>" in page
    reader = Tags()
    reader.feed(page)
    assert reader.remote == []
    assert reader.scripts >= 1
    assert not re.search(r"""\bimport\s*\(?\s*["']https?:""", page)
    assert "@import" not in page
    assert reader.bodies == 1
    assert html.escape(found.verdict) in page
    assert "prefix-aware" in page
    assert found.pairs[0].pair_id in page


def test_names_from_traces_are_escaped() -> None:
    found = answer("run-1", run_traces(300))
    evil = "</script><script>alert(1)</script>"
    pairs = [found.pairs[0].model_copy(update={"tenant": evil}), *found.pairs[1:]]
    assert "<script>alert(1)" not in prefix_cache_html(found.model_copy(update={"model": evil, "pairs": pairs}))
