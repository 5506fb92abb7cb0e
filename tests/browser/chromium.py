"""Starting a headless Chromium with Selenium; nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import Any

ITEMS = 450
"""Of the page that most tests look at: its items lie in three files a run."""

NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """Return the browser's path, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str:
    """Return what the tests lack, "" where they can run."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed (envs/dev.lock)"
    if chromium() is None or shutil.which("chromedriver") is None:
        return "no Chromium with its driver (Debian: chromium chromium-driver)"
    return ""


def start(binary: str | None) -> Any:
    """Return a driver of a headless browser that keeps its console's messages."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.add_argument("--headless=new")
    # shared memory of a container is small
    options.add_argument("--disable-dev-shm-usage")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    resize(driver, 1280, 1000)
    return driver


def resize(driver: Any, width: int, height: int) -> None:
    """Set the size of what the page sees, in CSS pixels."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def console(driver: Any) -> list[str]:
    """Return the console's messages since the last call."""
    return [entry["message"] for entry in driver.get_log("browser")]
