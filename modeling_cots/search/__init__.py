"""An image index that is searched by text or image: its vector stores, its result page, and `cots-search`."""
