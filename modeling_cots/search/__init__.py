"""An index of images that is searched by text, image or both: vector stores, the page of results, `cots-search`."""
