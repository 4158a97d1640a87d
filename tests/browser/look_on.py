"""Looks at the page of a training run in headless Chromium, as a person would: `look_on.py URL FOLDER`.

Prints `seen` when everything that should move has moved, with pictures in FOLDER; then expects the run to end, and prints
`over` when the page says so. The browser is the one COFFEY_BROWSER names.
"""

import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Page, expect, sync_playwright

STAGES = ["fetch", "untar", "filter", "shuffle", "decode", "batch", "encode", "train"]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# A shared machine may be slow.
PATIENCE_MS = 120_000


def step(page: Page) -> int:
    """The number under `step`."""
    shown = page.locator("[data-figure=step] > span")
    return int(shown.inner_text(timeout=PATIENCE_MS).replace(",", ""))


def grows(page: Page, path: str) -> None:
    """Waits until a line of a chart has points."""
    page.wait_for_function("path => (document.querySelector(path)?.getAttribute('d') ?? '').includes('L')", arg=path, timeout=PATIENCE_MS)


def check(page: Page) -> None:
    """What stands on the page once steps are made."""
    expect(page.locator("#state")).to_have_text("running", timeout=PATIENCE_MS)
    # The folder's name as it is, and not as markup.
    expect(page.locator("#subject")).to_contain_text("<b>bold<img src=x onerror=alert(1)>")
    assert page.locator("#subject *").count() == 0

    assert page.locator(".stage").evaluate_all("all => all.map(box => box.dataset.stage)") == STAGES
    expect(page.locator(".badge:visible")).to_have_count(1, timeout=PATIENCE_MS)
    limit = page.locator(".stage[aria-current]")
    assert limit.get_attribute("data-stage") in STAGES
    assert page.locator("#flow-note").inner_text().startswith(limit.get_attribute("data-stage"))
    channels = page.locator(".channel").evaluate_all("all => all.map(box => box.dataset.channel)")
    assert {"samples", "decode", "decoded", "batches", "encode", "encoded"} <= set(channels), channels
    expect(page.locator("[data-channel=encoded] b")).to_have_text("2/2", timeout=PATIENCE_MS)

    grows(page, "#loss path")
    grows(page, "#others path")
    assert "loss" in page.locator("#loss svg").get_attribute("aria-label")
    page.wait_for_function("document.getElementById('picture').naturalWidth > 0", timeout=PATIENCE_MS)
    assert page.locator("#picture").get_attribute("alt")
    assert page.locator("#checkpoint td").first.inner_text() == "saved"

    wide, window = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert wide <= window, f"the page is {wide} wide in a window of {window}"


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2])
    faults: list[str] = []
    with sync_playwright() as playwright:
        # Tests in a container are root, where Chromium has no sandbox; the page is our own.
        browser = playwright.chromium.launch(executable_path=os.environ["COFFEY_BROWSER"], args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})

        def asked(request) -> None:
            if urlsplit(request.url).netloc != urlsplit(url).netloc and not request.url.startswith("data:"):
                faults.append(f"asked another host: {request.url}")

        page.on("request", asked)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("console", lambda message: faults.append(f"console: {message.text}") if message.type in ("error", "warning") else None)

        page.goto(url)
        page.evaluate("window.untouched = true")
        # The checkpoint and the grid come after a few steps.
        page.locator("#checkpoint td", has_text="saved").wait_for(timeout=PATIENCE_MS)
        before = step(page)
        check(page)
        page.wait_for_function(
            "before => Number(document.querySelector('[data-figure=step] > span').textContent.replace(',', '')) > before", arg=before, timeout=PATIENCE_MS
        )
        assert page.evaluate("window.untouched"), "it was loaded again"

        for scheme in ["light", "dark"]:
            page.emulate_media(color_scheme=scheme)
            for name, (width, height) in SIZES.items():
                page.set_viewport_size({"width": width, "height": height})
                page.wait_for_timeout(300)
                check(page)
                page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=True)

        # One who comes late has the whole curve at once.
        late = browser.new_page()
        late.goto(url)
        grows(late, "#loss path")
        label = late.locator("#loss svg").get_attribute("aria-label")
        assert " at step 1, " in label, label
        late.close()

        assert not faults, faults
        print("seen", flush=True)
        expect(page.locator("#state")).to_contain_text("over, at ", timeout=PATIENCE_MS)
        # The run has ended and its port is closed. The page asks it for its last grid, and every ten seconds whether a command
        # listens there again; Chromium logs each refusal.
        faults = [fault for fault in faults if not fault.endswith("net::ERR_CONNECTION_REFUSED")]
        assert not faults, faults
        browser.close()
    print("over", flush=True)


main()
