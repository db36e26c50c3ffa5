"""The picture of a report for the README: the upper part of the page, light, taken with Chromium.

python docs/screenshot.py demo-output/report.html docs/report.png
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, SCALE = 1100, 1.5
COLOURS = 256  # a page has few: a palette makes the file a third


def take(page_path: Path, picture: Path) -> None:
    """Everything down to the end of the graph."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=SCALE)
        page.goto(page_path.resolve().as_uri())
        graph = page.locator("#graph").bounding_box()
        assert graph is not None
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": graph["y"] + graph["height"] + 18}
        shot = page.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
        browser.close()
    with Image.open(BytesIO(shot)) as image:
        # by coverage, not by how common: the few orange pixels of a dropped block are what one looks for
        palette = image.convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        palette.save(picture, optimize=True)
    print(f"{picture}: {picture.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
