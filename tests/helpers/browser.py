"""Headless Chromium for tests and for the images in docs/; it talks to this machine alone."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM, DRIVER = "chromium", "chromedriver"
FLAGS = (
    "--headless",
    "--no-sandbox",  # a container's root has no user namespaces to build one from
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def skip_without_browser() -> None:
    """Skip a test where Debian's chromium and chromium-driver, or selenium, are missing."""
    pytest.importorskip("selenium", reason='selenium is missing: pip install -e ".[test]"')
    for program in (CHROMIUM, DRIVER):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing: apt-get install chromium chromium-driver")


@contextmanager
def open_browser(width: int, height: int = 900, flags: tuple[str, ...] = ()):
    """A Chromium with a window of this many CSS pixels, a fresh profile, and these flags beside the usual ones."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which(CHROMIUM)
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = webdriver.Chrome(options=options, service=Service(shutil.which(DRIVER)))
        try:
            resize(browser, width, height)
            yield browser
        finally:
            browser.quit()


def resize(browser, width: int, height: int = 900) -> None:
    """Give the page exactly this size: a window's own least width is more than a phone's."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def overflow(browser) -> int:
    """By how many pixels the page is wider than its window."""
    return browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")


def save_page(browser, path: str | Path, width: int) -> None:
    """An image of the whole page."""
    resize(browser, width, 100)  # or a short page would be as high as the window was
    resize(browser, width, browser.execute_script("return document.documentElement.scrollHeight"))
    browser.save_screenshot(str(path))
