"""Generated images and clips with captions that describe them: the data of the quick start and of the tests."""
