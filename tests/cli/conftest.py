from tests.loaders.conftest import checkpoint, networks, published  # noqa: F401, fixtures
