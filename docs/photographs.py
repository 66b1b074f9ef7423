"""The photographs of the docs: twelve of scikit-image's sample images, with captions of our own.

    pip install scikit-image
    python docs/photographs.py PHOTOS

writes them as a data set: the files and metadata.jsonl. All are free of copyright, as scikit-image says where it
describes them (skimage/data/_fetchers.py): in the public domain, or CC0.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

from modeling_cots.scripts.error_boundary import run_script

# By file: what it shows, and who has made it. CC0 where nothing else is said.
PHOTOGRAPHS = {
    "astronaut.png": "an astronaut in an orange suit in front of a flag",  # NASA, public domain
    "brick.png": "a pavement of narrow bricks",
    "camera.png": "a man with a camera on a tripod on a lawn",  # Lav Varshney
    "chelsea.png": "the face of a brown cat",  # Stefan van der Walt
    "clock_motion.png": "the blurred face of a round clock",  # Stefan van der Walt, public domain
    "coffee.png": "a cup of coffee and a spoon on a wooden table",  # Rachel Michetti
    "coins.png": "rows of old coins on a dark ground",  # Brooklyn Museum, no known restrictions
    "grass.png": "a lawn with long blades of grass seen from above",
    "gravel.png": "small stones of gravel",
    "hubble_deep_field.jpg": "stars and galaxies in the night sky",  # NASA, public domain
    "retina.jpg": "the red inside of an eye with its blood vessels",
    "rocket.jpg": "a rocket on its launch pad in the evening",  # SpaceX, public domain
}


def write_photographs(folder: Path) -> Path:
    """The data set in `folder`. Raises `ModuleNotFoundError` without scikit-image."""
    found = importlib.util.find_spec("skimage")
    if found is None:
        raise ModuleNotFoundError("The photographs are those of scikit-image: pip install scikit-image.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for name, caption in PHOTOGRAPHS.items():
            shutil.copy(Path(found.submodule_search_locations[0], "data", name), folder)
            metadata.write(json.dumps({"file_name": name, "text": caption}) + "\n")
    return folder


def main() -> None:
    write_photographs(Path(sys.argv[1]))


if __name__ == "__main__":
    run_script(main)
