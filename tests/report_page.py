"""A page that `el4ner-bench report` wrote, taken apart: its tags, links and text."""

from __future__ import annotations

from html.parser import HTMLParser

TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "ul", "li", "a", "p", "div", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "b", "bdi", "mark", "span", "details", "summary", "pre", "figure",
    "figcaption", "svg", "text", "line", "circle", "rect", "polyline",
}  # fmt: skip
VOID = frozenset({"meta", "line", "rect", "circle", "polyline"})


class Page(HTMLParser):
    """Refuses what a report never has: other tags, scripts, what loads something; and tags that are not closed."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.shown: list[str] = []
        self._open: list[str] = []
        self.feed(markup)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it; open unless it stands alone."""
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self._note(tag, attrs)

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "data", "action"), (tag, name)
            self.links += [value or ""] if name == "href" else []

    def handle_endtag(self, tag: str) -> None:
        """Close it; it must be the one that was opened last."""
        assert self._open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        """Text, but for the style sheet's."""
        if self._open and self._open[-1] != "style":
            self.shown.append(data)
