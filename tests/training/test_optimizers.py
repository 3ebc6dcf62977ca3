"""Optimisers and learning rates, as published."""

import argparse
import sys
from types import SimpleNamespace

import pytest
import torch

from maisi_diffusers.training.arguments import add_optimizer_arguments, add_run_arguments
from maisi_diffusers.training.optimizers import make_lr_scheduler, make_optimizer


def options(*line, weight_decay=1e-2):
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    add_optimizer_arguments(parser, learning_rate=1e-3, lr_scheduler="polynomial", weight_decay=weight_decay)
    return parser.parse_args(["--data_list", "list.json", "--output_dir", "output", *line])


def parameters():
    return [torch.nn.Parameter(torch.ones(2))]


def learning_rates(args, num_steps, num_processes=1):
    """The rate of every step, and after the last. A prepared schedule moves on once a process and step."""
    optimizer = make_optimizer(parameters(), args)
    scheduler = make_lr_scheduler(optimizer, args, num_steps, num_processes)
    rates = []
    for _ in range(num_steps + 1):
        rates += scheduler.get_last_lr()
        optimizer.step()
        for _ in range(num_processes):
            scheduler.step()
    return torch.tensor(rates)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_polynomial_is_that_of_torch(num_processes):
    optimizer = torch.optim.SGD(parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=50, power=2.0)
    expected = []
    for _ in range(51):
        expected += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    rates = learning_rates(options(), 50, num_processes)
    assert torch.allclose(rates, torch.tensor(expected), rtol=1e-6, atol=1e-12)
    assert rates[0] == 1e-3 and rates[-1] == 0


def test_power_and_warmup():
    rates = learning_rates(options("--lr_power", "1", "--lr_warmup_steps", "4"), 12, num_processes=2)
    assert torch.allclose(rates[:4], torch.arange(4) * 1e-3 / 4)
    assert torch.allclose(rates[4:], torch.arange(8, -1, -1) * 1e-3 / 8, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup"])
def test_other_schedules_see_the_same_run_on_any_number_of_processes(name):
    args = options("--lr_scheduler", name, "--lr_warmup_steps", "2", "--lr_num_cycles", "2")
    one, two = learning_rates(args, 10), learning_rates(args, 10, num_processes=2)
    assert torch.allclose(one, two, atol=1e-9) and one[2] == 1e-3


def test_adam_or_adamw():
    line = ["--learning_rate", "0.25", "--adam_beta1", "0.5", "--adam_beta2", "0.75", "--adam_epsilon", "0.125"]
    adamw = make_optimizer(parameters(), options(*line, "--adam_weight_decay", "0.3"))
    adam = make_optimizer(parameters(), options(*line, weight_decay=None))
    assert type(adamw) is torch.optim.AdamW and adamw.defaults["weight_decay"] == 0.3
    assert type(adam) is torch.optim.Adam and adam.defaults["weight_decay"] == 0
    for optimizer in (adamw, adam):
        assert [optimizer.defaults[name] for name in ("lr", "betas", "eps")] == [0.25, (0.5, 0.75), 0.125]


def test_8_bit(monkeypatch):
    class AdamW8bit(torch.optim.AdamW):
        pass

    class Adam8bit(torch.optim.Adam):
        pass

    optim = SimpleNamespace(AdamW8bit=AdamW8bit, Adam8bit=Adam8bit)
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=optim))
    assert type(make_optimizer(parameters(), options("--use_8bit_adam"))) is AdamW8bit
    assert type(make_optimizer(parameters(), options("--use_8bit_adam", weight_decay=None))) is Adam8bit


def test_8_bit_without_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave"):
        make_optimizer(parameters(), options("--use_8bit_adam"))
