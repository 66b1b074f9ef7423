"""`python -m modeling_cots` lists the programs that the package installs."""

from . import __version__

PROGRAMS = {
    "cots-train": "pre-train a model, or fine-tune it for the retrieval of images or videos",
    "cots-evaluate": "measure the recall of a model on a data set",
    "cots-export": "make a Hub repository of a model, in a folder or on the Hub",
    "cots-search": "index images and search them (with the extra `search`)",
}

if __name__ == "__main__":
    print(f"modeling_cots {__version__} installs these programs; each tells its options with --help.\n")
    for name, what in PROGRAMS.items():
        print(f"    {name:14s} {what}")
    print("\nWhere they are not on the PATH: python -m modeling_cots.scripts.cots_train, and so on.")
