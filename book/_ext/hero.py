"""The README's picture: the landing page's model with its examples moved into the weights, drawn by Chromium."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from browser import chromium, settle  # noqa: E402

PICTURE = ROOT / "book" / "_static" / "hero.png"


def main() -> None:
    """Draw it from the built landing page."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900}, device_scale_factor=1.5, color_scheme="light")
        page.goto((ROOT / "_build" / "html" / "book" / "index.html").as_uri())
        settle(page)
        puzzle = page.locator(".icl-puzzle").first
        puzzle.get_by_role("switch").check()
        page.mouse.move(0, 0)
        page.wait_for_timeout(8000)  # all questions are asked, one after the other
        shot = puzzle.screenshot()
    with Image.open(io.BytesIO(shot)) as picture:  # few colours: a quarter of the size
        framed = ImageOps.expand(picture.convert("RGB"), border=24, fill="white")
        framed.quantize(64, dither=Image.Dither.NONE).save(PICTURE, optimize=True)
    print(f"The picture is drawn: {PICTURE}")


if __name__ == "__main__":
    main()
