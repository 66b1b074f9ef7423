"""The results of a search as one self-contained HTML page: thumbnails are inside, and nothing is loaded."""

import base64
import html
import os
from pathlib import Path

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 72rem; padding: 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
ol { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); list-style: none;
     margin: 0; padding: 0; }
figure { margin: 0; }
.frame { align-items: center; aspect-ratio: 1; background: #8882; border-radius: .5rem; display: flex;
         justify-content: center; overflow: hidden; text-align: center; }
img { height: 100%; object-fit: contain; width: 100%; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; padding-top: .3rem; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; }
a { color: inherit; } a:focus-visible { outline: 3px solid #2a6df4; outline-offset: 2px; }
"""


def results_page(title: str, hits: list[dict], note: str = "") -> str:
    """
    A page of the entries that `SearchIndex.search` returned, best first.

    Args:
        title: Names the query.
        hits: The entries; all text in them is escaped.
        note: A sentence below the title.
    """
    items = "\n".join(_item(place, hit) for place, hit in enumerate(hits, start=1))
    found = f'<ol aria-label="Images, best first">\n{items}\n</ol>' if hits else "<p>Nothing fits.</p>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>\n"
        f"<p>{_text(note)}</p>\n{found}\n</main>\n</body>\n</html>\n"
    )


def _item(place: int, hit: dict) -> str:
    name = os.path.basename(hit["name"]) or hit["name"]
    caption = hit["captions"][0] if hit["captions"] else ""
    image = _image(hit, caption or name)
    if os.path.isabs(hit["name"]) and os.path.exists(hit["name"]):
        image = f'<a href="{_text(Path(hit["name"]).as_uri())}">{image}</a>'
    lines = [f'<span class="score">{place}. {hit["score"]:.3f}</span> {_text(name)}', _text(caption)]
    return f"<li><figure>{image}<figcaption>{'<br>'.join(line for line in lines if line)}</figcaption></figure></li>"


def _image(hit: dict, description: str) -> str:
    thumbnail = hit.get("thumbnail")
    if not thumbnail or not thumbnail["bytes"]:
        return f'<div class="frame"><span>{_text(description)}</span></div>'
    data = base64.b64encode(thumbnail["bytes"]).decode()
    return f'<div class="frame"><img src="data:image/jpeg;base64,{data}" alt="{_text(description)}"></div>'


def _text(value: str) -> str:
    """Escape a text, and replace the surrogates that stand for undecodable bytes of a file name."""
    return html.escape(value.encode("utf-8", "replace").decode(), quote=True)
