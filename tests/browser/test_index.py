"""The index page as people use it, opened as a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pytest
from browser.chromium import ITEMS, console, missing, resize
from unit.index_tree import HOSTILE

if not missing():
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select
    from selenium.webdriver.support.wait import WebDriverWait

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def quiet(driver: Any) -> Iterator[None]:
    """No test leaves a message in the console."""
    console(driver)
    resize(driver, 1280, 1000)
    yield
    assert console(driver) == []


def opened(driver: Any, page: Path, address: str = "") -> None:
    driver.get("about:blank")
    driver.get(page.as_uri() + address)


def one(driver: Any, selector: str) -> Any:
    return driver.find_element(By.CSS_SELECTOR, selector)


def every(driver: Any, selector: str) -> list[Any]:
    return driver.find_elements(By.CSS_SELECTOR, selector)


def until(driver: Any, condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds and return its value; elements may be replaced meanwhile."""
    from selenium.common import exceptions

    ignored = [exceptions.StaleElementReferenceException, exceptions.NoSuchElementException]
    return WebDriverWait(driver, 20, 0.05, ignored).until(lambda _: condition())


def names(driver: Any, table: str = "section-0-main") -> list[str]:
    """Return the methods of a table's visible rows from top to bottom."""
    rows = every(driver, f"#{table} tbody tr")
    return [r.find_element(By.TAG_NAME, "th").text for r in rows if r.is_displayed()]


def counted(driver: Any) -> str:
    """Return what the page says of the items, once it has settled."""
    until(driver, lambda: one(driver, "#item-count").text.startswith(("Items", "None")))
    return one(driver, "#item-count").text


def shown_items(driver: Any) -> list[str]:
    return [element.text for element in every(driver, "#item-list article h4")]


def choose(driver: Any, field: str, text: str) -> None:
    Select(one(driver, f"#{field}")).select_by_visible_text(text)


def search(driver: Any, text: str) -> str:
    """Type into the item browser's search and return the new count."""
    box = one(driver, "#item-text")
    box.clear()
    box.send_keys(text)
    until(driver, lambda: f"text={quote_plus(text)}" in driver.current_url)
    return counted(driver)


def scores(page: Path, method: str, task: str = "arithmetic") -> dict[int, list[dict]]:
    """Return the scored items of a method's runs by seed."""
    cells = json.loads(page.with_name("grid.json").read_text())["cells"]
    root = page.parents[3]
    return {
        cell["seed"]: json.loads((root / path).read_text())["items"]
        for cell in cells
        if (cell["method"], cell["task"]) == (method, task)
        for path in cell["scores"].values()
    }


def right(page: Path, method: str, wanted: bool) -> set[str]:
    """Return the items that all seeds of a method got right, or wrong."""
    runs = scores(page, method).values()
    judged = [{item["id"] for item in run if item["correct"] is wanted} for run in runs]
    return set.intersection(*judged)


# ---------------------------------------------------------------- tables


def test_sorting(driver: Any, demo: Path) -> None:
    opened(driver, demo)
    heads = every(driver, "#section-0-main thead th")
    original = names(driver)
    head = next(h for h in heads if h.text.startswith("Arithmetic test"))
    button = head.find_element(By.TAG_NAME, "button")

    def values() -> list[float]:
        column = heads.index(head) + 1
        cells = every(driver, f"#section-0-main tbody td:nth-child({column}) a")
        return [float(cell.text.split()[0]) for cell in cells]

    button.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True) and names(driver)[0] == "TLoRA"
    button.click()
    assert head.get_attribute("aria-sort") == "ascending" and values() == sorted(values())
    button.send_keys(Keys.ENTER)
    assert head.get_attribute("aria-sort") == "none" and names(driver) == original
    # the base model has no training time: it stands last in either order
    training = next(h for h in heads if h.text.startswith("Training"))
    for order in ("descending", "ascending"):
        training.find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
        assert training.get_attribute("aria-sort") == order
        assert names(driver)[-1] == "Base model"
    assert [h.get_attribute("aria-sort") for h in heads].count("none") == len(heads) - 1


def test_filtering(driver: Any, demo: Path) -> None:
    opened(driver, demo)
    all_rows = names(driver)
    box = one(driver, "#filter-text")
    box.send_keys("tlo")
    assert names(driver) == names(driver, "section-1-main") == ["TLoRA"]
    assert one(driver, "#filter-count").text == "2 of 10 rows"
    box.clear()
    box.send_keys(Keys.SPACE, Keys.BACKSPACE)
    choose(driver, "filter-task", "Choice")
    assert names(driver) == [] and names(driver, "section-1-main") == all_rows
    assert not one(driver, "#section-0").is_displayed()
    assert not every(driver, ".setting-plots[data-task=arithmetic]")[0].is_displayed()
    choose(driver, "filter-task", "all")
    one(driver, "#filter-good").click()
    badges = every(driver, "#section-0-main .badge")
    assert names(driver) and len(names(driver)) == sum(badge.is_displayed() for badge in badges)
    assert "LoRA" not in names(driver)


def test_searching_the_runs(driver: Any, demo: Path) -> None:
    opened(driver, demo)
    one(driver, "#all-runs-search").send_keys("pissa choice")
    assert names(driver, "all-runs") == ["PiSSA", "PiSSA"]
    assert one(driver, "#all-runs-count").text == "2 of 18 rows"


# ---------------------------------------------------------------- panels


def test_a_number_leads_to_its_runs(driver: Any, demo: Path) -> None:
    opened(driver, demo)
    link = every(driver, "#section-0-main tbody tr")[4].find_elements(By.CSS_SELECTOR, "td a")[2]
    link.send_keys(Keys.ENTER)
    title = until(driver, lambda: one(driver, "#panel-title").text)
    assert title == "TLoRA on Arithmetic: Tiny Llama 1M"
    assert len(every(driver, "#panel svg path.curve")) == 2 + 2  # two curves and their legend
    seed = every(driver, "#panel tbody tr")[1].find_elements(By.TAG_NAME, "a")[1]
    value = seed.text
    seed.click()
    until(driver, lambda: one(driver, "#panel-title").text == "TLoRA, seed 2")
    text = one(driver, "#panel-body").text
    assert value in text and "learning_rate" in text and "passed" in text
    assert "results/train/tiny/arithmetic/tlora" in text
    picture = one(driver, "#panel svg[role=img]")
    assert picture.get_attribute("aria-label").startswith("Training loss. TLoRA, seed 2: ")
    files = [a.get_attribute("href") for a in every(driver, "#panel dd a")]
    assert files and all(Path(name.removeprefix("file://")).is_file() for name in files)
    driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    until(driver, lambda: not one(driver, "#panel").is_displayed())
    until(driver, lambda: "#" not in driver.current_url)


def test_back_leads_to_the_panel_before(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#row-4")
    until(driver, lambda: one(driver, "#panel-title").text.startswith("TLoRA on"))
    one(driver, "#panel tbody a").click()
    until(driver, lambda: one(driver, "#panel-title").text == "TLoRA, seed 1")
    driver.back()
    until(driver, lambda: one(driver, "#panel-title").text.startswith("TLoRA on"))
    one(driver, "#panel-close").click()
    assert not one(driver, "#panel").is_displayed()


def test_a_panel_leads_to_what_the_baseline_got_wrong(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#row-4")
    until(driver, lambda: one(driver, "#panel-title").text)
    driver.find_element(By.PARTIAL_LINK_TEXT, "Where TLoRA beats LoRA").click()
    wanted = right(demo, "tlora", True) & right(demo, "lora", False)
    assert counted(driver) == f"Items 1 to 10 of {len(wanted)} that match, of {ITEMS}"
    assert not one(driver, "#panel").is_displayed()
    assert "test-3" in shown_items(driver) and set(shown_items(driver)) <= wanted


# ---------------------------------------------------------------- items


def test_items_side_by_side(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#items?place=0")
    assert counted(driver) == f"Items 1 to 10 of {ITEMS}"
    assert Select(one(driver, "#item-a")).first_selected_option.text == "TLoRA, all 2 seeds"
    assert Select(one(driver, "#item-b")).first_selected_option.text == "LoRA, all 2 seeds"
    choose(driver, "item-filter", "A (TLoRA) right and B (LoRA) wrong")
    wanted = right(demo, "tlora", True) & right(demo, "lora", False)
    until(driver, lambda: counted(driver).endswith(f"of {len(wanted)} that match, of {ITEMS}"))
    item = one(driver, "#item-list article[aria-label='Item test-3']")
    answers = item.find_elements(By.CSS_SELECTOR, ".answer")
    told = [answer.find_element(By.TAG_NAME, "h5").text.split("\n") for answer in answers]
    expected = [["TLoRA", "right"], ["TLoRA", "right"], ["LoRA", "wrong"], ["LoRA", "wrong"]]
    assert [[" ".join(t).split(",")[0], " ".join(t).split()[-1]] for t in told] == expected
    assert "The answer is: 21" in answers[0].text and "The answer is: 22" in answers[2].text
    assert "A zebra runs 3 times 7 steps" in item.text and "#### 21" in item.text
    assert "LoRA 0/2" in item.find_element(By.CSS_SELECTOR, ".tally").text
    choose(driver, "item-filter", "A (TLoRA) wrong and B (LoRA) right")
    other = right(demo, "tlora", False) & right(demo, "lora", True)
    until(driver, lambda: counted(driver).endswith(f"of {len(other)} that match, of {ITEMS}"))
    choose(driver, "item-filter", "no answer found in A")
    runs = scores(demo, "tlora").values()
    silent = {item["id"] for run in runs for item in run if item["extracted"] is None}
    until(driver, lambda: counted(driver).endswith(f"of {len(silent)} that match, of {ITEMS}"))


def test_single_runs_and_more_columns(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#items?place=0")
    counted(driver)
    choose(driver, "item-a", "PiSSA, seed 2")
    choose(driver, "item-b", "Base model")
    one(driver, "details.more summary").click()
    until(driver, lambda: one(driver, "#item-more label").is_displayed())
    driver.execute_script("arguments[0].click()", every(driver, "#item-more input")[2])

    def heads() -> list[str]:
        article = one(driver, "#item-list article")
        return [h.text for h in article.find_elements(By.CSS_SELECTOR, "h5 a")]

    wanted = ["PiSSA, seed 2", "Base model", "Full fine-tuning, seed 2"]
    until(driver, lambda: heads() == wanted)
    # the address alone gives the same view again
    address = driver.current_url
    opened(driver, demo, f"#{address.partition('#')[2]}")
    counted(driver)
    until(driver, lambda: heads() == wanted)


def test_text_search(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#items?place=0")
    counted(driver)
    # in a prompt; in a completion of a shown run; in none that is shown
    assert search(driver, "aardvark") == f"Items 1 to 1 of 1 that match, of {ITEMS}"
    assert shown_items(driver) == ["test-7"] and one(driver, "mark").text == "aardvark"
    assert search(driver, "WOMBAT") == f"Items 1 to 1 of 1 that match, of {ITEMS}"
    assert shown_items(driver) == ["test-9"]
    choose(driver, "item-b", "LoRA, seed 2")
    until(driver, lambda: counted(driver) == f"None of {ITEMS} items matches.")
    assert search(driver, "runs 449 times") == f"Items 1 to 1 of 1 that match, of {ITEMS}"


def test_turning_pages(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#items?place=0&first=190")
    assert counted(driver) == f"Items 191 to 200 of {ITEMS}"
    one(driver, "#item-next").click()
    until(driver, lambda: shown_items(driver) == [f"test-{n}" for n in range(200, 210)])
    one(driver, "#item-back").click()
    until(driver, lambda: shown_items(driver)[0] == "test-190")
    opened(driver, demo, f"#items?place=0&first={ITEMS - 10}")
    assert counted(driver).startswith(f"Items {ITEMS - 9} to {ITEMS} of")
    assert not one(driver, "#item-next").is_enabled() and one(driver, "#item-back").is_enabled()


def test_another_benchmark(driver: Any, demo: Path) -> None:
    opened(driver, demo, "#items?place=0&filter=better")
    before = counted(driver)
    choose(driver, "item-place", "Choice: Tiny Llama 1M: Choice test")
    until(driver, lambda: "place=1" in driver.current_url)
    until(driver, lambda: counted(driver) != before)
    link = one(driver, "#item-list h5 a").get_attribute("href")
    assert int(link.rpartition("-")[2]) >= 9  # a run of the second section


def test_nothing_is_loaded_before_it_is_needed(driver: Any, demo: Path) -> None:
    spy = (
        "window.read = []; let inner; Object.defineProperty(window, 'tloraData', { set(f) {"
        " inner = (name, value) => { window.read.push(name); f(name, value); }; },"
        " get() { return inner; } })"
    )
    command = "Page.addScriptToEvaluateOnNewDocument"
    added = driver.execute_cdp_cmd(command, {"source": spy})
    resize(driver, 1280, 300)
    opened(driver, demo)
    driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
    assert driver.execute_script("return window.read") == []
    driver.execute_script("document.getElementById('items').scrollIntoView()")
    counted(driver)
    read = driver.execute_script("return window.read")
    # the verdicts of all, and the first file of what is shown: prompts and two runs of A and of B
    assert read[0] == "items/0/verdicts" and "items/0/prompts/0" in read and len(read) == 2 + 4
    assert all(name.endswith("/0") for name in read[1:])


def test_a_missing_file_is_told(driver: Any, build: Callable[..., Path]) -> None:
    page = build(items=5, tasks=("arithmetic",), seeds=(1,))
    (page.parent / "index_files/items/0/verdicts.js").unlink()
    opened(driver, page, "#items?place=0")
    told = "index_files/items/0/verdicts.js cannot be read: it belongs beside this page."
    until(driver, lambda: one(driver, "#item-count").text == told)
    assert all("ERR_FILE_NOT_FOUND" in message for message in console(driver))


# ---------------------------------------------------------------- safety, looks


def test_hostile_text_does_not_run(driver: Any, build: Callable[..., Path]) -> None:
    def change(grid: dict, labels: dict) -> None:
        for kind in labels.values():
            kind.update({name: f"{label} {HOSTILE}" for name, label in kind.items()})
        for cell in grid["cells"]:
            cell["settings"] = {"note": HOSTILE}

    page = build(change, items=12, tasks=("arithmetic",))
    opened(driver, page, "#items?place=0")
    counted(driver)
    article = one(driver, "#item-list article[aria-label='Item test-5']")
    for answer in article.find_elements(By.CSS_SELECTOR, ".answer pre"):
        assert answer.text == HOSTILE
    choose(driver, "item-filter", Select(one(driver, "#item-filter")).options[1].text)
    counted(driver)
    for panel in ("#row-4", "#run-3"):
        driver.execute_script("location.hash = arguments[0]", panel)
        until(driver, lambda: "<script>" in one(driver, "#panel-title").text)
    assert HOSTILE in one(driver, "#panel-body").text
    assert not every(driver, "img[src=x]") and len(every(driver, "script")) == 2
    assert driver.execute_script("return window.ran ?? null") is None


def test_markup_would_not_run_either(driver: Any, demo: Path) -> None:
    """The page's policy allows no script but its own: the second line of defence."""
    opened(driver, demo)
    driver.execute_script("document.body.insertAdjacentHTML('beforeend', arguments[0])", HOSTILE)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s)"
    )
    messages: list[str] = []
    until(driver, lambda: messages.extend(console(driver)) or len(messages) > 1)
    assert any("Content Security Policy" in message for message in messages)
    assert driver.execute_script("return window.ran ?? null") is None
    console(driver)


@pytest.mark.parametrize("address", ["", "#items?place=0", "#run-9", "#row-4"])
def test_a_narrow_page_does_not_scroll_sideways(driver: Any, demo: Path, address: str) -> None:
    resize(driver, 360, 740)
    opened(driver, demo, address)
    if address.startswith("#items"):
        counted(driver)
    elif address:
        until(driver, lambda: one(driver, "#panel-title").text)
    width = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert driver.execute_script(width) <= 0
    panel = "const p = document.getElementById('panel'); return p.scrollWidth - p.clientWidth"
    assert driver.execute_script(panel) <= 0


def test_everything_is_reached_by_keyboard(driver: Any, demo: Path) -> None:
    opened(driver, demo)
    one(driver, "body").send_keys(Keys.TAB)
    assert driver.switch_to.active_element.text == "Skip to the tables"
    script = (
        "return [...document.querySelectorAll('button, a, input, select, summary')]"
        ".filter((e) => e.tabIndex < 0).length"
    )
    assert driver.execute_script(script) == 0
    # what scrolls sideways can be focused and has a name
    regions = every(driver, ".wide")
    assert regions and all(r.get_attribute("tabindex") == "0" for r in regions)
