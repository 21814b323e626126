"""What every page must be: quiet, without network, as wide as its window, legible."""

from __future__ import annotations

from pathlib import Path

from tests.report.browser import Page

SCREENS = [(1280, False), (1280, True), (390, False), (390, True)]
HOSTILE = '</script><img src=x onerror="document.body.dataset.broken=1"><b>bold</b> {{7*7}} ${8*8} &amp; "q"'

CONTRASTS = """(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [...n.slice(0, 3), n[3] ?? 1]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
  const back = (node) => node ? over(parse(getComputedStyle(node).backgroundColor), back(node.parentElement))
    : matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  document.querySelectorAll("details").forEach((node) => { node.open = true; });
  return [...document.body.querySelectorAll("*")]
    .filter((node) => [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()))
    .filter((node) => node.getBoundingClientRect().width && !["SCRIPT", "OPTION"].includes(node.tagName))
    .map((node) => {
      const style = getComputedStyle(node), under = back(node);
      const fore = over(parse(node instanceof SVGElement ? style.fill : style.color), under);
      const [low, high] = [light(fore), light(under)].sort((a, b) => a - b);
      return [(high + 0.05) / (low + 0.05), `${node.tagName} ${node.getAttribute("class")} ${node.textContent}`];
    });
})()"""
"""Each visible text's contrast with what lies under it, and the text."""


def assert_quiet(page: Page, file: Path) -> None:
    """No complaint on the console, no request but for the page itself."""
    assert page.errors == []
    assert set(page.requests) - {"data:,"} == {file.as_uri()}


def overflow(page: Page) -> int:
    return page.value("document.scrollingElement.scrollWidth - innerWidth")
