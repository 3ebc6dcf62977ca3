"""`maisi-ct prepare` as a file that accelerate and torchrun can launch."""

from maisi_diffusers.cli.prepare import main

if __name__ == "__main__":
    main()
