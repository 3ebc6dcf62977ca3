"""`python -m maisi_diffusers.cli` is `maisi-ct`."""

from .app import app

app(prog_name="maisi-ct")
