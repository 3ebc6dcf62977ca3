"""The page of what was measured says what holds, and what was not measured."""

from benchmarks import networks, page, solvers, turns


def made_up() -> dict[str, dict]:
    """Results of all parts, some of which break what is promised."""
    of_networks = {
        work: {
            variant: {"seconds": 8.0 if variant == "MONAI" else 2.0, "megabytes": 1000.0, "deviation": 1e-5}
            for variant in variants
        }
        for work, (_, _, variants) in networks.WORK.items()
    }
    of_networks["decode"]["float32 auto"]["megabytes"] = 400.0
    of_networks["decode"]["float32 exact 256MiB"] |= {"megabytes": 240.0, "deviation": 1e-3}
    of_networks["encode"]["bfloat16 auto"]["seconds"] = 4.0
    one = {"seconds": 10.0, "megabytes": 500.0, "deviation": 0.0}
    parts = {
        "networks": of_networks,
        "tiling": {
            "48": {"float32 off": one, "float32 exact 1GiB": one | {"megabytes": 1200.0}, "float32 lean 1GiB": one},
            "64": {"float32 exact 2GiB": one | {"seconds": 30.0}, "float32 exact 512MiB": {}},
        },
        "whole": {"MONAI": one, "bfloat16 auto": one | {"seconds": 3.0, "outside": 0.01}},
        "large": {"bfloat16 exact 6GiB, 2 steps": one | {"outside": 0.1}},
        "solvers": {name: [(steps, 0.5 / steps, 40.0 / steps) for steps in solvers.STEPS] for name in solvers.SOLVERS},
    }
    return {name: {"machine": "made up", "on_gpu": False, "measured": measured} for name, measured in parts.items()}


def test_page(tmp_path):
    page.write_page(made_up(), tmp_path)
    text = (tmp_path / "performance.md").read_text()
    for row in (
        "| A step of UNet and ControlNet, bfloat16, times as fast | at least 2.7 | 4 | holds |",
        "| Encoding, bfloat16, times as fast | at least 2.4 | 2 | **does not hold** |",
        "| Decoding, float32 auto, share of memory | at most 0.5 | 0.4 | holds |",
        "| Decoding, float32 exact 256MiB, deviation | at most 0.0001 | 0.001 | **does not hold** |",
        "| Encoding, float32 exact 256MiB, memory over the bound | at most 1.1 | 3.73 | **does not hold** |",
        "| latent 48^3, float32 lean 1GiB, memory over the bound | at most 1.1 | 0.466 | holds |",
        "| latent 48^3, float32 exact 1GiB, memory over the bound | at most 1.1 | 1.12 | **does not hold** |",
        "| latent 48^3, float32 lean 1GiB, largest difference | at most 1 HU | 0 HU | holds |",
        "| latent 64^3, float32 exact 2GiB, times the time of one piece | at most 1.3 | 1.27 | holds |",
        "| float32 exact 512MiB | failed |",
        "| a whole CT, time outside the networks | at most 3 % | 1 % | holds |",
        "| a CT of 512^3 voxels, bfloat16 exact 6GiB, 2 steps, memory | at most 12 GB | 0.5 GB | holds |",
        "within 5 HU from 8 steps of DPM-Solver++",
    ):
        assert row in text, row
    assert "latent 64^3, float32 exact 2GiB, deviation" not in text  # from itself
    assert "**not within 15 %**" in text and "within 1 HU from 50 steps" in text
    for name in ("performance.png", "solvers.png"):
        assert (tmp_path / name).stat().st_size > 1000


def test_page_without_the_first_variant(tmp_path):
    """Others are compared with the next, and what is promised beside it is left out."""
    results = made_up()
    del results["networks"]  # of which the plan of the memory takes long
    results["tiling"]["measured"]["48"]["float32 off"] = {}
    results["whole"]["measured"]["MONAI"] = results["large"]["measured"]["bfloat16 exact 6GiB, 2 steps"] = {}
    page.write_page(results, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    for row in ("| float32 off | failed |", "| MONAI | failed |", "| bfloat16 exact 6GiB, 2 steps | failed |"):
        assert row in text, row
    assert "a whole CT" not in text and "times the time of one piece" not in text


def test_page_of_a_gpu(tmp_path):
    """What is promised of two CPU cores is not asked of it."""
    results = {name: part | {"on_gpu": True} for name, part in made_up().items()}
    page.write_page(results, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "What is promised" not in text and "decode exact" not in text
    assert "| decode off, latent 24^3 |" in text and "| bfloat16 exact 6GiB, 2 steps | 10.0 |" in text


def test_page_of_a_part_that_goes_on(tmp_path):
    results = made_up()
    of_networks = results["networks"]["measured"]
    results["networks"]["measured"] = {"embedding": of_networks["embedding"]}
    page.write_page({"networks": results["networks"]}, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "| embedding, latent 32^3 |" in text and "A step of UNet" not in text


def test_page_of_one_part(tmp_path):
    page.write_page({"solvers": made_up()["solvers"]}, tmp_path)
    text = (tmp_path / "performance.md").read_text()
    assert "What is promised" not in text and "performance.png" not in text


def test_a_variant_that_fails(capfd):
    """The others go on."""
    code = """
import os, sys
from benchmarks.turns import serve
import torch
serve({}, torch.device("cpu"), lambda result: {{"told": result}})
"""
    commands = {
        "good": ["-c", code.format("lambda: 1")],
        "bad": ["-c", code.format("lambda: os._exit(9)")],
        "never": ["-c", "raise SystemExit(1)"],
    }
    results = turns.take_turns(commands, repeats=1)
    assert results["good"]["told"] == 1 and results["good"]["seconds"] < 1
    assert results["bad"] == results["never"] == {}
    assert "bad has failed" in capfd.readouterr().err
