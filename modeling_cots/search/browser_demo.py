"""A search page that needs no server: both encoders, a collection's embeddings and thumbnails, in a static folder.

The page's own files stand in `browser_page/`, and the README of a Space is made of `browser_space.md`. onnxruntime-web
runs the encoders, and @huggingface/tokenizers reads texts. Neither is part of this package: the page fetches them from
a CDN, in one version and by their checksums, or the export copies them from an npm folder.
"""

import hashlib
import html
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import yaml
from huggingface_hub import CommitInfo
from PIL.Image import Resampling
from tqdm.auto import tqdm

from ..hub.onnx_export import export_onnx
from ..hub_export import CARD_NAME, mark_generated
from ..hub_push import processor_of, push_folder
from ..modeling_cots import COTSModel
from ..onnx_cots import model_file
from ..processing_cots import COTSProcessor
from .embedding import Embedder, ImageFolder, entry_names
from .options import THUMBNAIL_SIDE

PAGE = Path(__file__).parent / "browser_page"
SPACE_CARD = Path(__file__).parent / "browser_space.md"
# What CPUs and GPUs compute in; GPUs in half precision where they have it. The 8-bit files are those for CPUs without
# VNNI instructions, which no browser uses.
CPU_DTYPES, GPU_DTYPES = ("float32", "int8"), ("float16", "float32")
ONNX_DTYPES = {"int8": "quantized"}
NUM_EXAMPLES = 4
MAX_TOKENS = 512  # of encoders and tokenizers without an end: a visitor types at most 300 characters
LABELS = ("a photograph of people", "an animal", "food", "a building", "a landscape")  # where there are no captions

CDN = "https://cdn.jsdelivr.net/npm/"
# As `npm install` and the CDN give them. A file of another version has another checksum, and is refused.
RUNTIME_PACKAGES = {"onnxruntime-web": "1.30.0", "@huggingface/tokenizers": "0.2.0"}
RUNTIME_FILES = {
    "onnxruntime-web/dist/ort.wasm.min.mjs": (
        50_126,
        "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    ),
    "onnxruntime-web/dist/ort-wasm-simd-threaded.mjs": (
        24_381,
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    ),
    "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm": (
        14_239_897,
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
    "onnxruntime-web/dist/ort.webgpu.min.mjs": (
        66_349,
        "3dffff71811bc13a3a3d9591c57ca5ee5735b8f5f3eaf789510b02bb040ae3a0",
    ),
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs": (
        53_057,
        "3d1c85995364bb643302fc6fd877a0c3ba5ae72401815e0f24828a53d9191e28",
    ),
    "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm": (
        26_781_914,
        "39f9f0894d478800487ed9f7dbe92618498db320cf55c8e3d89adff8dce658da",
    ),
    "@huggingface/tokenizers/dist/tokenizers.min.mjs": (
        36_601,
        "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
    ),
}
RUNTIME_ROLES = {
    device: {"module": f"ort.{device}.min.mjs", "glue": f"{binary}.mjs", "wasm": f"{binary}.wasm"}
    for device, binary in (("wasm", "ort-wasm-simd-threaded"), ("webgpu", "ort-wasm-simd-threaded.asyncify"))
}
TOKENIZERS = "@huggingface/tokenizers/dist/tokenizers.min.mjs"

# The head of a Space's README.
SPACE = {
    "title": "",
    "emoji": "🔎",
    "colorFrom": "indigo",
    "colorTo": "green",
    "sdk": "static",
    "app_file": "index.html",
    "pinned": False,
    "short_description": "Search images by words, all in your browser",
    "tags": ["cots", "image-text-retrieval"],
    # What lets a page share memory between threads.
    "custom_headers": {
        "cross-origin-embedder-policy": "require-corp",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "cross-origin",
    },
}


def export_browser_demo(
    model: COTSModel | str | os.PathLike,
    images,
    folder: str | os.PathLike,
    *,
    processor: COTSProcessor | None = None,
    dtype: str = "float32",
    runtime: str | os.PathLike | None = None,
    title: str = "Search images",
    examples: Sequence[str] | None = None,
    batch_size: int = 32,
) -> None:
    """
    Write a page that searches a collection in the browser, by text and by image: a folder for any static host.

    Args:
        model: A [`COTSModel`], or the folder or Hub id of one.
        images: A folder of images, or a data set as `open_dataset` gives it, whose captions are shown.
        folder: New or empty.
        processor: Of the model; by default the one beside it.
        dtype: In what the encoders compute on a visitor's CPU: "float32", as in Python, or "int8", a quarter of the
            download and faster. A GPU computes in float16, or in float32 where it has no half precision.
        runtime: The `node_modules` of the packages in `RUNTIME_PACKAGES`, whose files are then part of the folder; by
            default the page fetches them from a CDN.
        title: The page's headline.
        examples: Queries to click on, and the first labels; by default some captions of the images.
        batch_size: Images a forward pass.

    Raises `ValueError` for a folder that is not empty, for another `dtype`, for other runtime files than those named
    above, for an image processor that the page cannot follow, and as `export_onnx` does.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{str(folder)!r} is not empty: name a new folder for the demo.")
    if dtype not in CPU_DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(CPU_DTYPES)}, got {dtype!r}.")
    if not isinstance(model, COTSModel):
        model = COTSModel.from_pretrained(model)
    processor = processor_of(model) if processor is None else processor
    settings = image_settings(processor.image_processor)
    sources = None if runtime is None else _runtime_files(Path(runtime))

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".demo-") as temporary:
        page = Path(temporary) / "page"
        _write_page(page, title, is_local=sources is not None)
        entries, collection = _write_collection(model, processor, images, page / "collection", batch_size)
        if examples is None:
            captions = [entry["caption"] for entry in entries if entry["caption"]]
            examples = captions[:: max(1, len(captions) // NUM_EXAMPLES)][:NUM_EXAMPLES]
        demo = {
            "title": title,
            "temperature": model.config.temperature,
            "dtype": dtype,
            "image": settings,
            "tokenizer": _tokenizer_settings(model, processor),
            "encoders": _write_encoders(model, processor, page / "encoders", dtype),
            "runtime": _write_runtime(sources, page / "runtime"),
            "collection": collection,
            "examples": list(examples),
            "labels": list(examples) or list(LABELS),
            "files": _describe_files(page) | (_cdn_files() if sources is None else {}),
        }
        (page / "demo.json").write_text(json.dumps(demo, indent=1), encoding="utf-8")
        _write_space_card(model, page, demo, len(entries))
        if folder.exists():
            folder.rmdir()
        page.rename(folder)


def push_browser_demo(folder: str | os.PathLike, repo_id: str, **options) -> CommitInfo:
    """Push what [`export_browser_demo`] wrote as a static Space; `options` are those of [`push_folder`]."""
    if not (Path(folder) / "demo.json").is_file():
        raise ValueError(f"There is no demo in {str(folder)!r}: write one with export_browser_demo first.")
    return push_folder(folder, repo_id, space_sdk="static", commit_message="Upload the page", **options)


# ---------------------------------------------------------------------------------------------------------- the parts


def image_settings(image_processor) -> dict:
    """
    What the page does to an image: size, filter (as PIL numbers them), and per channel `scale` and `shift` of bytes.

    Raises `ValueError` for an image processor that does anything else.
    """
    processor, size = image_processor, image_processor.size
    is_plain = processor.do_resize and not getattr(processor, "do_center_crop", False)
    if not is_plain or not (size.get("height") and size.get("width")):
        raise ValueError(
            f"The page resizes images to one height and width, and this {type(processor).__name__} does not "
            f"(do_resize={processor.do_resize}, size={dict(size)})."
        )
    if processor.resample not in (Resampling.BILINEAR, Resampling.BICUBIC):
        raise ValueError(f"The page resizes bilinearly or bicubically, and not by resample={processor.resample!r}.")
    rescale = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return {
        "height": size["height"],
        "width": size["width"],
        "resample": int(processor.resample),
        "scale": [rescale / s for s in std],
        "shift": [-m / s for m, s in zip(mean, std, strict=True)],
    }


def _write_page(folder: Path, title: str, is_local: bool) -> None:
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    origin = "" if is_local else " https://" + urlsplit(CDN).netloc
    page = (folder / "index.html").read_text(encoding="utf-8")
    page = page.replace("{{ title }}", html.escape(title)).replace("{{ runtime_origin }}", origin)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _write_collection(model, processor, images, folder: Path, batch_size: int) -> tuple[list[dict], dict]:
    """The embeddings, the thumbnails one after the other, and what the page shows of each image, which is returned."""
    dataset = ImageFolder(images) if isinstance(images, str | os.PathLike) else images
    embedder = Embedder(model, processor, batch_size=batch_size, num_workers=0, thumbnail_side=THUMBNAIL_SIDE)
    names = entry_names(dataset, getattr(dataset, "name", "data"))
    with tqdm(total=len(dataset), desc="Embedding", unit="image") as bar:
        tables = embedder.tables(dataset, np.arange(len(dataset)), names, "", bar)
        rows = [row for table in tables for row in table.to_pylist()]
    embedder.report_skipped()
    if not rows:
        raise ValueError(f"None of the {len(dataset)} images could be read.")
    folder.mkdir()
    entries, place = [], 0
    with open(folder / "thumbnails.bin", "wb") as file:
        for row in rows:
            size = file.write(row["thumbnail"]["bytes"])
            caption = row["captions"][0] if row["captions"] else ""
            # Without its folder: where the images lay is nobody's business.
            name = os.path.basename(row["name"])
            entries.append({"name": name, "caption": caption, "start": place, "end": place + size})
            place += size
    (folder / "entries.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    embeds = np.array([row["embedding"] for row in rows], np.float32)
    (folder / "embeddings.bin").write_bytes(b"".join(part.tobytes() for part in quantize_embeddings(embeds)))
    files = {"embeddings": "embeddings.bin", "thumbnails": "thumbnails.bin", "entries": "entries.json"}
    return entries, {"dim": embeds.shape[1], **{role: f"{folder.name}/{name}" for role, name in files.items()}}


def quantize_embeddings(embeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Embeddings (N, d) in int8: `scales` (N,) float32, `coarse` and `fine` (N, d) int8.

    An embedding is scale * (coarse + fine / 254). By `coarse` alone the order of near hits would be another than that
    of the embeddings, so `fine` holds what was rounded away.
    """
    scales = (np.abs(embeds).max(axis=1) / 127).astype("<f4")
    steps = embeds / np.where(scales == 0, 1, scales)[:, None]
    coarse = np.rint(steps)
    return scales, coarse.astype(np.int8), np.rint((steps - coarse) * 254).astype(np.int8)


def _write_encoders(model, processor, folder: Path, dtype: str) -> dict[str, dict[str, str]]:
    """The tokenizer, and the encoders' files by their precision: that of CPUs, and those that GPUs take."""
    folder.mkdir()
    encoders: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        export_onnx(model, processor, temporary)
        for encoder, role in (("text", "text"), ("image", "vision")):
            encoders[encoder] = {}
            for precision in dict.fromkeys((dtype, *GPU_DTYPES)):
                source = Path(temporary, model_file(role, ONNX_DTYPES.get(precision, precision)))
                shutil.copyfile(source, folder / source.name)
                encoders[encoder][precision] = f"{folder.name}/{source.name}"
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(Path(temporary, name), folder / name)
    return encoders


def _tokenizer_settings(model, processor) -> dict:
    longest = min(processor.tokenizer.model_max_length, model.max_text_length or MAX_TOKENS)
    return {
        "rules": "encoders/tokenizer.json",
        "settings": "encoders/tokenizer_config.json",
        "maxLength": min(longest, MAX_TOKENS),
    }


# --------------------------------------------------------------------------------------------------------- the runtime


def _runtime_files(node_modules: Path) -> dict[str, Path]:
    """The runtime's files in a `node_modules` folder. Raises `ValueError` for any that is missing or another."""
    packages = " ".join(f"{name}@{version}" for name, version in RUNTIME_PACKAGES.items())
    cure = f"Install them with `npm install --ignore-scripts {packages}`."
    found = {name: node_modules / name for name in RUNTIME_FILES}
    for name, path in found.items():
        if not path.is_file():
            raise ValueError(f"{str(node_modules)!r} has no {name}. {cure}")
        if digest(path.read_bytes()) != RUNTIME_FILES[name][1]:
            raise ValueError(f"{name} in {str(node_modules)!r} is of another version. {cure}")
    return found


def _write_runtime(sources: dict[str, Path] | None, folder: Path) -> dict:
    """Copy the runtime's files, if they are to be part of the page. Which file has which role on which device."""
    prefix = "" if sources is None else f"{folder.name}/"
    for name, source in (sources or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / name)
    roles = {
        device: {role: f"{prefix}onnxruntime-web/dist/{name}" for role, name in files.items()}
        for device, files in RUNTIME_ROLES.items()
    }
    label = " and ".join(f"{name} {version}" for name, version in RUNTIME_PACKAGES.items())
    return {**roles, "tokenizer": f"{prefix}{TOKENIZERS}", "name": label}


def _cdn_files() -> dict:
    described = {}
    for name, (size, digest) in RUNTIME_FILES.items():
        package = next(package for package in RUNTIME_PACKAGES if name.startswith(f"{package}/"))
        url = CDN + name.replace(package, f"{package}@{RUNTIME_PACKAGES[package]}", 1)
        described[name] = {"url": url, "bytes": size, "sha256": digest}
    return described


def _describe_files(folder: Path) -> dict:
    """Address, size and checksum of each large file: those in sub-folders."""
    return {
        (name := path.relative_to(folder).as_posix()): {
            "url": name,
            "bytes": path.stat().st_size,
            "sha256": digest(path.read_bytes()),
        }
        for path in sorted(folder.glob("*/**/*"))
        if path.is_file()
    }


def digest(content: bytes) -> str:
    """The checksum by which the page knows a file."""
    return hashlib.sha256(content).hexdigest()


def download_sizes(demo: dict) -> dict[str, int]:
    """The bytes that a first visit downloads, by the precision in which the encoders compute there."""
    shared = {demo["runtime"]["tokenizer"], *(demo["tokenizer"][name] for name in ("rules", "settings"))}
    shared |= {demo["collection"][name] for name in ("embeddings", "thumbnails", "entries")}
    sizes = {}
    for device, dtype in (("wasm", demo["dtype"]), ("webgpu", GPU_DTYPES[0])):
        names = {*shared, *demo["runtime"][device].values(), *(files[dtype] for files in demo["encoders"].values())}
        sizes[device] = sum(demo["files"][name]["bytes"] for name in names)
    return sizes


def _write_space_card(model, folder: Path, demo: dict, num_images: int) -> None:
    """The README that makes the folder a Space, which the Hub then links on its model's page."""
    source = model.config.name_or_path
    is_on_the_hub = source and not os.path.exists(source)
    sizes = {device: f"{size / 1e6:.1f}" for device, size in download_sizes(demo).items()}
    data = SPACE | {"title": demo["title"], **({"models": [source]} if is_on_the_hub else {})}
    text = SPACE_CARD.read_text(encoding="utf-8").format(
        title=demo["title"],
        num_images=f"{num_images:,}",
        model=f"[{source}](https://huggingface.co/{source})" if is_on_the_hub else "a COTS model",
        wasm_size=sizes["wasm"],
        webgpu_size=sizes["webgpu"],
        dtype=demo["dtype"],
        runtime=demo["runtime"]["name"],
    )
    header = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    (folder / CARD_NAME).write_text(mark_generated(f"---\n{header}---\n\n{text}"), encoding="utf-8")
