"""The results of a search as one self-contained HTML page: thumbnails are inside, and nothing is loaded."""

import base64
import html
import os
from pathlib import Path

from .options import MAX_TOP

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
form { align-items: end; display: grid; gap: .75rem; margin: 0 0 1rem;
       grid-template-columns: repeat(auto-fit, minmax(min(100%, 11rem), 1fr)); }
label { display: block; font-size: .85rem; min-width: 0; }
input, button { box-sizing: border-box; font: inherit; margin-top: .2rem; padding: .4rem .5rem; width: 100%; }
.score { font-variant-numeric: tabular-nums; font-weight: 600; }
a { color: inherit; } a:focus-visible { outline: 3px solid #2a6df4; outline-offset: 2px; }
"""


def results_page(title: str, hits: list[dict] | None, note: str = "", form: str | None = None) -> str:
    """
    A page of the entries that `SearchIndex.search` returned, best first.

    Args:
        title: Names the query.
        hits: The entries; all text in them is escaped. `None` before a search.
        note: A sentence below the title.
        form: What `search_form` returned, on a page of a server; its images are no links, as browsers follow none from
            a server to a file.
    """
    items = "\n".join(_item(place, hit, is_linked=form is None) for place, hit in enumerate(hits or [], start=1))
    found = f'<ol aria-label="Images, best first">\n{items}\n</ol>' if hits else "<p>Nothing fits.</p>"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{form or ''}"
        f'<h1>{_text(title)}</h1>\n<p role="status">{_text(note)}</p>\n{"" if hits is None else found}\n'
        "</main>\n</body>\n</html>\n"
    )


def search_form(text: str, where: str, top: str) -> str:
    """The form of a server's page, with what was asked last."""
    return (
        '<form method="post" action="/" enctype="multipart/form-data">\n'
        f'<label>Text<input name="text" value="{_text(text)}" placeholder="a dog in the snow"></label>\n'
        '<label>Image<input name="image" type="file" accept="image/*"></label>\n'
        f'<label>Condition<input name="where" value="{_text(where)}" placeholder="year &gt;= 2020"></label>\n'
        f'<label>How many<input name="top" type="number" min="1" max="{MAX_TOP}" value="{_text(top)}"></label>\n'
        "<button>Search</button>\n</form>\n"
    )


def _item(place: int, hit: dict, is_linked: bool) -> str:
    name = os.path.basename(hit["name"]) or hit["name"]
    caption = hit["captions"][0] if hit["captions"] else ""
    image = _image(hit, caption or name)
    if is_linked and os.path.isabs(hit["name"]) and os.path.exists(hit["name"]):
        image = f'<a href="{_text(Path(hit["name"]).as_uri())}">{image}</a>'
    copies = f"{len(hit['copies'])} more with the same pixels" if hit.get("copies") else ""
    lines = [f'<span class="score">{place}. {hit["score"]:.3f}</span> {_text(name)}', _text(caption), copies]
    said = "<br>".join(line for line in lines if line)
    return f'<li><figure title="{_text(hit["name"])}">{image}<figcaption>{said}</figcaption></figure></li>'


def _image(hit: dict, description: str) -> str:
    thumbnail = hit.get("thumbnail")
    if not thumbnail or not thumbnail["bytes"]:
        return f'<div class="frame"><span>{_text(description)}</span></div>'
    data = base64.b64encode(thumbnail["bytes"]).decode()
    return f'<div class="frame"><img src="data:image/jpeg;base64,{data}" alt="{_text(description)}"></div>'


def _text(value: str) -> str:
    """Escape a text, and replace the surrogates that stand for undecodable bytes of a file name."""
    return html.escape(value.encode("utf-8", "replace").decode(), quote=True)
