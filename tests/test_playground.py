"""The playground in a real browser: choose, type, read the bars, load one more; by keyboard, at two widths,
with a key."""

import shutil

import browser
import pytest
from browser import Browser
from test_server import TEXT, alone, listen, shelf, start  # noqa: F401

from textlora.server.keys import read_keys

pytestmark = pytest.mark.skipif(
    browser.PATH is None, reason="needs a Chromium on the path, which pip cannot install; .ci/run fetches one"
)

CARD = "document.querySelector('#results section[data-adapter=\"{}\"]')"


def bars(page: Browser, name: str) -> dict[str, tuple[str, float]]:
    """Label -> (percent shown, width of the bar as a share) of an adapter's card."""
    rows = page.js(
        f"[...{CARD.format(name)}.querySelectorAll('tr')].map(row => [row.querySelector('th').firstChild.textContent, "
        "row.querySelector('td').textContent, parseFloat(row.querySelector('i').style.width) / 100])"
    )
    return {label: (percent, width) for label, percent, width in rows}


def assert_bars(found: dict[str, tuple[str, float]], want: dict[str, float]) -> None:
    assert list(found) == sorted(want, key=lambda label: -want[label])[: len(found)]
    for label, (percent, width) in found.items():
        assert abs(width - want[label]) < 1e-4
        assert abs(float(percent.rstrip("%")) / 100 - want[label]) < 0.0006


@pytest.mark.parametrize("width", [1200, 390])
def test_choose_two_adapters_type_read_the_bars_load_one_more(width, listen, shelf, alone, tmp_path):  # noqa: F811
    root = tmp_path / "allowed"
    shutil.copytree(shelf / "value", root / "later")
    url, _ = listen(
        adapter=(f"single={shelf / 'single'}", f"multi={shelf / 'multi'}", f"pair={shelf / 'pair'}"),
        load_from=(str(root),),
    )
    with Browser(width) as page:
        page.open(url)
        page.wait("document.querySelectorAll('#list input').length === 3")
        page.js(
            "for (const box of document.querySelectorAll('#list input')) if (box.checked !== (box.value !== 'pair')) box.click()"
        )
        page.type("text", TEXT)
        page.wait(
            "document.querySelectorAll('#results section').length === 2 && !document.querySelector('.waiting')"
        )
        for name in ("single", "multi"):
            want = alone(name)
            assert_bars(bars(page, name), want.scores)
            shown = page.js(f"{CARD.format(name)}.querySelector('.decision').textContent")
            assert set(shown.split(", ")) == (set(want.labels) or {"no label"})
        assert page.js("document.getElementById('cost').textContent").startswith("12 tokens, ")
        page.js("document.querySelector('#load summary').click()")
        page.type("load-name", "one-more")
        page.type("load-path", "later")
        page.js("document.querySelector('#load-form button').click()")
        page.wait(f"{CARD.format('one-more')} !== null")
        assert float(
            page.js(f"{CARD.format('one-more')}.querySelector('.decision').textContent")
        ) == pytest.approx(alone("value").score, rel=1e-4)
        page.js("document.querySelector('[aria-label=\"Unload one-more\"]').click()")
        page.wait("document.querySelectorAll('#list input').length === 3")
        page.js("document.querySelector('#list input[value=pair]').click()")
        page.type("pair", "bad")
        page.wait(f"{CARD.format('pair')} !== null")
        assert_bars(bars(page, "pair"), alone("pair", TEXT, "bad").scores)
        assert page.js("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.problems() == []
        assert page.hosts() <= {url, "data:"}


def test_by_keyboard_and_with_a_key(listen, alone, tmp_path):  # noqa: F811
    path = tmp_path / "keys.toml"
    path.write_text('[small]\nkey = "small-key-1"\nadapters = ["s*", "m*"]\n')
    url, _ = listen(read_keys(str(path)))
    with Browser(1200) as page:
        page.open(url)
        page.wait("!document.getElementById('error').hidden")
        assert (
            page.js("document.getElementById('error').textContent") == "Give an API key to see your adapters."
        )
        page.type("key", "small-key-1")
        page.press("Tab", 9)
        page.wait("document.querySelectorAll('#list input').length === 3")
        assert page.js("document.getElementById('load').hidden && document.getElementById('error').hidden")
        page.js("document.getElementById('key').focus()")
        page.press("Tab", 9)
        assert page.js("document.activeElement.value") == "many"
        page.press(" ", 32)  # off, and the next two on
        for name in ("multi", "single"):
            page.press("Tab", 9)
            assert page.js("document.activeElement.value") == name
            page.press(" ", 32)
        page.press("Tab", 9)
        assert page.js("document.activeElement.id") == "text"
        page.call("Input.insertText", text=TEXT)
        page.press("Tab", 9)
        assert page.js("document.activeElement.id") == "run"
        page.wait("document.querySelectorAll('#results section').length === 2")
        assert_bars(bars(page, "single"), alone("single").scores)
        unnamed = "[...document.querySelectorAll('input, textarea, button')].filter(e => !(e.labels && e.labels.length) && !e.textContent.trim() && !e.ariaLabel)"
        assert page.js(f"{unnamed}.map(e => e.id)") == []


def test_many_labels_and_the_page_of_routes(listen, alone):  # noqa: F811
    url, _ = listen(default_adapter="many")
    with Browser(1200) as page:
        page.open(url)
        page.wait("document.querySelectorAll('#list input').length === 5")
        page.type("text", TEXT)
        page.wait(f"{CARD.format('many')} !== null")
        assert len(bars(page, "many")) == 8
        page.js(f"{CARD.format('many')}.querySelector('button').click()")
        assert_bars(bars(page, "many"), alone("many").scores)
        page.open(f"{url}/docs")
        page.wait("document.querySelectorAll('details').length > 10")
        assert page.js("document.querySelector('details code').textContent") == "/predict"
        assert page.problems() == []
        assert page.hosts() <= {url, "data:"}
