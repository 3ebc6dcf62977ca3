"""`maisi-ct encode` as a file that accelerate and torchrun can launch."""

from maisi_diffusers.cli.encode import main

if __name__ == "__main__":
    main()
