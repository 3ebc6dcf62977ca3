"""`maisi-ct convert` as a script."""

from maisi_diffusers.cli.convert import main

if __name__ == "__main__":
    main()
