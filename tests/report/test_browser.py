"""The page in headless Chromium, as people see and use it; skipped where there is none."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_page import Run, lowshot, result
from test_run import DOT, benchmark

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 300_000  # ms: a busy machine needs longer than Playwright's 30 s
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if not CHROMIUM:
        pytest.skip("there is no Chromium (Debian: apt install chromium)")
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield found
        found.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run with everything that a page can show but attention maps."""
    run = Run(tmp_path_factory.mktemp("run"))
    run.add_metrics("orl", ["global", "intra", "inter"], 5)
    for model, value in (("random", 20.0), ("stage1", 61.0), ("orl", 64.0), ("orl-k5", 63.0)):
        run.add_score(result(model, value))
        run.add_score(lowshot(model, [value / 2, value], [1, 2]))
    run.add_recall("proposals")
    run.add_pairs("pairs")
    (run.folder / "config.json").write_text('{"name": "mine", "variants": {"k5": {"neighbors": {"k": 5}}}}')
    (run.folder / "jobs.dot").write_text(DOT)
    benchmark(run.folder / "benchmarks", "embed/0001-of-0002.tsv", 60, "1024", 1)
    run.write(results=str(run.folder), graph_path=str(run.folder / "jobs.dot"), left_out=["detection is left out"])
    return run.folder / "out" / "index.html"


def test_what_was_run(page) -> None:
    for text in ("1 setting that differs", "Time and memory of each rule", "Detection is left out."):
        assert page.get_by_text(text).is_visible()
    assert page.locator("svg.graph rect").count() == 4
    page.get_by_text("1 setting that differs").click()
    assert page.get_by_role("rowheader", name="variants.k5.neighbors.k").is_visible()
    assert page.get_by_role("rowheader", name="neighbors.k: 10 (the run's own)").is_visible()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser, path: Path) -> Iterator:
    """The page, opened on a screen; at the end, nothing was asked of the network and no error was told."""
    width, height = SIZES[request.param]
    found = browser.new_page(viewport={"width": width, "height": height})
    found.set_default_timeout(PATIENCE)
    requests, errors = [], []
    found.on("request", lambda one: requests.append(one.url))
    found.on("console", lambda one: errors.append(one.text) if one.type in ("error", "warning") else None)
    found.on("pageerror", lambda one: errors.append(str(one)))
    found.goto(path.as_uri())
    yield found
    assert [url[:60] for url in requests if not url.startswith("data:")] == [path.as_uri()[:60]]
    assert errors == []
    found.close()


def test_nothing_is_wider_than_the_screen(page) -> None:
    """What is wide scrolls within itself; all images are drawn."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def shown(page) -> list[float]:
    return [float(one.get_attribute("data-similarity")) for one in page.locator("figure.pair:visible").all()]


def test_the_filter(page) -> None:
    every = shown(page)
    assert every == sorted(every, reverse=True)
    count = page.locator(".filter output")
    assert count.inner_text() == f"{len(every)} of {len(every)} pairs of photos"

    page.get_by_label("First").select_option("least similar")
    assert shown(page) == sorted(every)
    page.get_by_label("Similarity from").fill("0.5")
    assert shown(page) == sorted(value for value in every if value >= 0.5)
    page.get_by_label("to", exact=True).fill("0.8")
    assert shown(page) == sorted(value for value in every if 0.5 <= value <= 0.8)
    page.get_by_label("Similarity from").fill("")
    page.get_by_label("to", exact=True).fill("")
    assert len(shown(page)) == len(every)

    page.get_by_label("Shown").select_option("least similar RoIs")
    kinds = page.locator("figure.pair:visible").evaluate_all("(all) => all.map((one) => one.dataset.kind)")
    assert set(kinds) == {"least similar RoIs"}
    page.get_by_label("Shown").select_option("all")
    page.get_by_role("searchbox").fill("NO SUCH PHOTO")
    assert shown(page) == []
    assert count.inner_text() == f"0 of {len(every)} pairs of photos"
    page.get_by_role("searchbox").fill('10".JPG')  # of any case
    assert 0 < len(shown(page)) < len(every)


def test_all_can_be_reached_by_keyboard(page) -> None:
    """Tab goes through what can be opened, scrolled and set."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    expected = page.evaluate("document.querySelectorAll('summary, [tabindex], form.filter :is(input, select)').length")
    reached = 0
    for _ in range(3 * expected):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        reached += 1
    assert reached >= expected  # a field may be reached in parts
    assert page.evaluate("document.querySelectorAll('[tabindex]:not([tabindex=\"0\"])').length") == 0


def test_without_scripts_all_pairs_are_there(browser, path: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(path.as_uri())
    assert page.locator("figure.pair:visible").count() == page.locator("figure.pair").count() > 10
    assert page.locator(".filter:visible").count() == 0
    context.close()
